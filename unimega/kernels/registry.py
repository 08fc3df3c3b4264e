"""The table of ops and their implementations, and the only dispatch there is.

An op is a contract (the docstring of ``kernels/<op>.py``), a reference that defines the numbers, and rows of a table.
A layer calls ``resolve`` once, in ``__init__``, and keeps the function: two models in one process may differ.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unimega import log
from unimega.errors import KernelUnavailable
from unimega.kernels import availability
from unimega.kernels.cuda import library

_log = log.get(__name__)

EVERYWHERE = frozenset({"cpu", "cuda", "npu"})
"""Device types of an implementation in plain torch."""


def _no_reason(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Impl:
    """One way to run an op, imported only when chosen."""

    name: str
    """``reference``, ``triton``, ``cuda``, ``npu``, ``cpu`` (torch, host reads allowed), ``cpp``, or a package's."""
    target: str
    """``module:attribute``; same signature, layout and gradients as the reference."""
    devices: frozenset[str]
    """Device types it can run on."""
    why_not: Callable[[torch.device], str | None] = _no_reason
    """Why it cannot run here (a package, a compute capability), in a few words; None: it can."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Largest sizes that it takes, by key of ``[model]``."""
    only_named: frozenset[str] = frozenset()
    """Device types on which ``auto`` passes it over, though it can run: Triton's interpreter shows numbers, slowly."""
    note: str = ""
    """What whoever picks it should know; ``doctor`` prints it."""


def triton(target: str) -> Impl:
    """The row of a kernel in ``unimega.kernels.triton``; on a CPU its interpreter runs it, when named."""
    return Impl(
        "triton",
        f"unimega.kernels.triton.{target}",
        frozenset({"cuda", "cpu"}),
        availability.triton,
        only_named=frozenset({"cpu"}),
        note="never run on a GPU",
    )


def cuda(target: str) -> Impl:
    """The row of a function in ``unimega.kernels.cuda``, in the library that CMake builds from csrc."""
    return Impl(
        "cuda",
        f"unimega.kernels.cuda.{target}",
        frozenset({"cuda"}),
        library.why_not,
        limits=library.LIMITS,
        note="never run on a GPU",
    )


def npu(target: str, *operators: str, only_named: bool = False) -> Impl:
    """The row of a function in ``unimega.kernels.npu`` and the operators of torch-npu that it calls."""
    return Impl(
        "npu",
        f"unimega.kernels.npu.{target}",
        frozenset({"npu"}),
        availability.npu(*operators),
        only_named=frozenset({"npu"} if only_named else ()),
        note="never run on hardware",
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A line of ``python -m unimega doctor``: an implementation on a device."""

    op: str
    impl: str
    device: str
    reason: str | None
    """None: it can run."""
    chosen: bool
    """True: ``auto`` takes it on this device."""
    note: str
    """What to know before picking it; empty: nothing."""


_table: dict[str, tuple[Impl, ...]] = {}


def declare(op: str, *impls: Impl) -> None:
    """Enter an op with its implementations, best first. Write-once: a second table for an op is a mistake of ours."""
    if op in _table:
        raise ValueError(f"op {op!r} is declared twice")
    if len({impl.name for impl in impls}) != len(impls) or not impls:
        raise ValueError(f"op {op!r} needs implementations with different names")
    _table[op] = impls


def ops() -> tuple[str, ...]:
    """Names of all declared ops."""
    return tuple(_table)


def implementations(op: str) -> tuple[Impl, ...]:
    """The implementations of an op, best first.

    Raises:
        KernelUnavailable: there is no such op.
    """
    if op not in _table:
        raise KernelUnavailable(f"kernels.{op} is not an op. Choose from: {', '.join(_table)}.")
    return _table[op]


def why_not(impl: Impl, device: torch.device, sizes: Mapping[str, int] | None = None) -> str | None:
    """Why an implementation cannot run on a device, on these sizes; None: it can."""
    if device.type not in impl.devices:
        return f"does not run on {device.type}"
    for key, most in impl.limits.items():
        if sizes and sizes[key] > most:
            return f"takes model.{key} of at most {most}, not {sizes[key]}"
    return impl.why_not(device)


def resolve(op: str, *, device: torch.device, impl: str = "auto", sizes: Mapping[str, int] | None = None) -> Any:
    """Import and return what runs an op: a function (for ``split_linear`` a set of functions).

    Args:
        op: name of the op.
        device: where its tensors will be.
        impl: ``auto`` (the first that can run here) or a name. A named one never falls back to another.
        sizes: what the model makes of keys of ``[model]`` that implementations may have limits on; None: not known.

    Raises:
        KernelUnavailable: no such op or implementation, or it cannot run here; the line lists the alternatives.
    """
    impls = implementations(op)
    reasons = {row.name: why_not(row, device, sizes) for row in impls}
    found = "; ".join(f"{name}: {reason or 'available'}" for name, reason in reasons.items())
    if impl != "auto" and impl not in reasons:
        raise KernelUnavailable(f"kernels.{op}={impl!r} is not an implementation. {found}.")
    wanted = _automatic(impls, device) if impl == "auto" else [row for row in impls if row.name == impl]
    picked = next((row for row in wanted if reasons[row.name] is None), None)
    if picked is None:
        raise KernelUnavailable(f"kernels.{op}={impl!r} cannot run on {device.type}. {found}.")
    _announce(op, picked.name, device.type)
    module, attribute = picked.target.split(":")
    return getattr(importlib.import_module(module), attribute)


def check(kernels: Mapping[str, str], device: torch.device) -> None:
    """Refuse an op or implementation of ``[kernels]`` that does not exist or cannot run on a device.

    Raises:
        KernelUnavailable: as ``resolve``.
    """
    for op, impl in kernels.items():
        resolve(op, device=device, impl=impl)


def rows(devices: tuple[torch.device, ...]) -> Iterator[Row]:
    """Every op x implementation x device, in the order of the table."""
    for op, impls in _table.items():
        for device in devices:
            reasons = [why_not(impl, device) for impl in impls]
            automatic = _automatic(impls, device)
            able = [impl for impl, reason in zip(impls, reasons, strict=True) if reason is None and impl in automatic]
            for impl, reason in zip(impls, reasons, strict=True):
                yield Row(op, impl.name, device.type, reason, chosen=impl in able[:1], note=impl.note)


def _automatic(impls: tuple[Impl, ...], device: torch.device) -> list[Impl]:
    return [impl for impl in impls if device.type not in impl.only_named]


@functools.cache
def _announce(op: str, impl: str, device: str) -> None:
    """Log a choice, once per process: a model has the same op in every layer."""
    _log.info("kernel %s -> %s on %s", op, impl, device)
