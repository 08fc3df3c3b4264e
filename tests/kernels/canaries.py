"""Buffers with guard bands: a kernel that writes past an end, or leaves a place unwritten, is seen on any device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

BAND = 64
"""Elements before and behind each buffer."""

_LIKE = {torch.empty_like, torch.zeros_like}
_MAKERS = {torch.empty, torch.zeros, torch.Tensor.new_empty, torch.Tensor.new_zeros, *_LIKE}


class Canaries(TorchFunctionMode):
    """New buffers lie between two bands, and hold NaN (or a large negative integer) unless zeros were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[str, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _MAKERS or not isinstance(result, torch.Tensor) or not result.is_contiguous():
            return result
        buffer = torch.full(
            (result.numel() + 2 * BAND,), _poison(result.dtype), dtype=result.dtype, device=result.device
        )
        inside = buffer[BAND : BAND + result.numel()].view(result.shape)
        if "zeros" in resolve_name(func):
            inside.zero_()
        self.buffers.append((f"{resolve_name(func)} {tuple(result.shape)}", buffer))
        return inside

    def check(self) -> None:
        """Raise if a band was written."""
        for name, buffer in self.buffers:
            wanted = torch.full((BAND,), _poison(buffer.dtype), dtype=buffer.dtype, device=buffer.device)
            for where, band in (("before", buffer[:BAND]), ("behind", buffer[-BAND:])):
                if not torch.equal(band.nan_to_num(nan=-7), wanted.nan_to_num(nan=-7)):
                    raise AssertionError(f"written {where} {name}")


@contextlib.contextmanager
def guarded_buffers() -> Iterator[None]:
    """Guard every buffer that is made in the block, and look at the bands at its end."""
    canaries = Canaries()
    with canaries:
        yield
    canaries.check()


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min // 2 + 7
