"""A guard that fails on whatever makes the host wait for the device, also on a CPU, where nothing waits.

Two nets: the methods of torch.Tensor that read are replaced, and a dispatch mode watches the ops. A function mode would
not do for the first: torch takes it down while ``Tensor.backward`` runs.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense,  # .item(), int(), bool(), if tensor:
    aten.nonzero,
    aten.nonzero_static,
    aten.masked_select,
    aten.equal,
    aten.allclose,
    aten.is_nonzero,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.histc,
    aten.isin,
    aten.multinomial,
    aten._to_sparse,
    aten._linalg_check_errors,
}
"""Ops whose result, or its size, the host must read."""

INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten.masked_scatter}
"""Ops that turn a boolean index into row numbers, whose count the host must read."""

METHODS = ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods that read, whatever their arguments. On a CPU some of them are no op at all."""

MOVES = ("to", "type")
"""Methods that wait where they name the host."""


ALLOWED = {("unimega.backend.base", "HostCopy.read")}
"""(module, function) that may read what it has waited for itself. Its one caller in forward is the all-to-all of rows,
which has to know how many come (``unimega.moe.dispatch``)."""


class HostSync(AssertionError):
    """Code waited for the device."""


@contextlib.contextmanager
def forbid_syncs() -> Iterator[list[str]]:
    """Raise HostSync in the block when the host reads a tensor, or would on a device; CUDA's own check is on too.

    A copy to the host with ``non_blocking=True`` passes: to read what it brought does not, but for ``ALLOWED``. Gives
    the list of what was allowed so far.
    """
    allowed: list[str] = []
    cuda = torch.cuda.is_available()
    before = torch.cuda.get_sync_debug_mode() if cuda else 0
    try:
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        with _replaced_methods(allowed), _DispatchGuard():
            yield allowed
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _replaced_methods(allowed: list[str]) -> Iterator[None]:
    """In torch.Tensor itself, hence for subclasses, autograd's own calls and its threads too."""
    own = {name: vars(torch.Tensor).get(name) for name in METHODS + MOVES}  # None: inherited
    try:
        for name in METHODS:
            setattr(torch.Tensor, name, _refuse(name, getattr(torch.Tensor, name, None), allowed))
        for name in MOVES:
            setattr(torch.Tensor, name, _refuse_host(name, getattr(torch.Tensor, name)))
        yield
    finally:
        for name, method in own.items():
            if method is not None:
                setattr(torch.Tensor, name, method)
            elif name in vars(torch.Tensor):
                delattr(torch.Tensor, name)


def _refuse(name: str, original: Any, allowed: list[str]) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        place = (caller.f_globals.get("__name__", ""), caller.f_code.co_qualname)
        if place in ALLOWED:
            allowed.append(".".join(place))
            return original(*args, **kwargs)
        raise HostSync(f"Tensor.{name} makes the host wait for the device")

    return method


def _refuse_host(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        where = (*args, *(kwargs[key] for key in ("device", "dtype") if key in kwargs))
        if any(map(_names_host, where)) and not kwargs.get("non_blocking"):
            raise HostSync(f"Tensor.{name}({', '.join(map(repr, where))}) makes the host wait for the device")
        # On a CPU a method may be redirected, which acts on calls from megatron-core only: it must know them still.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        call = _call_as_megatron if caller.startswith("megatron.") else _call
        return call(original, tensor, *args, **kwargs)

    return method


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_call_as_megatron = types.FunctionType(_call.__code__, {"__name__": "megatron.called_through_the_guard"})


def _names_host(argument: Any) -> bool:
    """Whether an argument of ``to`` or ``type`` is the CPU or a type of its tensors."""
    if isinstance(argument, torch.device):
        return argument.type == "cpu"
    if isinstance(argument, type) and argument.__module__ == "torch":
        return True  # torch.FloatTensor; that of a device is in torch.cuda
    return isinstance(argument, str) and (argument.startswith("cpu") or argument.count(".") == 1)


class _DispatchGuard(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in READS or (packet in INDEXED and _has_mask(args[1:])) or _copies_to_host(packet, args, kwargs):
            raise HostSync(f"{func} makes the host wait for the device")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise HostSync(f"{func} without output_size makes the host wait for the device")
        return func(*args, **kwargs)


def _copies_to_host(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if packet is aten.copy_:
        target, source, non_blocking = args[0].device, args[1].device, any(args[2:3]) or kwargs.get("non_blocking")
    elif packet is aten._to_copy:
        source, non_blocking = args[0].device, kwargs.get("non_blocking")
        target = torch.device(kwargs.get("device") or source)
    else:
        return False
    return target.type == "cpu" != source.type and not non_blocking


def _has_mask(args: Sequence[Any]) -> bool:
    flat = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else (arg,))]
    return any(isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in flat)
