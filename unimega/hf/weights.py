"""The tensors of a Hugging Face folder: safetensors, single or sharded. Bad files give one line each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from unimega.errors import CheckpointError
from unimega.hf.folder import read_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """A tensor of a folder, or one expert's part of one that holds all experts."""

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    """Of the expert; None: all."""


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name, each read from its file when asked for."""

    def __init__(self, folder: Path) -> None:
        """Read all headers.

        Raises:
            CheckpointError: no safetensors, a missing or truncated shard, an index at odds with its shards,
                a tensor that is stored twice or in a type that is not a float of 16 or 32 bits.
        """
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        indexed = _indexed(folder)
        for path in sorted({*indexed.values()}) if indexed else [folder / _SINGLE]:
            self._read_header(path)
        for name, path in indexed.items():
            if self._files.get(name) != path:
                raise CheckpointError(f"{_INDEX} puts tensor {name!r} into {path.name}, which does not have it.")

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self.read(Place(name))

    def read(self, place: Place) -> torch.Tensor:
        """Read a tensor or a part of one."""
        path = self._files[place.name]
        try:
            with safe_open(path, framework="pt") as file:
                if place.expert is None:
                    tensor: torch.Tensor = file.get_tensor(place.name)
                    return tensor
                rows = slice(None) if place.rows is None else slice(*place.rows)
                part: torch.Tensor = file.get_slice(place.name)[place.expert, rows]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        return part

    def __iter__(self) -> Iterator[str]:
        """Names, file by file."""
        return iter(self._files)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._files)

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"shard {path.name!r} is named in {_INDEX} and missing in {str(path.parent)!r}.")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    view = file.get_slice(name)
                    self._add(name, path, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable(path, error)) from error

    def _add(self, name: str, path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        if name in self._files:
            both = f"{self._files[name].name} and {path.name}"
            raise CheckpointError(f"tensor {name!r} is in both {both}. Remove one of them.")
        if dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {path.name} has dtype {dtype!r}. Weights are one of {', '.join(DTYPES)}: "
                "quantised folders cannot be imported, take the original weights."
            )
        self._files[name], self.shapes[name], self.dtypes[name] = path, shape, DTYPES[dtype]


def _indexed(folder: Path) -> dict[str, Path]:
    """File of each tensor as the index tells it; empty for a folder with a single file."""
    if (folder / _SINGLE).is_file():
        return {}
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has neither {_SINGLE} nor {_INDEX}. Only safetensors are read: "
            "save the model again with save_pretrained(safe_serialization=True)."
        )
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{_INDEX} in {str(folder)!r} has no weight_map of file names. Download it again.")
    return {name: folder / file for name, file in places.items()}


def _unreadable(path: Path, error: Exception) -> str:
    return f"{str(path)!r} cannot be read: {error}. It is truncated or not safetensors: copy it again."
