"""q/k norm and RoPE by torch-npu's ``npu_rms_norm`` and ``npu_rotary_mul``; see ``kernels.qkv_prepare``.

Both run in fp32, so that a result is rounded once, and their gradients are called by name: torch-npu's own would keep
every intermediate in fp32.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

Weights = tuple[torch.Tensor, ...]


def qkv_prepare(
    qkv: torch.Tensor,
    q_weights: Weights | None,
    k_weights: Weights | None,
    counts: tuple[int, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    inverse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``kernels.qkv_prepare``. Fewer than 1000 heads, heads narrower than 896."""
    q_weights, k_weights = q_weights or (), k_weights or ()
    whole = (torch.cat((t, t), dim=-1)[None, :, None].float() for t in (cos, sin))  # [1, T, 1, N]
    shape = (heads // kv_heads, kv_heads, cos.shape[-1] * 2, len(q_weights))
    return _QKVPrepare.apply(qkv, *whole, rows, inverse, counts, shape, eps, *q_weights, *k_weights)


class _QKVPrepare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: torch.Tensor | None,
        inverse: torch.Tensor | None,
        counts: tuple[int, ...],
        shape: tuple[int, int, int, int],
        eps: float,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_q = shape[3]
        *parts, v = _heads(qkv, shape)
        made, rstds = [], []
        for part, own in zip(parts, (weights[:num_q], weights[num_q:]), strict=True):
            normed, rstd = _norm(part.float(), own, counts, eps)
            made.append(_reorder(_rotate(normed, cos, sin), rows).to(qkv.dtype))
            rstds.append(rstd)
        ctx.counts, ctx.shape = counts, shape
        ctx.save_for_backward(cos, sin, inverse, qkv if weights else None, *rstds, *weights)
        return made[0], made[1], v.contiguous() if rows is None else _reorder(v, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, inverse, qkv, q_rstd, k_rstd, *weights = ctx.saved_tensors
        _, groups, width, num_q = ctx.shape
        parts = _heads(qkv, ctx.shape) if weights else (dq, dk)  # without a norm nothing reads them
        grads, d_weights = [], []
        for grad, part, rstd, own in (
            (dq, parts[0], q_rstd, weights[:num_q]),
            (dk, parts[1], k_rstd, weights[num_q:]),
        ):
            grad = _rotate(_reorder(grad, inverse).float(), cos, -sin)
            if own:
                grad, d_own = _norm_backward(grad, part.float(), own, ctx.counts, rstd)
                d_weights += d_own
            grads.append(grad.view(grad.shape[0], groups, -1, width).to(dv.dtype))
        grads.append(_reorder(dv, inverse)[:, :, None])
        needed = (d if needs else None for d, needs in zip(d_weights, ctx.needs_input_grad[8:], strict=True))
        return torch.cat(grads, dim=2).flatten(1), None, None, None, None, None, None, None, *needed


def _heads(qkv: torch.Tensor, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, h, N], k and v [T, k, N] in the columns of qkv."""
    per_group, groups, width, _ = shape
    packed = qkv.reshape(qkv.shape[0], groups, per_group + 2, width)
    return packed[:, :, :per_group].flatten(1, 2), packed[:, :, per_group], packed[:, :, per_group + 1]


def _norm(
    x: torch.Tensor, weights: Weights, counts: tuple[int, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Norm of x [T, heads, N] in fp32, and 1/rms [T, heads, 1]; x itself without weights."""
    if not weights:
        return x, None
    pieces = [
        torch.ops.npu.npu_rms_norm(piece, weight.float(), epsilon=eps)
        for piece, weight in zip(_split(x, weights, counts), weights, strict=True)
        if piece.shape[0]
    ]
    y, rstd = (torch.cat(both) for both in zip(*pieces, strict=True))
    return y, rstd


def _norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weights: Weights, counts: tuple[int, ...], rstd: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradient of x, and of the weights: zeros where a modality has no rows."""
    dxs, d_weights = [], []
    pieces = (_split(t, weights, counts) for t in (dy, x, rstd))
    for weight, dy_piece, x_piece, rstd_piece in zip(weights, *pieces, strict=True):
        if not x_piece.shape[0]:
            d_weights.append(torch.zeros_like(weight))
            continue
        dx, d_weight = torch.ops.npu.npu_rms_norm_backward(dy_piece, x_piece, weight.float(), rstd_piece)
        dxs.append(dx)
        d_weights.append(d_weight.to(weight.dtype))
    return torch.cat(dxs), d_weights


def _split(x: torch.Tensor, weights: Weights, counts: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return x.split(counts) if len(weights) > 1 else (x,)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [T, heads, N], by halves."""
    return torch.ops.npu.npu_rotary_mul(x[None], cos, sin)[0]


def _reorder(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x.index_select(0, rows)
