"""What stands for CUDA's names in ``redirection`` on an NPU: the names of its CPU list, with ``torch.npu`` behind.

It has never run on hardware.
"""

from collections.abc import Callable
from typing import Any

import torch

from unimega.backend.redirected import (
    FACTORIES,
    MEGATRON,
    Row,
    as_it_is,
    factory,
    move,
    nothing,
    type_on_cuda,
)

SAME = (
    "is_available",
    "device_count",
    "synchronize",
    "empty_cache",
    "set_device",
    "reset_peak_memory_stats",
    "ipc_collect",
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "manual_seed",
    "manual_seed_all",
    "Stream",
    "Event",
    "current_stream",
    "default_stream",
    "stream",
    "is_current_stream_capturing",
)
"""Names that mean the same in ``torch.cuda`` and in ``torch.npu``."""


def npu_table(npu: Any, device: torch.device) -> tuple[Row, ...]:
    """Every name that is redirected on an NPU.

    Args:
        npu: the module ``torch.npu``.
        device: this process's device.
    """

    def get_rng_state(*_: Any, clone: bool = False, **__: Any) -> torch.Tensor:
        state = npu.get_rng_state(device)
        return state.clone() if clone else state

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        npu.set_rng_state(state, device)

    def move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # As the original, which asks ``tensor.is_cuda``. Its callers wait for the copy before they read.
        if not torch.is_tensor(tensor):
            return tensor
        host = tensor.to("cpu", non_blocking=True)
        if record_stream and tensor.device.type == device.type:
            tensor.record_stream(npu.current_stream())
        return host.numpy() if as_numpy else host

    def to_device(original: Callable[..., Any], subject: Any, *_: Any, **__: Any) -> Any:
        return subject.to(device)

    return (
        Row("torch.cuda", "current_device", lambda: device),
        *(Row("torch.cuda", name, getattr(npu, name)) for name in SAME),
        Row("torch.cuda", "get_rng_state", get_rng_state),
        Row("torch.cuda", "set_rng_state", set_rng_state),
        Row("torch.cuda.nvtx", "range_push", nothing),
        Row("torch.cuda.nvtx", "range_pop", nothing),
        *(Row("torch", name, factory(getattr(torch, name), device)) for name in FACTORIES),
        Row("torch", "compile", as_it_is),
        Row("torch.Tensor", "to", move(device)),
        Row("torch.Tensor", "cuda", to_device),
        Row("torch.Tensor", "type", type_on_cuda),
        Row("torch.nn.Module", "cuda", to_device),
        Row(f"{MEGATRON}.jit", "jit_fuser", as_it_is),
        Row(f"{MEGATRON}.tensor_parallel.random", "_get_cuda_rng_state", get_rng_state),
        Row(f"{MEGATRON}.tensor_parallel.random", "_set_cuda_rng_state", set_rng_state),
        Row(f"{MEGATRON}.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu", move_to_host),
        Row(f"{MEGATRON}.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", move_to_host),
    )
