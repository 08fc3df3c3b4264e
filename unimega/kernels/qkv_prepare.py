"""From the output of the qkv linear to what attention wants: q/k norm, RoPE and the change of row order, in one pass.

``qkv_prepare(qkv, q_weights, k_weights, counts, cos, sin, rows, *, heads, kv_heads, eps, inverse) -> q, k, v``

qkv: [T, (h + 2k) N] in modality order; columns per KV group: its h/k query heads, its key head, its value head, each N.
q_weights, k_weights: None, or one weight for all rows, or M weights, each [N] and the same for all heads.
counts: M host ints that sum to T; weights of length 1 cover all rows whatever ``counts`` is.
cos, sin: [T, N/2] fp32 of each row's position, in modality order.
rows: int [T] or None; inverse: its inverse permutation, always with it.
q: [T, h, N], k, v: [T, k, N], contiguous, dtype of qkv, row i being row ``rows[i]`` of qkv (row i without ``rows``).

Per head: ``u = x / sqrt(mean(x^2) + eps) * weight`` (u = x without weights; never for v), then with the halves u1 | u2:
``y = [u1 cos - u2 sin | u2 cos + u1 sin]``. Gradients: the inverse rotation, then that of the norm (``rms_norm``).
A modality without rows gives its weights a gradient of zeros.

The math is in fp32 (fp64 for fp64), one rounding at the end. Saved for backward: cos, sin, inverse, and with a norm qkv
and 1/rms per head (fp32). Bytes, forward: 2 T (h + 2k) N itemsize; backward 2 x that, 3 x with norms.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega.kernels import registry
from unimega.kernels.precision import widen
from unimega.kernels.rms_norm import inverse_rms

Weights = tuple[torch.Tensor, ...]


def reference(
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
    """See the module: the definition in plain torch."""
    q_weights, k_weights = q_weights or (), k_weights or ()
    shape = (heads // kv_heads, kv_heads, cos.shape[-1] * 2, len(q_weights), len(k_weights))
    return _QKVPrepare.apply(qkv, cos, sin, rows, inverse, counts, shape, eps, *q_weights, *k_weights)


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
        shape: tuple[int, int, int, int, int],
        eps: float,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        per_group, groups, width, num_q, _ = shape
        total = qkv.shape[0]
        packed = qkv.reshape(total, groups, per_group + 2, width)
        cos, sin = (t.to(packed.dtype if packed.dtype == torch.float64 else torch.float32) for t in (cos, sin))
        wide = widen(packed[:, :, : per_group + 1])
        rstds: list[torch.Tensor] = []
        if weights:
            wide = wide.clone() if wide.dtype == qkv.dtype else wide
            for part, own in ((wide[:, :, :per_group], weights[:num_q]), (wide[:, :, per_group:], weights[num_q:])):
                if own:
                    rstds.append(inverse_rms(part, eps))
                    part.mul_(rstds[-1])
                    for piece, weight in zip(_by_modality(part, own, counts), own, strict=True):
                        piece.mul_(weight)
        ctx.shape, ctx.counts = shape, counts
        ctx.has_rows = rows is not None
        saved = (cos, sin, *((inverse,) if rows is not None else ()), *((qkv,) if weights else ()), *rstds, *weights)
        ctx.save_for_backward(*saved)
        q = torch.empty(total, groups, per_group, width, dtype=wide.dtype, device=wide.device)
        k = torch.empty(total, groups, 1, width, dtype=wide.dtype, device=wide.device)
        _rotate(wide[:, :, :per_group], cos, sin, out=q)
        _rotate(wide[:, :, per_group:], cos, sin, out=k)
        q, k = (_reorder(x.flatten(1, 2), rows).to(qkv.dtype) for x in (q, k))
        v = _reorder(packed[:, :, per_group + 1], rows)
        return q, k, v.clone(memory_format=torch.contiguous_format) if rows is None else v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        per_group, groups, width, num_q, num_k = ctx.shape
        saved = list(ctx.saved_tensors)
        cos, sin = saved.pop(0), saved.pop(0)
        inverse = saved.pop(0) if ctx.has_rows else None
        total = dq.shape[0]
        grad = torch.empty(total, groups, per_group + 2, width, dtype=cos.dtype, device=dq.device)
        dq, dk, dv = (_reorder(t, inverse).unflatten(1, (groups, -1)) for t in (dq, dk, dv))
        _rotate(dq.to(grad.dtype), cos, -sin, out=grad[:, :, :per_group])
        _rotate(dk.to(grad.dtype), cos, -sin, out=grad[:, :, per_group : per_group + 1])
        grad[:, :, per_group + 1 :] = dv
        d_weights: list[torch.Tensor | None] = []
        if num_q or num_k:
            qkv = saved.pop(0)
            packed = qkv.reshape(total, groups, per_group + 2, width)
            rstds, weights = saved[: bool(num_q) + bool(num_k)], saved[bool(num_q) + bool(num_k) :]
            needs = ctx.needs_input_grad[8:]
            for low, high, first, last in ((0, per_group, 0, num_q), (per_group, per_group + 1, num_q, num_q + num_k)):
                if first < last:
                    d_weights += _norm_backward(
                        grad[:, :, low:high], packed[:, :, low:high], rstds.pop(0), weights[first:last], ctx.counts,
                        needs[first:last],
                    )  # fmt: skip
        d_qkv = grad.flatten(1).to(dq.dtype) if ctx.needs_input_grad[0] else None
        return d_qkv, None, None, None, None, None, None, None, *d_weights


def _norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weights: list[torch.Tensor],
    counts: tuple[int, ...],
    needs: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """Turn ``grad`` [T, groups, heads, N] from that of the norm's output into that of its input, in place."""
    normed = widen(x) * rstd
    d_weights: list[torch.Tensor | None] = []
    pieces = zip(_by_modality(grad, weights, counts), _by_modality(normed, weights, counts), strict=True)
    for (grad_piece, normed_piece), weight, needed in zip(pieces, weights, needs, strict=True):
        d_weights.append((grad_piece * normed_piece).sum((0, 1, 2)).to(weight.dtype) if needed else None)
        grad_piece.mul_(weight)
    mean = (grad * normed).mean(-1, keepdim=True)
    grad.addcmul_(normed, mean, value=-1).mul_(rstd)
    return d_weights


def _by_modality(
    x: torch.Tensor, weights: tuple[torch.Tensor, ...] | list[torch.Tensor], counts: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    return x.split(counts) if len(weights) > 1 else (x,)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write RoPE of x [T, groups, heads, N] by angles [T, N/2] to ``out``."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, None], sin[:, None, None]
    x1, x2, y1, y2 = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)


def _reorder(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x.index_select(0, rows)


registry.declare(
    "qkv_prepare",
    registry.triton("qkv_prepare:qkv_prepare"),
    registry.npu("qkv_prepare:qkv_prepare", "npu_rms_norm", "npu_rms_norm_backward", "npu_rotary_mul"),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
