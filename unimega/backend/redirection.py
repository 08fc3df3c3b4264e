"""What lets an unmodified megatron-core run off CUDA: the names of CUDA in its modules lead somewhere else.

The name ``torch`` inside ``megatron.core`` modules becomes a proxy whose factories and ``.cuda`` are replaced; torch
itself stays what it is for everyone else. Only four methods that are reached through a tensor or a module are replaced
globally, and they act only when megatron's code calls them. ``CPU_TABLE`` is the whole list, ``npu_table`` that for an
NPU. On CUDA none is installed.
"""

import contextlib
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from unimega.backend.base import InertStream
from unimega.backend.choice import current
from unimega.backend.import_hook import after_import
from unimega.backend.npu import NpuBackend
from unimega.backend.npu_redirection import npu_table
from unimega.backend.redirected import FACTORIES, MEGATRON, Row, as_it_is, factory, move, nothing, type_on_cuda
from unimega.errors import BackendError

SUPPORTED = "0.16"
CPU = torch.device("cpu")


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _false(*_: Any, **__: Any) -> bool:
    return False


def _stream(*_: Any, **__: Any) -> InertStream:
    return InertStream()


def _no_stream_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.default_generator.set_state(state)


def _manual_seed(seed: int) -> None:
    # torch.manual_seed would go on to torch.cuda.manual_seed_all.
    torch.default_generator.manual_seed(seed)


def _for_megatron(original: Callable[..., Any], redirected: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is ``redirected(original, self, ...)`` when a module of megatron calls it, else the original."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return redirected(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return method


def _itself(original: Callable[..., Any], subject: Any, *_: Any, **__: Any) -> Any:
    return subject


def _maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The original asks ``tensor.is_cuda`` first and forgets ``as_numpy`` for a tensor that is on the CPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _rng_is_not_split(record: logging.LogRecord) -> bool:
    """Keeps a record unless it complains that the host's generator moved with the device's: they are one."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


CPU_TABLE: tuple[Row, ...] = (
    Row("torch.cuda", "current_device", lambda: CPU),
    Row("torch.cuda", "is_available", _false),
    Row("torch.cuda", "device_count", lambda: 1),  # a divisor in places
    *(
        Row("torch.cuda", name, nothing)
        for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "ipc_collect")
    ),
    *(
        Row("torch.cuda", name, _zero)
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    ),
    Row("torch.cuda", "get_rng_state", _get_rng_state),
    Row("torch.cuda", "set_rng_state", _set_rng_state),
    Row("torch.cuda", "manual_seed", _manual_seed),
    Row("torch.cuda", "manual_seed_all", _manual_seed),
    Row("torch.cuda", "Stream", InertStream),
    Row("torch.cuda", "Event", InertStream),
    Row("torch.cuda", "current_stream", _stream),
    Row("torch.cuda", "default_stream", _stream),
    Row("torch.cuda", "stream", _no_stream_context),
    Row("torch.cuda", "is_current_stream_capturing", _false),
    Row("torch.cuda.nvtx", "range_push", nothing),
    Row("torch.cuda.nvtx", "range_pop", nothing),
    *(Row("torch", name, factory(getattr(torch, name), CPU)) for name in FACTORIES),
    Row("torch", "compile", as_it_is),
    Row("torch.Tensor", "to", move(CPU)),
    Row("torch.Tensor", "cuda", _itself),
    Row("torch.Tensor", "type", type_on_cuda),
    Row("torch.nn.Module", "cuda", _itself),
    Row(f"{MEGATRON}.jit", "jit_fuser", as_it_is),  # its body has taken torch.compile already
    Row(f"{MEGATRON}.tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
    Row(f"{MEGATRON}.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
    Row("logging", f"{MEGATRON}.tensor_parallel.random", _rng_is_not_split),
    Row(f"{MEGATRON}.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu", _maybe_move_tensor_to_cpu),
    Row(f"{MEGATRON}.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _maybe_move_tensor_to_cpu),
)
"""Every name that is redirected on CPU."""

GLOBAL = {"torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module}
PROXIED = ("torch", "torch.cuda", "torch.cuda.nvtx")

_installed: tuple[str, ...] = ()


def installed() -> tuple[str, ...]:
    """The names that are redirected in this process; empty on CUDA."""
    return _installed


def install() -> tuple[str, ...]:
    """Redirect the names, once, before anything imports megatron.

    Returns:
        The names; empty on CUDA.

    Raises:
        BackendError: another megatron-core than 0.16 is installed, or one was imported already.
    """
    global _installed
    _check_version()
    if _installed or current().name == "cuda":
        return _installed
    if early := [name for name in sys.modules if name == MEGATRON or name.startswith(f"{MEGATRON}.")]:
        raise BackendError(
            f"import of {early[0]!r} came before unimega.parallel: its modules hold CUDA names that cannot run on "
            f"{current().name!r}. Import unimega.parallel first."
        )
    here = current()
    table = npu_table(here.module, here.device) if isinstance(here, NpuBackend) else CPU_TABLE
    _apply(table)
    _installed = tuple(row.title for row in table)
    return _installed


def _check_version() -> None:
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise BackendError(
            f"megatron-core={version or 'none'!r} is installed and unimega needs >=0.16,<0.17, the one whose names "
            "it has been checked against. Run: pip install 'megatron-core>=0.16,<0.17'."
        )


class Proxy(ModuleType):
    """A module with some names replaced; the others are the original's, kept once they have been asked for.

    Keeping them matters: a module without the name takes 2 us to say so, as long as a small op.
    """

    def __init__(self, original: ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        self.__dict__[name] = value
        return value


def _apply(table: Sequence[Row]) -> None:
    proxy = _proxies(table)

    def rebind(module: ModuleType) -> None:
        for name, value in list(vars(module).items()):
            if value is torch:
                setattr(module, name, proxy)

    after_import(MEGATRON, rebind, below=True)
    for row in table:
        if row.where in GLOBAL:
            owner = GLOBAL[row.where]
            setattr(owner, row.name, _for_megatron(getattr(owner, row.name), row.new))
        elif row.where == "logging":
            logging.getLogger(row.name).addFilter(row.new)
        elif row.where not in PROXIED:
            after_import(row.where, functools.partial(_set, row=row))


def _set(module: ModuleType, *, row: Row) -> None:
    setattr(module, row.name, row.new)


def _proxies(table: Sequence[Row]) -> Proxy:
    """The proxy of torch, with those of its sub-modules in it."""
    proxy: Proxy | None = None
    for where in reversed(PROXIED):
        replaced = {row.name: row.new for row in table if row.where == where}
        if proxy is not None:
            replaced[proxy.__name__.rpartition(".")[2]] = proxy
        proxy = Proxy(sys.modules[where], replaced)
    assert proxy is not None
    return proxy
