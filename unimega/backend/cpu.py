"""The backend without an accelerator: gloo, one generator, inert streams."""

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from typing_extensions import override

from unimega.backend.base import Backend, InertStream, host_tensor

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class CpuBackend(Backend):
    """Ranks are processes on one or more hosts; memory figures are those of the process."""

    name = "cpu"
    collective = "gloo"
    keeps_sent_tensors = False
    gemm_size = 1024

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    @override
    def select(self) -> None:
        pass

    @override
    def get_rng_state(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    @override
    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)

    @override
    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    @override
    def synchronize(self) -> None:
        pass

    @override
    def current_stream(self) -> InertStream:
        return InertStream()

    @override
    def new_stream(self) -> InertStream:
        return InertStream()

    @override
    def event(self) -> InertStream:
        return InertStream()

    @override
    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @override
    def memory_allocated(self) -> int:
        return int(psutil.Process().memory_info().rss)

    @override
    def memory_peak(self) -> int:
        if _STATUS.exists():  # Linux: the only figure that can be reset
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @override
    def reset_memory_peak(self) -> None:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")

    @override
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return None

    @override
    def to_tensor(self, array: np.ndarray) -> torch.Tensor:
        return host_tensor(array)
