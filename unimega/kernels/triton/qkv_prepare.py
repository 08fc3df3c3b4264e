"""q/k norm, RoPE and the change of row order in one pass in Triton: a program takes whole tokens, all heads at once.

Programs walk tokens in modality order, so that each modality's launch has its own norm weights; rows of the attention
order are what is scattered (forward) and gathered (backward).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.kernels.triton.launch import Launch, power_of_2, programs

Weights = tuple[torch.Tensor, ...]


@triton.jit
def _inline_place(slot, PER_GROUP: tl.constexpr):
    """Columns of qkv hold, per KV group, its query heads, its key head, its value head."""
    group = slot // (PER_GROUP + 2)
    inside = slot % (PER_GROUP + 2)
    return inside < PER_GROUP, inside == PER_GROUP, group, group * PER_GROUP + inside


@triton.jit
def _inline_gains(q_weight, k_weight, is_q, is_k, column, real):
    """[heads, half] gains of the q and k norms; 1 where there is no norm."""
    gain = tl.where((is_q | is_k)[:, None] & real, 1.0, 1.0)
    if q_weight is not None:
        q_gain = tl.load(q_weight + column, mask=real, other=0.0).to(tl.float32)
        gain = tl.where(is_q[:, None], q_gain, gain)
    if k_weight is not None:
        k_gain = tl.load(k_weight + column, mask=real, other=0.0).to(tl.float32)
        gain = tl.where(is_k[:, None], k_gain, gain)
    return gain


@triton.jit
def _forward(
    qkv, q_weight, k_weight, cos, sin, inverse, q, k, v, start, eps,
    SLOTS: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
    HEADS_TILE: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    source = (start + tl.program_id(0)).to(tl.int64)
    row = source
    if inverse is not None:
        row = tl.load(inverse + source).to(tl.int64)
    slot = tl.arange(0, HEADS_TILE)
    column = tl.arange(0, HALF_TILE)[None, :]
    real = column < HALF
    inside = (slot < SLOTS)[:, None] & real
    is_q, is_k, group, head = _inline_place(slot, PER_GROUP)
    from_ = qkv + source * (SLOTS * 2 * HALF) + slot[:, None] * (2 * HALF) + column
    x1 = tl.load(from_, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(from_ + HALF, mask=inside, other=0.0).to(tl.float32)
    if (q_weight is not None) or (k_weight is not None):
        scale = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)
        normed = tl.zeros([HEADS_TILE], tl.int1)
        if q_weight is not None:
            normed = normed | is_q
        if k_weight is not None:
            normed = normed | is_k
        scale = tl.where(normed, scale, 1.0)[:, None]
        high_q = q_weight
        high_k = k_weight
        if q_weight is not None:
            high_q = q_weight + HALF
        if k_weight is not None:
            high_k = k_weight + HALF
        x1 *= scale * _inline_gains(q_weight, k_weight, is_q, is_k, column, real)
        x2 *= scale * _inline_gains(high_q, high_k, is_q, is_k, column, real)
    c = tl.load(cos + source * HALF + column, mask=real, other=0.0)
    s = tl.load(sin + source * HALF + column, mask=real, other=0.0)
    dtype = q.dtype.element_ty
    y1 = (x1 * c - x2 * s).to(dtype)
    y2 = (x2 * c + x1 * s).to(dtype)
    to_q = q + row * (GROUPS * PER_GROUP * 2 * HALF) + head[:, None] * (2 * HALF) + column
    to_k = k + row * (GROUPS * 2 * HALF) + group[:, None] * (2 * HALF) + column
    to_v = v + row * (GROUPS * 2 * HALF) + group[:, None] * (2 * HALF) + column
    tl.store(to_q, y1, mask=inside & is_q[:, None])
    tl.store(to_q + HALF, y2, mask=inside & is_q[:, None])
    tl.store(to_k, y1, mask=inside & is_k[:, None])
    tl.store(to_k + HALF, y2, mask=inside & is_k[:, None])
    is_v = inside & ~(is_q | is_k)[:, None]
    tl.store(to_v, x1.to(dtype), mask=is_v)
    tl.store(to_v + HALF, x2.to(dtype), mask=is_v)


@triton.jit
def _backward(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, inverse, d_qkv, d_weights, start, stop, eps,
    SLOTS: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
    HEADS_TILE: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, HEADS_TILE)
    column = tl.arange(0, HALF_TILE)[None, :]
    real = column < HALF
    inside = (slot < SLOTS)[:, None] & real
    is_q, is_k, group, head = _inline_place(slot, PER_GROUP)
    takes_q = inside & is_q[:, None]
    takes_k = inside & is_k[:, None]
    takes_v = inside & ~(is_q | is_k)[:, None]
    q1 = tl.zeros([HALF_TILE], tl.float32)
    q2 = tl.zeros([HALF_TILE], tl.float32)
    k1 = tl.zeros([HALF_TILE], tl.float32)
    k2 = tl.zeros([HALF_TILE], tl.float32)
    for token in range(start + tl.program_id(0), stop, tl.num_programs(0)):
        source = tl.program_id(0).to(tl.int64) * 0 + token
        row = source
        if inverse is not None:
            row = tl.load(inverse + source).to(tl.int64)
        from_q = dq + row * (GROUPS * PER_GROUP * 2 * HALF) + head[:, None] * (2 * HALF) + column
        from_k = dk + row * (GROUPS * 2 * HALF) + group[:, None] * (2 * HALF) + column
        from_v = dv + row * (GROUPS * 2 * HALF) + group[:, None] * (2 * HALF) + column
        y1 = tl.load(from_q, mask=takes_q, other=0.0).to(tl.float32)
        y1 += tl.load(from_k, mask=takes_k, other=0.0).to(tl.float32)
        y2 = tl.load(from_q + HALF, mask=takes_q, other=0.0).to(tl.float32)
        y2 += tl.load(from_k + HALF, mask=takes_k, other=0.0).to(tl.float32)
        c = tl.load(cos + source * HALF + column, mask=real, other=0.0)
        s = tl.load(sin + source * HALF + column, mask=real, other=0.0)
        g1 = y1 * c + y2 * s
        g2 = y2 * c - y1 * s
        to = source * (SLOTS * 2 * HALF) + slot[:, None] * (2 * HALF) + column
        if (q_weight is not None) or (k_weight is not None):
            x1 = tl.load(qkv + to, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(qkv + to + HALF, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)[:, None]
            x1 *= scale
            x2 *= scale
            normed = tl.zeros([HEADS_TILE], tl.int1)
            high_q = q_weight
            high_k = k_weight
            if q_weight is not None:
                normed = normed | is_q
                high_q = q_weight + HALF
                q1 += tl.sum(tl.where(takes_q, g1 * x1, 0.0), axis=0)
                q2 += tl.sum(tl.where(takes_q, g2 * x2, 0.0), axis=0)
            if k_weight is not None:
                normed = normed | is_k
                high_k = k_weight + HALF
                k1 += tl.sum(tl.where(takes_k, g1 * x1, 0.0), axis=0)
                k2 += tl.sum(tl.where(takes_k, g2 * x2, 0.0), axis=0)
            g1 *= _inline_gains(q_weight, k_weight, is_q, is_k, column, real)
            g2 *= _inline_gains(high_q, high_k, is_q, is_k, column, real)
            mean = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / (2 * HALF))[:, None]
            g1 = tl.where(normed[:, None], (g1 - x1 * mean) * scale, g1)
            g2 = tl.where(normed[:, None], (g2 - x2 * mean) * scale, g2)
        g1 += tl.load(from_v, mask=takes_v, other=0.0).to(tl.float32)
        g2 += tl.load(from_v + HALF, mask=takes_v, other=0.0).to(tl.float32)
        tl.store(d_qkv + to, g1.to(d_qkv.dtype.element_ty), mask=inside)
        tl.store(d_qkv + to + HALF, g2.to(d_qkv.dtype.element_ty), mask=inside)
    columns = tl.arange(0, HALF_TILE)
    own = d_weights + tl.program_id(0) * (4 * HALF) + columns
    tl.store(own, q1, mask=columns < HALF)
    tl.store(own + HALF, q2, mask=columns < HALF)
    tl.store(own + 2 * HALF, k1, mask=columns < HALF)
    tl.store(own + 3 * HALF, k2, mask=columns < HALF)


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
    """See ``unimega.kernels.qkv_prepare``."""
    q_weights, k_weights = q_weights or (), k_weights or ()
    sizes = (heads // kv_heads, kv_heads, cos.shape[-1], len(q_weights))
    inverse = None if rows is None else inverse
    return _QKVPrepare.apply(qkv, cos, sin, inverse, counts, sizes, eps, *q_weights, *k_weights)


class _QKVPrepare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        inverse: torch.Tensor | None,
        counts: tuple[int, ...],
        sizes: tuple[int, int, int, int],
        eps: float,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        per_group, groups, half, num_q = sizes
        qkv, cos, sin = qkv.contiguous(), cos.float().contiguous(), sin.float().contiguous()
        weights = tuple(weight.contiguous() for weight in weights)
        total = qkv.shape[0]
        q = qkv.new_empty(total, groups * per_group, 2 * half)
        k, v = (qkv.new_empty(total, groups, 2 * half) for _ in range(2))
        for start, stop, q_weight, k_weight in _runs(total, counts, weights[:num_q], weights[num_q:]):
            if start < stop:
                _forward[(stop - start,)](
                    qkv, q_weight, k_weight, cos, sin, inverse, q, k, v, start, eps, **_constants(*sizes[:3])
                )
        ctx.counts, ctx.sizes, ctx.eps = counts, sizes, eps
        ctx.save_for_backward(cos, sin, inverse, qkv if weights else None, *weights)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, inverse, qkv, *weights = ctx.saved_tensors
        per_group, groups, half, num_q = ctx.sizes
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
        total = dq.shape[0]
        d_qkv = dq.new_empty(total, groups * (per_group + 2) * 2 * half)
        sums: list[torch.Tensor] = []
        for start, stop, q_weight, k_weight in _runs(total, ctx.counts, weights[:num_q], weights[num_q:]):
            grid = min(programs(dq.device), stop - start)
            partial = dq.new_empty(grid, 2, 2 * half, dtype=torch.float32)
            if grid:
                _backward[(grid,)](
                    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, inverse, d_qkv, partial, start, stop, ctx.eps,
                    **_constants(*ctx.sizes[:3]),
                )  # fmt: skip
            sums.append(partial.sum(0))
        needs = ctx.needs_input_grad[7:]
        d_weights = _by_weight(sums, 0, weights[:num_q], needs[:num_q])
        d_weights += _by_weight(sums, 1, weights[num_q:], needs[num_q:])
        return d_qkv, None, None, None, None, None, None, *d_weights


def _by_weight(
    sums: list[torch.Tensor], which: int, weights: Sequence[torch.Tensor], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of one norm's weights from the sums [q or k, N] of each launch: one weight takes all launches."""
    if len(weights) == 1:
        return [torch.stack([s[which] for s in sums]).sum(0).to(weights[0].dtype) if needs[0] else None]
    rows = zip(weights, sums, needs, strict=True) if weights else ()
    return [s[which].to(weight.dtype) if needed else None for weight, s, needed in rows]


