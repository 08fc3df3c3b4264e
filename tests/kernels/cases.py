"""Shapes on which every implementation of an op is tried, and the definitions it is held to.

A definition has the signature of its op and is written from the formula of the contract, not from the reference. In
fp64 it is the exact result; in the dtype of the inputs it is what plain torch makes of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tests.kernels import adamw_cases, moe_cases
from tests.kernels.case import Case, Tensors, noise, wide
from unimega.batch import Intervals
from unimega.kernels.split_linear import SplitLinear


def owner(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Number of each row's modality."""
    return torch.tensor([m for m, n in enumerate(counts) for _ in range(n)], dtype=torch.long, device=device)


def shuffled(total: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A gather of rows and its inverse."""
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    return rows.int().to(device), rows.argsort().int().to(device)


# rms_norm


def rms_norm(x: torch.Tensor, weights: Tensors, counts: Sequence[int], eps: float) -> torch.Tensor:
    scale = wide(torch.stack(tuple(weights)))[owner(counts, x.device)]
    return (wide(x) / (wide(x).pow(2).mean(1, keepdim=True) + eps).sqrt() * scale).to(x.dtype)


def rms_norm_case(name: str, counts: tuple[int, ...], width: int, **options: Any) -> Case:
    leaves = (noise(sum(counts), width), *(1 + 0.3 * noise(width, seed=m) for m in range(len(counts))))
    return Case(name, leaves, lambda op, t: (op(t[0], tuple(t[1:]), counts, 1e-5),), **options)


# add_rms_norm


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weights: Tensors, counts: Sequence[int], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (wide(x) + wide(residual)).to(x.dtype)
    return rms_norm(total, weights, counts, eps), total


def add_rms_norm_case(name: str, counts: tuple[int, ...], width: int, **options: Any) -> Case:
    weights = (1 + 0.3 * noise(width, seed=m) for m in range(len(counts)))
    leaves = (noise(sum(counts), width), noise(sum(counts), width, seed=5), *weights)
    return Case(name, leaves, lambda op, t: op(t[0], t[1], tuple(t[2:]), counts, 1e-5), **options)


# swiglu


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = wide(gate_up).split(gate_up.shape[1] // 2, dim=1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def swiglu_case(name: str, rows: int, width: int, **options: Any) -> Case:
    return Case(name, (3 * noise(rows, 2 * width),), lambda op, t: (op(t[0]),), **options)


# qkv_prepare


def qkv_prepare(
    qkv: torch.Tensor,
    q_weights: Tensors | None,
    k_weights: Tensors | None,
    counts: tuple[int, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    inverse: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    total, group = len(qkv), heads // kv_heads
    width = qkv.shape[1] // (heads + 2 * kv_heads)
    blocks = wide(qkv).reshape(total, kv_heads, group + 2, width)
    q = blocks[:, :, :group].reshape(total, heads, width)
    k, v = blocks[:, :, group], blocks[:, :, group + 1]

    def norm(x: torch.Tensor, weights: Tensors | None) -> torch.Tensor:
        if weights is None:
            return x
        which = owner(counts, x.device) if len(weights) > 1 else torch.zeros(total, dtype=torch.long, device=x.device)
        scale = wide(torch.stack(tuple(weights)))[which][:, None]
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale

    def rope(x: torch.Tensor) -> torch.Tensor:
        both_cos, both_sin = (torch.cat((t, t), dim=1)[:, None].to(x.dtype) for t in (cos, sin))
        turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * both_cos + turned * both_sin

    order = torch.arange(total, device=qkv.device) if rows is None else rows.long()
    return tuple(t[order].to(qkv.dtype) for t in (rope(norm(q, q_weights)), rope(norm(k, k_weights)), v))


def qkv_prepare_case(
    name: str,
    counts: tuple[int, ...],
    heads: int,
    kv_heads: int,
    width: int,
    *,
    q_norms: int = 0,
    k_norms: int = 0,
    reorder: bool = False,
    **options: Any,
) -> Case:
    total = sum(counts)
    weights = (1 + 0.3 * noise(width, seed=m) for m in range(q_norms + k_norms))
    leaves = (noise(total, (heads + 2 * kv_heads) * width), *weights)

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        angles = noise(total, width // 2).to(t[0].device).float()
        rows, inverse = shuffled(total, t[0].device) if reorder else (None, None)
        q_weights, k_weights = tuple(t[1 : 1 + q_norms]) or None, tuple(t[1 + q_norms :]) or None
        sizes = {"heads": heads, "kv_heads": kv_heads, "eps": 1e-5, "inverse": inverse}
        return op(t[0], q_weights, k_weights, counts, angles.cos(), angles.sin(), rows, **sizes)

    return Case(name, leaves, call, **options)


# attention


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
    total, heads, width = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    scores = wide(torch.einsum("qhn,khn->hqk", q, k)) * scale
    keys = torch.arange(total, device=q.device)
    seen = (keys >= intervals.lo[:, None]) & (keys < intervals.hi[:, None])
    chances = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(q.dtype)
    out = torch.einsum("hqk,khn->qhn", chances, v).reshape(total, heads * width)
    if rows is None:
        return out
    return torch.zeros_like(out).index_put((rows.long(),), out)


def on_device(intervals: Intervals, device: torch.device) -> Intervals:
    arrays = {name: torch.from_numpy(getattr(intervals, name)).to(device) for name in ("cu_seqlens", "lo", "hi")}
    return dataclasses.replace(intervals, **arrays)


def attention_case(
    name: str,
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    width: int,
    *,
    both_ways: Sequence[tuple[int, int]] = (),
    reorder: bool = False,
    **options: Any,
) -> Case:
    total = sum(lengths)
    leaves = tuple(noise(total, n, width, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    host = Intervals.of_runs(lengths, both_ways=both_ways)

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        rows, inverse = shuffled(total, t[0].device) if reorder else (None, None)
        intervals = on_device(host, t[0].device)
        return (op(t[0], t[1], t[2], intervals, scale=width**-0.5, rows=rows, inverse=inverse),)

    return Case(name, leaves, call, **options)


# split_linear


def _linear(
    x: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    weights: Tensors,
    biases: Sequence[torch.Tensor | None],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    parts = [F.linear(x[a:b], w, bias) for (a, b), w, bias in zip(spans, weights, biases, strict=True)]
    return torch.cat(parts) if out is None else out.copy_(torch.cat(parts))


def _linear_dx(
    dy: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    weights: Tensors,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    dx = torch.cat([dy[a:b] @ w for (a, b), w in zip(spans, weights, strict=True)])
    if out is None:
        return dx
    return out.add_(dx) if accumulate else out.copy_(dx)


split_linear = SplitLinear(
    _linear,
    _linear_dx,
    lambda dy, x, spans, needs: [torch.einsum("to,td->od", dy[a:b], x[a:b]) for a, b in spans],
    lambda dy, spans, needs: [dy[a:b].sum(dim=0) for a, b in spans],
)


def split_linear_case(
    name: str, sizes: tuple[int, ...], d_in: int, d_out: int, *, bias: bool = False, **options: Any
) -> Case:
    total, count = sum(sizes), len(sizes)
    spans = tuple((sum(sizes[:m]), sum(sizes[: m + 1])) for m in range(count))
    weights = (noise(d_out, d_in, seed=m) for m in range(count))
    leaves = (noise(total, d_in), noise(total, d_out), noise(total, d_in, seed=9), *weights)

    def call(op: SplitLinear, t: Tensors) -> Sequence[torch.Tensor]:
        x, dy, begun, *weights = (leaf.detach() for leaf in t)
        biases = [w[:, 0].contiguous() if bias else None for w in weights]
        y = op.forward(x, spans, weights, biases)
        buffer = op.forward(x, spans, weights, biases, torch.empty_like(y))
        dx = op.grad_input(dy, spans, weights)
        added = op.grad_input(dy, spans, weights, begun.clone(), accumulate=True)
        written = op.grad_input(dy, spans, weights, begun.clone())
        d_weights = op.grad_weight(dy, x, spans, (True,) * count)
        d_biases = op.grad_bias(dy, spans, (True,) * count)
        return (y, buffer, dx, added, written, *d_weights, *d_biases)  # type: ignore[arg-type]

    return Case(name, leaves, call, **options)


# linear_cross_entropy


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    group: None,
    vocab_start: int,
    vocab_rows: int,
    chunk: int | None = None,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = wide(x @ weight[: vocab_rows - vocab_start].T)
    ce = F.cross_entropy(logits, labels.long() - vocab_start, reduction="none")
    return (token_weights.to(ce.dtype) * (ce + z_loss * logits.logsumexp(1) ** 2)).sum(), ce.detach()


def linear_cross_entropy_case(
    name: str,
    rows: int,
    width: int,
    vocabulary: int,
    padding: int = 0,
    *,
    chunk: int | None = None,
    dtype: torch.dtype = torch.int32,
    z_loss: float = 0.0,
    first_labels: Sequence[int] = (),
    **options: Any,
) -> Case:
    leaves = (noise(rows, width), noise(vocabulary + padding, width))
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))
    labels[: len(first_labels)] = torch.tensor(first_labels)

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        own = labels.to(device=t[0].device, dtype=dtype)
        weights = noise(rows, 2, seed=1).abs().float().to(t[0].device)[:, 0]
        sizes = {"vocab_start": 0, "vocab_rows": vocabulary, "chunk": chunk, "z_loss": z_loss}
        return op(t[0], t[1], own, weights, group=None, **sizes)

    return Case(name, leaves, call, **options)


DEFINITIONS: dict[str, Any] = {
    "adamw": adamw_cases.AdamW,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "swiglu": swiglu,
    "qkv_prepare": qkv_prepare,
    "attention": attention,
    "split_linear": split_linear,
    "linear_cross_entropy": linear_cross_entropy,
    **moe_cases.DEFINITIONS,
}

CASES: dict[str, tuple[Case, ...]] = {
    "adamw": adamw_cases.CASES,
    "rms_norm": (
        rms_norm_case("one row", (1,), 7),
        rms_norm_case("one weight", (33,), 64),
        rms_norm_case("empty modality", (4, 0, 3), 41),
        rms_norm_case("first empty", (0, 5), 130),
        rms_norm_case("strided", (9, 7), 41, strided=True),
        rms_norm_case("no rows", (0,), 8),
    ),
    "add_rms_norm": (
        add_rms_norm_case("one row", (1,), 7),
        add_rms_norm_case("one weight", (33,), 64),
        add_rms_norm_case("empty modality", (4, 0, 3), 41),
        add_rms_norm_case("strided", (9, 7), 41, strided=True),
        add_rms_norm_case("no rows", (0,), 8),
    ),
    "swiglu": (
        swiglu_case("one row", 1, 1),
        swiglu_case("odd", 9, 41),
        swiglu_case("even", 33, 64),
        swiglu_case("strided", 7, 41, strided=True),
        swiglu_case("several blocks", 3, 2**15 + 1),
        swiglu_case("no rows", 0, 8),
    ),
    "qkv_prepare": (
        qkv_prepare_case("one row", (1,), 1, 1, 2),
        qkv_prepare_case("groups", (7,), 4, 2, 6, reorder=True),
        qkv_prepare_case("one weight each", (5, 4), 6, 3, 10, q_norms=1, k_norms=1),
        qkv_prepare_case("empty modality", (4, 0, 9), 4, 2, 10, q_norms=3, k_norms=3, reorder=True),
        qkv_prepare_case("all heads alike", (8, 3), 3, 3, 16, q_norms=2, k_norms=2, reorder=True),
        qkv_prepare_case("norm of k alone", (3, 4), 6, 2, 6, k_norms=2, reorder=True),
        qkv_prepare_case("strided", (5, 4), 4, 2, 6, q_norms=2, k_norms=2, reorder=True, strided=True),
        qkv_prepare_case("strided, no norm", (5, 4), 4, 2, 6, strided=True),
    ),
    "attention": (
        attention_case("one row", (1,), 1, 1, 2),
        attention_case("one run", (21,), 4, 4, 8),
        attention_case("equal runs", (7, 7, 7), 4, 2, 5, reorder=True),
        attention_case("short runs", (2, 17, 3, 18, 1, 16), 6, 2, 8, reorder=True),
        attention_case("short and long", (3, 90, 5, 88, 1, 2), 4, 1, 16, reorder=True),
        attention_case("long runs", (100, 60, 7), 2, 2, 8),
        attention_case("strided", (5, 9, 8), 4, 2, 6, reorder=True, strided=True),
        attention_case("both ways", (10, 9, 3), 4, 2, 8, both_ways=((2, 6), (12, 19)), reorder=True),
        attention_case("all both ways", (13,), 2, 2, 7, both_ways=((0, 13),)),
        attention_case("empty runs", (0, 5, 0, 3), 4, 2, 8, reorder=True),
        attention_case("no rows", (0,), 4, 2, 8),
        attention_case("no runs", (), 2, 2, 8, both_ways=(), reorder=True),
        attention_case("no rows, both ways", (0, 0), 2, 1, 8, both_ways=((0, 0),)),
    ),
    "split_linear": (
        split_linear_case("one row", (1,), 3, 5),
        split_linear_case("one weight", (33,), 40, 24, bias=True),
        split_linear_case("empty modality", (4, 0, 3), 17, 9),
        split_linear_case("empty modality, bias", (0, 5, 8), 17, 9, bias=True),
        split_linear_case("strided", (9, 7), 17, 9, bias=True, strided=True),
    ),
    "linear_cross_entropy": (
        linear_cross_entropy_case("one row", 1, 3, 5),
        linear_cross_entropy_case("one chunk", 13, 24, 57),
        linear_cross_entropy_case("chunks", 13, 24, 57, chunk=4),
        linear_cross_entropy_case("padded vocabulary", 9, 17, 41, 7, chunk=5),
        linear_cross_entropy_case("z loss", 13, 24, 57, 3, chunk=5, z_loss=0.03),
        linear_cross_entropy_case("int64 labels", 9, 17, 41, 7, dtype=torch.int64),
        linear_cross_entropy_case("strided", 9, 17, 41, 7, strided=True, chunk=4),
        linear_cross_entropy_case("slices", 24, 16, 4200, 3, chunk=20, first_labels=(0, 4095, 4096, 4199, 1)),
        linear_cross_entropy_case("no rows", 0, 8, 11, 1),
    ),
    **moe_cases.CASES,
}
