"""RMS norm and SwiGLU by torch-npu's ``npu_rms_norm`` and ``npu_swiglu``; see ``kernels.rms_norm``, ``kernels.swiglu``.

Slices without rows take ops of torch: the documentation is silent about them, and their gradient must be zeros.
"""

import torch


def rms_norm(x: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...], eps: float) -> torch.Tensor:
    """See ``kernels.rms_norm``. One call per modality; weights of another dtype are rounded to that of x."""
    parts = [_norm(part, weight, eps) for part, weight in zip(x.split(counts), weights, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.add_rms_norm``. Two passes: ``npu_add_rms_norm`` has no derivative."""
    total = x + residual
    return rms_norm(total, weights, counts, eps), total


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``kernels.swiglu``."""
    if gate_up.shape[0] == 0:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * up
    return torch.ops.npu.npu_swiglu(gate_up, dim=-1)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    weight = weight.to(x.dtype)
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0] if x.shape[0] else x * weight
