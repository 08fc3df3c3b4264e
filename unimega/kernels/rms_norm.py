"""RMS norm with one weight, or one per modality: ``y_i = x_i / sqrt(mean(x_i^2) + eps) * weight_m``.

``rms_norm(x, weights, counts, eps) -> y``

x, y: [t, D], any float dtype; the rows of modality m are the m-th run of ``counts[m]`` rows.
weights: M tensors [D]; a shared norm passes one weight and ``counts=(t,)``.
counts: M host ints that sum to t. A modality without rows gets a gradient of zeros.
Gradients, with r = 1 / sqrt(mean(x^2) + eps), x^ = x r and g = dy weight: ``dx = r (g - x^ mean(g x^))``,
``dweight_m = sum over its rows of dy x^``. A weight that needs none gets none.

The math is in fp32 (fp64 for fp64), one rounding at the end of each result. Saved for backward: x and r [t, 1] fp32.
Bytes, forward: 2 t D itemsize; backward: 3 t D itemsize.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega.kernels import availability, registry
from unimega.kernels.precision import widen


def reference(x: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...], eps: float) -> torch.Tensor:
    """See the module: the definition in plain torch."""
    return _RMSNorm.apply(x, counts, eps, *weights)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: tuple[int, ...], eps: float, *weights: torch.Tensor) -> torch.Tensor:
        wide = widen(x)
        rstd = inverse_rms(wide, eps)
        y = wide * rstd
        for part, weight in zip(y.split(counts), weights, strict=True):
            part.mul_(weight)
        ctx.counts = counts
        ctx.save_for_backward(x, rstd, *weights)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, *weights = ctx.saved_tensors
        normed = widen(x) * rstd
        wide_dy = widen(dy)
        product = wide_dy * normed
        d_weights = tuple(
            part.sum(0).to(weight.dtype) if needed else None
            for part, weight, needed in zip(product.split(ctx.counts), weights, ctx.needs_input_grad[3:], strict=True)
        )
        if not ctx.needs_input_grad[0]:
            return None, None, None, *d_weights
        dx = torch.empty_like(product)
        mean = torch.empty_like(rstd)
        parts = (t.split(ctx.counts) for t in (wide_dy, product, dx, mean))
        for weight, dy_part, product_part, dx_part, mean_part in zip(weights, *parts, strict=True):
            wide_weight = widen(weight)
            torch.mul(dy_part, wide_weight, out=dx_part)
            torch.mv(product_part, wide_weight, out=mean_part.squeeze(1))
        dx.addcmul_(normed, mean, value=-1 / x.shape[-1]).mul_(rstd)
        return dx.to(x.dtype), None, None, *d_weights


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dim, which is kept with size 1."""
    return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


registry.declare(
    "rms_norm",
    registry.triton("rms_norm:rms_norm"),
    registry.npu("elementwise:rms_norm", "npu_rms_norm"),
    registry.Impl(
        "apex",
        "unimega.kernels.apex:rms_norm",
        frozenset({"cuda"}),
        availability.packages("apex"),
        only_named=frozenset({"cuda"}),  # a launch for each modality, and a copy
        note="never run on hardware",
    ),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
