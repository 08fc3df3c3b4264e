"""Residual sum and the RMS norm of it: ``total = x + residual``, ``y = rms_norm(total)``.

``add_rms_norm(x, residual, weights, counts, eps) -> y, total``

x, residual, y, total: [t, D], one float dtype. weights, counts, eps: as in ``rms_norm``.
The sum is rounded to the dtype before it is normalised: what the layer adds to later is what was normalised here.
Gradients: ``dtotal = d_total + gradient of the norm``, one tensor for x and residual; dweight_m as in ``rms_norm``.

Saved for backward: total and 1/rms [t, 1] fp32. Bytes, forward: 4 t D itemsize; backward: 4 t D itemsize.
"""

import torch

from unimega.kernels import registry
from unimega.kernels.rms_norm import reference as rms_norm


def reference(
    x: torch.Tensor, residual: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module: the definition in plain torch."""
    total = x + residual
    return rms_norm(total, weights, counts, eps), total


registry.declare(
    "add_rms_norm",
    registry.triton("rms_norm:add_rms_norm"),
    registry.npu("elementwise:add_rms_norm", "npu_rms_norm"),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
