"""Counts what makes a host wait for its device, also on a CPU, where nothing waits."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class SyncCounter:
    """Counts what makes the host wait for a device: reads of tensors, and ops whose result's size depends on values."""

    reads = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
    ) | {torch.ops.aten.unique_dim, torch.ops.aten.unique_consecutive}
    indexed = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "masked_scatter")
    )
    methods = frozenset(getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy", "__array__"))

    def __init__(self) -> None:
        self.total = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens in the block, backward passes included."""
        counter = self

        class Dispatch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                counter.total += func.overloadpacket in counter.reads
                counter.total += func.overloadpacket in counter.indexed and _has_mask(args[1:])
                return func(*args, **(kwargs or {}))

        class Function(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                counter.total += func in counter.methods
                return func(*args, **(kwargs or {}))

        with Function(), Dispatch():
            yield


def _has_mask(args: Sequence[Any]) -> bool:
    flat = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else (arg,))]
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in flat)


def count_syncs(run: Callable[[], T]) -> tuple[int, T]:
    """Host syncs of one call, and its result."""
    counter = SyncCounter()
    with counter.counting(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of .grad of a non-leaf, which only the mode's wrapper touches
        result = run()
    return counter.total, result
