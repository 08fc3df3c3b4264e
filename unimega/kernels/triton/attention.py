"""Attention over intervals in Triton, FlashAttention-2's recurrences (arXiv:2307.08691) over keys [lo, hi).

Both bounds never fall, so a tile of queries sees one range of keys, whose middle needs no mask, and a tile of keys is
seen by one range of queries. Outputs and their gradients are written and read through ``rows``, so that they are in
modality order without a pass of their own. A tile of keys adds up its whole group of query heads: no atomics.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.batch import Intervals
from unimega.kernels.triton.launch import Launch, capability, cdiv, power_of_2

_LOG2E = 1.4426950408889634


@triton.jit
def _inline_rows(rows, place, real):
    """Where rows of the attention order lie in modality order."""
    if rows is None:
        return place.to(tl.int64)
    return tl.load(rows + place, mask=real, other=0).to(tl.int64)


@triton.jit
def _inline_attend(
    q, k, v, low, high, top, total, out, start, stop, count, stride, scale, width,
    MASK: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take keys start .. stop into the running softmax (top, total, out) of a tile of queries."""
    column = tl.arange(0, WIDTH)
    for first in range(start, stop, KEYS):
        key = first + tl.arange(0, KEYS)
        inside = (key < count)[:, None] & (column < width)[None, :]
        place = key.to(tl.int64)[:, None] * stride + column[None, :]
        keys = tl.load(k + place, mask=inside, other=0.0)
        scores = tl.dot(q, keys.T, input_precision=PRECISION) * scale
        if MASK:
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            scores = tl.where(seen, scores, -1.0e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        chances = tl.exp2(scores - higher[:, None])
        if MASK:
            chances = tl.where(seen, chances, 0.0)  # not by the score: one that is no number has to be seen
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(chances, 1)
        values = tl.load(v + place, mask=inside, other=0.0)
        out = out * shrink[:, None] + tl.dot(chances.to(values.dtype), values, input_precision=PRECISION)
        top = higher
    return top, total, out


@triton.jit
def _forward(
    q, k, v, out, lse, lo, hi, rows, count, width, scale, HEADS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the last tiles of a causal run are the longest
    head = tl.program_id(1)
    row = first + tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)
    real = row < count
    inside = real[:, None] & (column < width)[None, :]
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * (HEADS * width) + head * width + column[None, :], mask=inside, other=0.0
    )
    low = tl.load(lo + row, mask=real, other=0)
    high = tl.load(hi + row, mask=real, other=0)
    last = tl.minimum(first + QUERIES, count) - 1
    start = tl.load(lo + first)
    stop = tl.load(hi + last)
    whole = start + (tl.load(lo + last) - start + KEYS - 1) // KEYS * KEYS
    whole_stop = whole + tl.maximum(tl.load(hi + first) - whole, 0) // KEYS * KEYS
    if first + QUERIES > count:  # rows past the end see nothing: mask them
        whole_stop = whole
    stride = HEADS // GROUP * width
    k += head // GROUP * width
    v += head // GROUP * width
    top = tl.full([QUERIES], -1.0e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    top, total, result = _inline_attend(
        queries, k, v, low, high, top, total, result, start, whole, count, stride, scale, width,
        True, KEYS, WIDTH, PRECISION,
    )  # fmt: skip
    top, total, result = _inline_attend(
        queries, k, v, low, high, top, total, result, whole, whole_stop, count, stride, scale, width,
        False, KEYS, WIDTH, PRECISION,
    )  # fmt: skip
    top, total, result = _inline_attend(
        queries, k, v, low, high, top, total, result, whole_stop, stop, count, stride, scale, width,
        True, KEYS, WIDTH, PRECISION,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    place = _inline_rows(rows, row, real)
    tl.store(
        out + place[:, None] * (HEADS * width) + head * width + column[None, :],
        (result / total[:, None]).to(out.dtype.element_ty),
        mask=inside,
    )
    tl.store(lse + head.to(tl.int64) * count + row, top + tl.log2(total), mask=real)


@triton.jit
def _delta(out, d_out, delta, rows, count, width, HEADS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of out d_out over a head, in attention order: what the softmax takes off every score's gradient."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    real = row < count
    inside = real[:, None] & (column < width)[None, :]
    place = _inline_rows(rows, row, real)[:, None] * (HEADS * width) + head * width + column[None, :]
    a = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * count + row, tl.sum(a * b, 1), mask=real)


@triton.jit
def _backward_keys(
    q, k, v, d_out, lse, delta, lo, hi, rows, seen_from, seen_to, dk, dv, count, width, scale, scale2,
    HEADS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    key = tile * KEYS + tl.arange(0, KEYS)
    column = tl.arange(0, WIDTH)
    inside = (key < count)[:, None] & (column < width)[None, :]
    own = key.to(tl.int64)[:, None] * (HEADS // GROUP * width) + kv_head * width + column[None, :]
    keys = tl.load(k + own, mask=inside, other=0.0)
    values = tl.load(v + own, mask=inside, other=0.0)
    d_keys = tl.zeros([KEYS, WIDTH], tl.float32)
    d_values = tl.zeros([KEYS, WIDTH], tl.float32)
    start = tl.load(seen_from + tile)
    stop = tl.load(seen_to + tile)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        statistics = head.to(tl.int64) * count
        for first in range(start, stop, QUERIES):
            row = first + tl.arange(0, QUERIES)
            real = row < count
            within = real[:, None] & (column < width)[None, :]
            places = row.to(tl.int64)[:, None] * (HEADS * width) + head * width + column[None, :]
            queries = tl.load(q + places, mask=within, other=0.0)
            low = tl.load(lo + row, mask=real, other=0)
            high = tl.load(hi + row, mask=real, other=0)
            level = tl.load(lse + statistics + row, mask=real, other=0.0)
            scores = tl.dot(keys, queries.T, input_precision=PRECISION) * scale2
            seen = (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
            chances = tl.where(seen, tl.exp2(scores - level[None, :]), 0.0)
            there = _inline_rows(rows, row, real)[:, None] * (HEADS * width) + head * width + column[None, :]
            d = tl.load(d_out + there, mask=within, other=0.0)
            d_values += tl.dot(chances.to(d.dtype), d, input_precision=PRECISION)
            off = tl.load(delta + statistics + row, mask=real, other=0.0)
            d_scores = chances * (tl.dot(values, d.T, input_precision=PRECISION) - off[None, :])
            d_keys += tl.dot(d_scores.to(queries.dtype), queries, input_precision=PRECISION)
    tl.store(dk + own, (d_keys * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + own, d_values.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _backward_queries(
    q, k, v, d_out, lse, delta, lo, hi, rows, dq, count, width, scale, scale2,
    HEADS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1)
    row = first + tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)
    real = row < count
    inside = real[:, None] & (column < width)[None, :]
    own = row.to(tl.int64)[:, None] * (HEADS * width) + head * width + column[None, :]
    queries = tl.load(q + own, mask=inside, other=0.0)
    there = _inline_rows(rows, row, real)[:, None] * (HEADS * width) + head * width + column[None, :]
    d = tl.load(d_out + there, mask=inside, other=0.0)
    low = tl.load(lo + row, mask=real, other=0)
    high = tl.load(hi + row, mask=real, other=0)
    statistics = head.to(tl.int64) * count + row
    level = tl.load(lse + statistics, mask=real, other=0.0)
    off = tl.load(delta + statistics, mask=real, other=0.0)
    stride = HEADS // GROUP * width
    k += head // GROUP * width
    v += head // GROUP * width
    d_queries = tl.zeros([QUERIES, WIDTH], tl.float32)
    stop = tl.load(hi + tl.minimum(first + QUERIES, count) - 1)
    for key_first in range(tl.load(lo + first), stop, KEYS):
        key = key_first + tl.arange(0, KEYS)
        within = (key < count)[:, None] & (column < width)[None, :]
        place = key.to(tl.int64)[:, None] * stride + column[None, :]
        keys = tl.load(k + place, mask=within, other=0.0)
        values = tl.load(v + place, mask=within, other=0.0)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION) * scale2
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        chances = tl.where(seen, tl.exp2(scores - level[:, None]), 0.0)
        d_scores = chances * (tl.dot(d, values.T, input_precision=PRECISION) - off[:, None])
        d_queries += tl.dot(d_scores.to(keys.dtype), keys, input_precision=PRECISION)
    tl.store(dq + own, (d_queries * scale).to(dq.dtype.element_ty), mask=inside)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    scale: float,
    rows: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    """See ``unimega.kernels.attention``."""
    return _Attention.apply(q, k, v, intervals.lo, intervals.hi, rows, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lo: torch.Tensor,
        hi: torch.Tensor,
        rows: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        count, heads, width = q.shape
        out = q.new_empty(count, heads * width)
        lse = q.new_empty(heads, count, dtype=torch.float32)
        tiles = _tiles("forward", q.dtype, width, capability(q.device))
        _forward[(cdiv(count, tiles["QUERIES"]), heads)](
            q, k, v, out, lse, lo, hi, rows, count, width, scale * _LOG2E,
            HEADS=heads, GROUP=heads // k.shape[1], **tiles,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, lo, hi, rows)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, lo, hi, rows = ctx.saved_tensors
        count, heads, width = q.shape
        d_out = d_out.contiguous()
        shape = {"HEADS": heads, "GROUP": heads // k.shape[1]}
        scales = (ctx.scale, ctx.scale * _LOG2E)
        delta = torch.empty_like(lse)
        tiles = _tiles("delta", q.dtype, width, capability(q.device))
        _delta[(cdiv(count, tiles["QUERIES"]), heads)](out, d_out, delta, rows, count, width, HEADS=heads, **tiles)
        tiles = _tiles("backward_keys", q.dtype, width, capability(q.device))
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        borders = torch.arange(0, count + tiles["KEYS"], tiles["KEYS"], dtype=torch.int32, device=q.device)
        seen_from = torch.searchsorted(hi, borders[:-1], right=True, out_int32=True)
        seen_to = torch.searchsorted(lo, borders[1:], out_int32=True)
        _backward_keys[(cdiv(count, tiles["KEYS"]), k.shape[1])](
            q,
            k,
            v,
            d_out,
            lse,
            delta,
            lo,
            hi,
            rows,
            seen_from,
            seen_to,
            dk,
            dv,
            count,
            width,
            *scales,
            **shape,
            **tiles,
        )
        tiles = _tiles("backward_queries", q.dtype, width, capability(q.device))
        dq = torch.empty_like(q)
        _backward_queries[(cdiv(count, tiles["QUERIES"]), heads)](
            q, k, v, d_out, lse, delta, lo, hi, rows, dq, count, width, *scales, **shape, **tiles
        )
        return dq, dk, dv, None, None, None, None


_TILES = {  # (part, head width, before sm_90): queries, keys, warps, stages; the largest that spill nothing
    ("forward", 64, True): (128, 64, 8, 3),
    ("forward", 64, False): (128, 64, 8, 3),
    ("forward", 128, True): (128, 32, 8, 2),
    ("forward", 128, False): (128, 64, 8, 2),
    ("forward", 256, True): (64, 32, 8, 1),
    ("forward", 256, False): (64, 32, 8, 1),
    ("backward_keys", 64, True): (64, 64, 8, 2),
    ("backward_keys", 64, False): (64, 64, 4, 2),
    ("backward_keys", 128, True): (32, 64, 8, 2),
    ("backward_keys", 128, False): (64, 64, 8, 2),
    ("backward_keys", 256, True): (32, 32, 8, 1),
    ("backward_keys", 256, False): (32, 32, 8, 1),
    ("backward_queries", 64, True): (128, 64, 8, 3),
    ("backward_queries", 64, False): (128, 64, 8, 3),
    ("backward_queries", 128, True): (64, 64, 8, 2),
    ("backward_queries", 128, False): (128, 64, 8, 2),
    ("backward_queries", 256, True): (32, 32, 4, 1),
    ("backward_queries", 256, False): (32, 32, 4, 1),
}


def _tiles(part: str, dtype: torch.dtype, width: int, target: int) -> dict[str, Any]:
    """Sizes of tiles, warps and stages (docs/kernel_resources.md has what they take)."""
    columns = max(16, power_of_2(width))
    if part == "delta":
        return {"QUERIES": 64, "WIDTH": columns, "num_warps": 4}
    if dtype == torch.float32:  # products of fp32 without TF32 keep no tensor core busy: small tiles
        queries, keys, warps, stages = 32, 32, 4, 1
    else:
        queries, keys, warps, stages = _TILES[part, min(max(columns, 64), 256), target < 90]
    precision = "ieee" if dtype == torch.float32 else "tf32"
    sizes = {"QUERIES": queries, "KEYS": keys, "WIDTH": columns, "PRECISION": precision}
    return sizes | {"num_warps": warps, "num_stages": stages}


def _launches() -> Iterator[Launch]:
    types = {name: "*bf16" for name in ("q", "k", "v", "out", "d_out", "dk", "dv", "dq")}
    types |= {name: "*fp32" for name in ("lse", "delta")} | {"scale": "fp32", "scale2": "fp32"}
    types |= {name: "*i32" for name in ("lo", "hi", "rows", "seen_from", "seen_to")} | {"count": "i32", "width": "i32"}
    kernels = {
        "forward": _forward,
        "delta": _delta,
        "backward_keys": _backward_keys,
        "backward_queries": _backward_queries,
    }
    for width, target, part in itertools.product((64, 128, 256), (80, 90), kernels):
        tiles = _tiles(part, torch.bfloat16, width, target)
        options: dict[str, int] = {key: tiles.pop(key) for key in ("num_warps", "num_stages") if key in tiles}
        constants = tiles | {"HEADS": 16} | ({"GROUP": 2} if part != "delta" else {})
        yield Launch(
            f"attention_{part} N {width}", kernels[part], types, constants, frozenset({"width"}), options, (target,)
        )


LAUNCHES = tuple(_launches())
