"""Top-k routing and the order of slots by expert in Triton: one launch, and three; no sort and no atomics."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.topk_routing import check
from unimega.kernels.triton.launch import Launch, cdiv, power_of_2, tile

FORWARD, BACKWARD = 2048, 1024
"""Scores that a program of the routing takes at a time; with 2048 the backward spills on sm_90."""
SLOTS = 256
"""Slots that a program of the order takes."""
SLAB = 8192
"""Counts that the running sum takes at a time."""
TAKEN_KEY = tl.constexpr(-(2**31))
"""Below the key of every number."""


@triton.jit
def _inline_ordered(x):
    """fp32 as int32 of the same order; -0 as 0. No NaN is the key of what is taken, or a token has an expert twice."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), TAKEN_KEY + 1)


@triton.jit
def _inline_best(keys, column, LEAST: tl.constexpr):
    """The first column of the largest key of each row, and the keys without it."""
    last = column.shape[0]
    best = tl.max(keys, axis=1)
    at = tl.min(tl.where(keys == best[:, None], column[None, :], last), axis=1)
    return at, tl.where(column[None, :] == at[:, None], LEAST, keys)


@triton.jit
def _inline_scores(logits, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = powers / tl.sum(powers, axis=1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    return scores


@triton.jit
def _inline_limit_groups(
    keys, column, group, GROUPS: tl.constexpr, GROUP_TOPK: tl.constexpr, GROUP_COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Keys, -inf outside of the best groups of each row."""
    number = tl.arange(0, GROUP_COLUMNS)
    low = tl.full([keys.shape[0], keys.shape[1]], float("-inf"), tl.float32)
    worth = tl.full([keys.shape[0], GROUP_COLUMNS], TAKEN_KEY, tl.int32)
    for g in range(GROUPS):
        inside = tl.where((group == g)[None, :], keys, low)
        value = tl.max(inside, axis=1)
        if not SOFTMAX:
            at = tl.min(tl.where((inside == value[:, None]) & (group == g)[None, :], column[None, :], 1 << 30), axis=1)
            second = tl.max(tl.where(column[None, :] == at[:, None], low, inside), axis=1)
            size = tl.sum((group == g).to(tl.int32), axis=0)
            value = tl.where(size > 1, value + second, value)
        worth = tl.where((number == g)[None, :], _inline_ordered(value)[:, None], worth)
    is_open = tl.zeros([keys.shape[0], keys.shape[1]], tl.int32)
    for _ in range(GROUP_TOPK):
        at, worth = _inline_best(worth, number, TAKEN_KEY)
        is_open = is_open | (group[None, :] == at[:, None]).to(tl.int32)
    return tl.where(is_open != 0, keys, low)


@triton.jit
def _route(
    logits, bias, weights, chosen, total, rows, experts, scale,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr, GROUP_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SLOT_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = column < experts
    inside = (row < rows)[:, None] & real[None, :]
    source = logits + row.to(tl.int64)[:, None] * experts + column[None, :]
    value = tl.load(source, mask=inside, other=float("-inf")).to(tl.float32)
    value = tl.where((row < rows)[:, None], value, 0.0)
    scores = _inline_scores(value, SOFTMAX)
    # Softmax keeps the order of its logits, and rounds neighbours of them together.
    keys = value
    if BIASED:
        keys = scores + tl.load(bias + column, mask=real, other=0.0)[None, :]
    elif not SOFTMAX:
        keys = scores
    keys = tl.where(value == float("-inf"), float("-inf"), keys)
    if GROUPS > 1:
        group = column // (experts // GROUPS)
        keys = _inline_limit_groups(keys, column, group, GROUPS, GROUP_TOPK, GROUP_COLUMNS, SOFTMAX)
    left = tl.where(real[None, :], _inline_ordered(keys), TAKEN_KEY)
    slot = tl.arange(0, SLOT_COLUMNS)
    found = tl.zeros([ROWS, SLOT_COLUMNS], tl.int32)
    share = tl.zeros([ROWS, SLOT_COLUMNS], tl.float32)
    for j in range(K):
        at, left = _inline_best(left, column, TAKEN_KEY)
        own = tl.sum(tl.where(column[None, :] == at[:, None], scores, 0.0), axis=1)
        found = tl.where((slot == j)[None, :], at[:, None], found)
        share = tl.where((slot == j)[None, :], own[:, None], share)
    if NORMALIZE:
        amount = tl.sum(share, axis=1)
        share = share / (amount if SOFTMAX else amount + 1e-20)[:, None]
    pad = (row >= rows)[:, None]
    target = row.to(tl.int64)[:, None] * K + slot[None, :]
    kept = (row < total)[:, None] & (slot < K)[None, :]
    tl.store(weights + target, tl.where(pad, 0.0, share * scale), mask=kept)
    tl.store(chosen + target, tl.where(pad, experts, found), mask=kept)


@triton.jit
def _route_backward(
    d_weights, logits, chosen, d_logits, total, rows, experts, scale,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    own = row < rows
    place = row.to(tl.int64)[:, None] * experts + column[None, :]
    value = tl.load(logits + place, mask=own[:, None] & (column < experts)[None, :], other=float("-inf"))
    value = tl.where(own[:, None], value.to(tl.float32), 0.0)
    scores = _inline_scores(value, SOFTMAX)
    grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    picked = tl.zeros([ROWS, COLUMNS], tl.int32)
    for j in range(K):
        slot = row.to(tl.int64) * K + j
        hit = tl.load(chosen + slot, mask=own, other=-1)[:, None] == column[None, :]
        d = tl.load(d_weights + slot, mask=own, other=0.0).to(tl.float32)
        grad = tl.where(hit, d[:, None], grad)
        picked = tl.where(hit, 1, picked)
    if NORMALIZE:
        amount = tl.sum(tl.where(picked != 0, scores, 0.0), axis=1)
        if not SOFTMAX:
            amount += 1e-20
        amount = tl.where(own, amount, 1.0)
        mean = tl.sum(grad * scores, axis=1) / amount
        grad = tl.where(picked != 0, (grad - mean[:, None]) / amount[:, None], 0.0)
    grad = scores * (grad - tl.sum(grad * scores, axis=1)[:, None]) if SOFTMAX else grad * scores * (1.0 - scores)
    grad = tl.where(own[:, None], grad * scale, 0.0)
    inside = (row < total)[:, None] & (column < experts)[None, :]
    tl.store(d_logits + place, grad.to(d_logits.dtype.element_ty), mask=inside)


@triton.jit
def _inline_ids(chosen, slot, slots, experts, COLUMNS: tl.constexpr):
    """Expert of each slot; ``experts``: none; ``COLUMNS - 1``: there is no such slot."""
    ids = tl.load(chosen + slot, mask=slot < slots, other=0)
    ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
    return tl.where(slot < slots, ids, COLUMNS - 1)


@triton.jit
def _count(chosen, counts, slots, experts, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.program_id(0)
    ids = _inline_ids(chosen, block * SIZE + tl.arange(0, SIZE), slots, experts, COLUMNS)
    tl.store(counts + block * COLUMNS + tl.arange(0, COLUMNS), tl.histogram(ids, COLUMNS))


@triton.jit
def _scan(counts, offsets, blocks, experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Counts [blocks, COLUMNS] become the sums over earlier blocks; offsets are those over earlier experts."""
    column = tl.arange(0, COLUMNS)
    before = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        place = counts + row[:, None] * COLUMNS + column[None, :]
        own = tl.load(place, mask=(row < blocks)[:, None], other=0)
        tl.store(place, before[None, :] + tl.cumsum(own, axis=0) - own, mask=(row < blocks)[:, None])
        before += tl.sum(own, axis=0)
    tl.store(offsets + column, tl.cumsum(before, axis=0) - before, mask=column <= experts)


@triton.jit
def _place(
    chosen, counts, offsets, places, source, slots, experts,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = block * SIZE + tl.arange(0, SIZE)
    ids = _inline_ids(chosen, slot, slots, experts, COLUMNS)
    rank = tl.zeros([SIZE], tl.int32)
    for first in range(0, SIZE, CHUNK):
        other = block * SIZE + first + tl.arange(0, CHUNK)
        same = ids[:, None] == _inline_ids(chosen, other, slots, experts, COLUMNS)[None, :]
        rank += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), axis=1)
    real = slot < slots
    row = (
        rank + tl.load(offsets + ids, mask=real, other=0) + tl.load(counts + block * COLUMNS + ids, mask=real, other=0)
    )
    tl.store(places + slot, row, mask=real)
    tl.store(source + row, slot, mask=real)


def topk_routing(
    logits: torch.Tensor,
    *,
    k: int,
    score: str = "softmax",
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    group_topk: int = 1,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``unimega.kernels.topk_routing``."""
    check(logits, k, score, groups, group_topk)
    rows = len(logits) if rows is None else rows
    how = {"K": k, "SOFTMAX": score == "softmax", "NORMALIZE": normalize}
    return _Routing.apply(logits, bias, how, scale, groups, group_topk, rows)


def route(logits: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor, ExpertOrder]:
    """See ``unimega.kernels.route``. Four launches."""
    weights, experts = topk_routing(logits, **how)
    return weights, experts, expert_order(experts, logits.shape[1])


def expert_order(experts: torch.Tensor, num_experts: int) -> ExpertOrder:
    """See ``unimega.kernels.expert_order``."""
    experts = experts.contiguous()
    slots, columns = experts.numel(), _columns(num_experts)
    blocks = cdiv(slots, SLOTS)
    offsets, counts = experts.new_empty(num_experts + 1), experts.new_empty(blocks, columns)
    place, source = torch.empty_like(experts), experts.new_empty(slots)
    if slots:
        _count[(blocks,)](experts, counts, slots, num_experts, SIZE=SLOTS, COLUMNS=columns, num_warps=4)
    rows = max(1, SLAB // columns)
    _scan[(1,)](counts, offsets, blocks, num_experts, ROWS=rows, COLUMNS=columns, num_warps=8)
    if slots:
        _place[(blocks,)](
            experts, counts, offsets, place, source, slots, num_experts, SIZE=SLOTS, CHUNK=32, COLUMNS=columns,
            num_warps=8,
        )  # fmt: skip
    return ExpertOrder(offsets, place, source)


def _columns(experts: int) -> int:
    """Experts, none, and a column for what lies behind the last slot."""
    return power_of_2(experts + 2)


class _Routing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        how: dict[str, Any],
        scale: float,
        groups: int,
        group_topk: int,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.contiguous()
        total, experts = logits.shape
        weights = logits.new_empty(total, how["K"], dtype=torch.float32)
        chosen = logits.new_empty(total, how["K"], dtype=torch.int32)
        if total:
            step, columns = tile(experts, max(FORWARD, power_of_2(experts)))
            _route[(cdiv(total, step),)](
                logits, None if bias is None else bias.float().contiguous(), weights, chosen, total, rows, experts,
                scale, **how, BIASED=bias is not None, GROUPS=groups, GROUP_TOPK=group_topk,
                GROUP_COLUMNS=power_of_2(groups), ROWS=step, COLUMNS=columns, SLOT_COLUMNS=power_of_2(how["K"]),
                num_warps=4,
            )  # fmt: skip
        ctx.how, ctx.scale, ctx.rows = how, scale, rows
        ctx.save_for_backward(logits, chosen)
        ctx.mark_non_differentiable(chosen)
        return weights, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, chosen = ctx.saved_tensors
        total, experts = logits.shape
        d_logits = torch.empty_like(logits)
        if total:
            step, columns = tile(experts, max(BACKWARD, power_of_2(experts)))
            _route_backward[(cdiv(total, step),)](
                d_weights.contiguous(), logits, chosen, d_logits, total, ctx.rows, experts, ctx.scale, **ctx.how,
                ROWS=step, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
        return d_logits, None, None, None, None, None, None


def _launches() -> tuple[Launch, ...]:
    sizes = {"total": "i32", "rows": "i32", "experts": "i32", "scale": "fp32"}
    found = []
    for experts, k, softmax, groups, group_topk in ((64, 8, True, 1, 1), (128, 8, True, 1, 1), (256, 8, False, 8, 4)):
        how = {"K": k, "SOFTMAX": softmax, "NORMALIZE": True}
        forward, backward = (
            dict(zip(("ROWS", "COLUMNS"), tile(experts, size), strict=True)) for size in (FORWARD, BACKWARD)
        )
        kind = "softmax" if softmax else f"sigmoid, {groups} groups"
        bias = {"bias": None} if softmax else {}
        types = {"logits": "*fp32", "bias": "*fp32", "weights": "*fp32", "chosen": "*i32", "d_weights": "*fp32"}
        types |= {"d_logits": "*fp32"} | sizes
        limits = {"GROUPS": groups, "GROUP_TOPK": group_topk, "GROUP_COLUMNS": power_of_2(groups)}
        own = {"BIASED": not softmax, "SLOT_COLUMNS": power_of_2(k)} | limits | bias
        aligned, options = frozenset({"experts"}), {"num_warps": 4}
        found.append(Launch(f"route E {experts} K {k} {kind}", _route, types, how | own | forward, aligned, options))
        found.append(
            Launch(f"route_backward E {experts} K {k} {kind}", _route_backward, types, how | backward, aligned, options)
        )
    types = dict.fromkeys(("chosen", "counts", "offsets", "places", "source"), "*i32")
    types |= dict.fromkeys(("slots", "experts", "blocks"), "i32")
    for experts in (64, 128, 512):
        columns = _columns(experts)
        block = {"SIZE": SLOTS, "COLUMNS": columns}
        rows = {"ROWS": max(1, SLAB // columns), "COLUMNS": columns}
        found.append(Launch(f"order_count E {experts}", _count, types, block, options={"num_warps": 4}))
        found.append(Launch(f"order_scan E {experts}", _scan, types, rows, options={"num_warps": 8}))
        found.append(Launch(f"order_place E {experts}", _place, types, block | {"CHUNK": 32}, options={"num_warps": 8}))
    return tuple(found)


LAUNCHES = _launches()
