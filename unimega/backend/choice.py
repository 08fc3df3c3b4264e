"""Which backend this process runs on: what torch sees, or what code asked for before anyone looked."""

import importlib.util
from collections.abc import Callable

import torch

from unimega.backend.base import Backend
from unimega.backend.cpu import CpuBackend
from unimega.backend.cuda import CudaBackend
from unimega.backend.npu import NpuBackend
from unimega.errors import BackendError, optional

BACKENDS: dict[str, Callable[[], Backend]] = {"cpu": CpuBackend, "cuda": CudaBackend, "npu": NpuBackend}

_chosen: Backend | None = None


def current() -> Backend:
    """The backend of this process. The first call decides it; environment variables do not.

    Raises:
        UnimegaError: torch-npu is installed and cannot be imported, for want of CANN.
    """
    return _chosen if _chosen is not None else use(_seen())


def use(name: str) -> Backend:
    """Choose the backend; for tests and tools, before anything has asked for ``current()``.

    Raises:
        BackendError: there is no such backend, or another one has been chosen already.
    """
    global _chosen
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r} is not known. There are {', '.join(BACKENDS)}.")
    if _chosen is None:
        _chosen = BACKENDS[name]()
    if _chosen.name != name:
        raise BackendError(
            f"backend={name!r} comes too late: this process runs on {_chosen.name!r}. "
            "Call unimega.backend.use before importing unimega.parallel."
        )
    return _chosen


def _seen() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if importlib.util.find_spec("torch_npu") is not None:
        npu = optional("torch_npu", extra="npu").npu
        return "npu" if npu.is_available() else "cpu"
    return "cpu"
