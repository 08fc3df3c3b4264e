"""Rows of tokens into expert-major order, and the weighted sum back: two ops, each the other's gradient.

``permute(x, order) -> [N, D]``, row r is ``x[order.source[r] // k]``
``unpermute(y, weights, order) -> [t, D]``, row i is ``sum_j weights[i, j] y[order.place[i, j]]``

x: [t, D], y: [N, D], one dtype in and out. weights: [t, k] fp32, or None: 1. order: of ``expert_order``.
Slots without an expert: ``permute`` gives zeros in their rows (from offsets[E] on); ``unpermute`` leaves their rows
out, whatever these hold, and their weights have gradient 0.

``unpermute`` sums in fp32 (fp64 for fp64), slot by slot, and rounds once. Gradients: of x the sum over its rows; of y
``weights[i, j] dout[i]``; of weights ``<dout[i], y[place[i, j]]>`` in fp32. No atomics: a call repeats bit for bit.
Saved for backward: ``unpermute`` keeps y and weights if weights need a gradient, else the weights alone.
Bytes: (N + t) D itemsize each way.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega.kernels import registry
from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.precision import widen


def permute(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """See the module: the definition in plain torch."""
    return _Permute.apply(x, order)


def unpermute(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """See the module: the definition in plain torch."""
    return _Unpermute.apply(y, weights, order)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        ctx.order = order
        return spread(x, None, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather(dy, None, ctx.order), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
        ctx.order = order
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights)
        return gather(y, weights, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, weights = ctx.saved_tensors
        order = ctx.order
        dy = spread(dout, weights, order) if ctx.needs_input_grad[0] else None
        return dy, None if y is None else weight_grad(dout, y, order).to(weights.dtype), None


def weight_grad(dout: torch.Tensor, y: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """``<dout[i], y[place[i, j]]>``, [t, k] in fp32."""
    return torch.einsum("tkd,td->tk", _slots(y, order), widen(dout))


def _slots(y: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Rows of y by slot, [t, k, D] in fp32; zeros for slots without an expert."""
    place = order.place
    rows = y.index_select(0, place.reshape(-1)).view(*place.shape, y.shape[1])
    return widen(rows).masked_fill((place >= order.offsets[-1])[..., None], 0.0)


def gather(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """``unpermute`` without autograd."""
    slots = _slots(y, order)
    if weights is not None:
        slots.mul_(weights[..., None])
    return slots.sum(dim=1).to(y.dtype)


def spread(x: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """Row of the token of each slot in expert-major order, times the slot's weight."""
    source = order.source
    rows = x.index_select(0, source // order.place.shape[1])
    if weights is not None:
        rows = (widen(rows) * weights.reshape(-1).index_select(0, source)[:, None]).to(x.dtype)
    behind = torch.arange(len(source), device=source.device) >= order.offsets[-1]
    return rows.masked_fill_(behind[:, None], 0.0)


registry.declare(
    "permute",
    registry.triton("permute:permute"),
    registry.Impl("cpu", "unimega.kernels.cpu:permute", frozenset({"cpu"})),
    registry.npu("experts:permute", "npu_moe_token_permute"),
    registry.Impl("reference", f"{__name__}:permute", registry.EVERYWHERE),
)
registry.declare(
    "unpermute",
    registry.triton("permute:unpermute"),
    registry.Impl("cpu", "unimega.kernels.cpu:unpermute", frozenset({"cpu"})),
    registry.npu("experts:unpermute", "npu_moe_token_unpermute"),
    registry.Impl("reference", f"{__name__}:unpermute", registry.EVERYWHERE),
)
