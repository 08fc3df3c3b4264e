"""A safetensors file written front to back: the library's own writer wants all tensors of a file in memory at once."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from unimega.hf.weights import DTYPES

_ALIGNMENT = 8
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


class ShardFile:
    """An open file whose header is written; tensors follow in the order that it names them."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Write the header.

        Args:
            path: a new file.
            tensors: name -> type and shape, in order.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _SPELLED[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.bytes = end
        self._left = list(tensors.items())
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor."""
        assert self._left.pop(0) == (name, (tensor.dtype, tuple(tensor.shape))), name
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        assert kind is not None or not self._left, self._left[0]
