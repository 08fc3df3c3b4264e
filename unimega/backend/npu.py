"""The backend of Ascend NPUs: torch-npu, hccl, one device per local rank. It has never run on hardware.

Without hardware, its tests hold every name of ``torch.npu`` here and in ``npu_redirection`` to torch-npu's own sources.
"""

import contextlib
import os
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from unimega.backend.base import Backend, host_tensor
from unimega.errors import BackendError, optional

PEAK_FLOPS = (("Ascend910B3", 313e12), ("Ascend910B4", 280e12), ("Ascend910_93", 376e12))
"""(start of the device's name, dense fp16 or bf16 FLOP/s that its maker published); a device of 910_93 is one die."""


class NpuBackend(Backend):
    """One NPU, number LOCAL_RANK of the host.

    Raises:
        UnimegaError: torch-npu is not installed, or CANN is not loaded.
    """

    name = "npu"
    collective = "hccl"
    keeps_sent_tensors = False  # nobody has seen that it does
    gemm_size = 8192
    note = "never run on hardware"

    def __init__(self) -> None:
        super().__init__()
        self.module: Any = optional("torch_npu", extra="npu").npu
        self.device = torch.device("npu", int(os.environ.get("LOCAL_RANK", "0")))

    @override
    def select(self) -> None:
        devices = self.module.device_count()
        if self.device.index >= devices:
            raise BackendError(
                f"LOCAL_RANK={self.device.index} has no NPU: this host shows {devices}. Start at most {devices} ranks "
                "on it (torchrun --nproc-per-node), or let ASCEND_RT_VISIBLE_DEVICES name more."
            )
        self.module.set_device(self.device)
        self.module.set_compile_mode(jit_compile=False)  # operators come compiled: lengths change with every batch
        self.module.config.allow_internal_format = False  # a weight in a private layout is not what a checkpoint holds

    @override
    def get_rng_state(self) -> torch.Tensor:
        return self.module.get_rng_state(self.device)

    @override
    def set_rng_state(self, state: torch.Tensor) -> None:
        self.module.set_rng_state(state, self.device)

    @override
    def seed(self, seed: int) -> None:
        with self.module.device(self.device):
            self.module.manual_seed(seed)

    @override
    def synchronize(self) -> None:
        self.module.synchronize(self.device)

    @override
    def current_stream(self) -> Any:
        return self.module.current_stream(self.device)

    @override
    def new_stream(self) -> Any:
        return self.module.Stream(self.device)

    @override
    def event(self) -> Any:
        return self.module.Event(enable_timing=True)

    @override
    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return self.module.stream(stream)

    @override
    def memory_allocated(self) -> int:
        return self.module.memory_allocated(self.device)

    @override
    def memory_peak(self) -> int:
        return self.module.max_memory_allocated(self.device)

    @override
    def reset_memory_peak(self) -> None:
        self.module.reset_peak_memory_stats(self.device)

    @override
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return None
        name = self.module.get_device_name(self.device)
        return next((rate for start, rate in PEAK_FLOPS if name.startswith(start)), None)

    @override
    def to_tensor(self, array: np.ndarray) -> torch.Tensor:
        return host_tensor(array).pin_memory().to(self.device, non_blocking=True)
