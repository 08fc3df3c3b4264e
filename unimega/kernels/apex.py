"""Rows that call Apex on CUDA: the RMS norm, and weight gradients that are added to main grads by the GEMM itself.

Never run on a GPU by us; the tests hold the arguments of the calls to Apex's signatures and to megatron-core's use.
"""

import torch

from unimega.errors import optional
from unimega.kernels import split_linear as definition


def rms_norm(x: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...], eps: float) -> torch.Tensor:
    """See ``unimega.kernels.rms_norm``: a call for each modality, which Apex knows nothing of, then one copy."""
    norm = optional("apex.normalization.fused_layer_norm", extra="apex").fused_rms_norm_affine
    parts = zip(x.contiguous().split(counts), weights, strict=True)
    normed = [norm(part, weight, weight.shape, eps) if len(part) else part * weight for part, weight in parts]
    return normed[0] if len(normed) == 1 else torch.cat(normed)


def _accumulate_weight(dy: torch.Tensor, x: torch.Tensor, main_grad: torch.Tensor) -> None:
    # Apex takes raw pointers: rows must follow each other.
    extension = optional("fused_weight_gradient_mlp_cuda", extra="apex")
    extension.wgrad_gemm_accum_fp32(x.contiguous(), dy.contiguous(), main_grad)


split_linear = definition.accumulating(_accumulate_weight)
"""See ``unimega.kernels.split_linear``."""