def _runs(
    total: int, counts: Sequence[int], q_weights: Sequence[torch.Tensor], k_weights: Sequence[torch.Tensor]
) -> Iterator[tuple[int, int, torch.Tensor | None, torch.Tensor | None]]:
    """(start, stop, q weight, k weight) of each launch: one, or one a modality where a norm is split."""
    split = max(len(q_weights), len(k_weights)) > 1
    start = 0
    for m, count in enumerate(counts if split else (total,)):
        both = (None if not w else w[m] if len(w) > 1 else w[0] for w in (q_weights, k_weights))
        yield start, start + count, *both  # type: ignore[misc]
        start += count


def _constants(per_group: int, groups: int, half: int) -> dict[str, int]:
    slots = groups * (per_group + 2)
    tiles = {"HEADS_TILE": power_of_2(slots), "HALF_TILE": power_of_2(half)}
    warps = 4 if tiles["HEADS_TILE"] * tiles["HALF_TILE"] <= 4096 else 8
    sizes = {"SLOTS": slots, "PER_GROUP": per_group, "GROUPS": groups, "HALF": half}
    return sizes | tiles | {"num_warps": warps}


def _launches() -> Iterator[Launch]:
    pointers = {name: "*bf16" for name in ("qkv", "q", "k", "v", "dq", "dk", "dv", "d_qkv")}
    pointers |= {"cos": "*fp32", "sin": "*fp32", "inverse": "*i32", "d_weights": "*fp32"}
    types = pointers | {"start": "i32", "stop": "i32", "eps": "fp32"}
    for name, heads, groups, half, norms in (
        ("16/2 heads of 128", 16, 2, 64, False),
        ("32/8 heads of 128", 32, 8, 64, True),
    ):
        constants: dict[str, Any] = _constants(heads // groups, groups, half)
        options = {"num_warps": constants.pop("num_warps")}
        weights = {"q_weight": "*bf16", "k_weight": "*bf16"} if norms else {}
        absent = {} if norms else {"q_weight": None, "k_weight": None}
        for part, kernel, unread in (
            ("forward", _forward, {}),
            ("backward", _backward, {} if norms else {"qkv": None}),
        ):
            yield Launch(
                f"qkv_prepare_{part} {name}{', norms' if norms else ''}", kernel, types | weights,
                constants | absent | unread, options=options,
            )  # fmt: skip


LAUNCHES = tuple(_launches())
