"""A guard that fails on whatever makes the host wait for the device, also on a CPU, where nothing waits."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense,  # .item(), int(), bool(), if tensor:
    aten.nonzero,
    aten.nonzero_static,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
"""Ops whose result, or its size, the host must read."""

INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten.masked_scatter}
"""Ops that turn a boolean index into row numbers, whose count the host must read."""

METHODS = {
    getattr(torch.Tensor, name)
    for name in ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")
}


class HostSync(AssertionError):
    """Code waited for the device."""


@contextlib.contextmanager
def forbid_syncs() -> Iterator[None]:
    """Raise HostSync in the block when the host reads a tensor, or would on a device; CUDA's own check is on too."""
    cuda = torch.cuda.is_available()
    before = torch.cuda.get_sync_debug_mode() if cuda else 0
    try:
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        with _FunctionGuard(), _DispatchGuard():
            yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode(before)


class _DispatchGuard(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in READS or (packet in INDEXED and _has_mask(args[1:])):
            raise HostSync(f"{func} makes the host wait for the device")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise HostSync(f"{func} without output_size makes the host wait for the device")
        return func(*args, **kwargs)


class _FunctionGuard(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in METHODS:
            raise HostSync(f"Tensor.{func.__name__} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def _has_mask(args: Sequence[Any]) -> bool:
    flat = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else (arg,))]
    return any(isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in flat)
