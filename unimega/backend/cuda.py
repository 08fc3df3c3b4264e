"""The backend of NVIDIA GPUs: nccl, one device per local rank. Nothing of megatron-core is redirected here."""

import contextlib
import os
import re
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from unimega.backend.base import Backend, host_tensor
from unimega.errors import BackendError

PEAK_FLOPS = (
    ("GB300", 2.5e15),
    ("B300", 2.25e15),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)
"""(name in the device's name, dense bf16 or fp16 FLOP/s of its data sheet); the first match counts."""


class CudaBackend(Backend):
    """One GPU, number LOCAL_RANK of the host."""

    name = "cuda"
    collective = "nccl"
    keeps_sent_tensors = True
    runs_apex = True
    gemm_size = 8192

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        # With more queues the order in which kernels start is free, and megatron-core's overlap relies on it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    @override
    def select(self) -> None:
        devices = torch.cuda.device_count()
        if self.device.index >= devices:
            raise BackendError(
                f"LOCAL_RANK={self.device.index} has no GPU: this host shows {devices}. Start at most {devices} ranks "
                "on it (torchrun --nproc-per-node), or let CUDA_VISIBLE_DEVICES name more."
            )
        torch.cuda.set_device(self.device)

    @override
    def get_rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.device)

    @override
    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)

    @override
    def seed(self, seed: int) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.manual_seed(seed)

    @override
    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    @override
    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    @override
    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @override
    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    @override
    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    @override
    def memory_allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @override
    def memory_peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    @override
    def reset_memory_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    @override
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((rate for part, rate in PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)

    @override
    def to_tensor(self, array: np.ndarray) -> torch.Tensor:
        # The caching host allocator gives the pinned block out again only when the copy has ended.
        return host_tensor(array).pin_memory().to(self.device, non_blocking=True)
