"""Attention over intervals of keys: query i sees keys ``lo[i] <= j < hi[i]``; softmax over them, times v.

``attention(q, k, v, intervals, *, scale, rows, inverse) -> out``

q: [T, h, N], k, v: [T, k, N] in attention order, one dtype; query head i uses key head ``i // (h / k)``.
intervals: ``unimega.batch.Intervals`` of those rows. Runs never see each other; ``lengths`` are host ints.
rows, inverse: None, or the gather that ``qkv_prepare`` made and its inverse permutation, int [T].
out: [T, h N], ``out[rows[i]] = softmax(scale q_i k^T) v`` (row i without ``rows``): in modality order again.
Gradients reach q, k, v. A run's result does not depend on what other runs contain, bit for bit, as long as that is
finite: a tile of a fused kernel holds keys of several runs, and 0 times NaN is NaN.

Scores and softmax are in fp32 (fp64 for fp64); the probabilities may be rounded to the dtype of v before the second
product, as flash attention does; the output is rounded once. Saved for backward: q, k, v, out, one number per query and
head. Operations, forward: 4 h N sum(hi - lo); backward: 2.5 x that. Nothing of T x T is made of several runs, and no
scores are kept where torch has a fused kernel.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from unimega.batch import Intervals
from unimega.kernels import availability, registry

_CALL_COST = 1024
"""What a call costs, in score entries per head: shorter runs join a batch until their padding wastes more than this."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How runs lie in padded batches. Padded rows: those of batch after batch, [runs, longest] each."""

    batches: tuple[tuple[int, int], ...]
    """(runs, longest run) of each batch."""
    gather: torch.Tensor | None
    """int64 [padded rows]: which row lies there; None: nothing is moved. A pad repeats the last row of its own run."""
    places: torch.Tensor | None
    """int64 [T]: the padded row where each row lies."""


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    scale: float,
    rows: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    """See the module. Causal runs of similar length make one call, padded at their ends, which ``is_causal`` hides.

    Intervals that are not causal take one call per run, with a mask of that run: bool [run, run]. On a GPU, k and v are
    saved for every query head unless flash attention runs; fp64, and a width of a head that no fused kernel takes, make
    the scores of a call there: [runs, h, longest, longest].
    """
    plan = _plan(intervals.lengths, intervals.causal, q.device)
    padded = _Pad.apply(plan, q, k, v)
    grouped = q.shape[1] != k.shape[1]
    outputs = []
    start = 0
    for i, (runs, longest) in enumerate(plan.batches):
        mask = None if intervals.causal else _mask(intervals, start, longest)
        start += runs * longest
        query, key, value = padded[3 * i : 3 * i + 3]
        groups = grouped and _takes_groups(query, mask)
        if grouped and not groups:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        outputs.append(
            F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups
            )
        )
    return _Unpad.apply(plan, rows, inverse, *outputs)


def _takes_groups(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch has a fused kernel for grouped heads; on a GPU only flash attention is one.

    Elsewhere it would make all scores of a call, where it need not if every query head has keys of its own.
    """
    return query.device.type == "cpu" or (mask is None and query.dtype in (torch.bfloat16, torch.float16))


class _Pad(torch.autograd.Function):
    """[T, heads, N] of q, k and v to [runs, heads, longest, N] of each for every batch, in the order q0 k0 v0 q1 ..."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.plan = plan
        moved = [_batched(x if plan.gather is None else x.index_select(0, plan.gather), plan) for x in qkv]
        return tuple(x for batch in zip(*moved, strict=True) for x in batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: _Plan = ctx.plan
        whole = [_flat(grads[i::3]) for i in range(3)]
        return None, *(x if plan.places is None else x.index_select(0, plan.places) for x in whole)


class _Unpad(torch.autograd.Function):
    """[runs, heads, longest, N] of every batch to [T, heads N] in modality order."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, rows: torch.Tensor | None, inverse: torch.Tensor | None, *outputs: torch.Tensor
    ) -> torch.Tensor:
        flat = _flat(outputs)
        places = plan.places
        if inverse is not None:
            places = inverse if places is None else places.index_select(0, inverse)
        ctx.plan, ctx.shape = plan, flat.shape
        ctx.save_for_backward(rows, places)
        flat = flat.flatten(1)
        return flat.clone() if places is None else flat.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, places = ctx.saved_tensors
        plan: _Plan = ctx.plan
        if plan.places is not None:  # gradients of pads are zeros, or they would reach the keys that pads saw
            grad = grad.new_zeros(ctx.shape[0], grad.shape[1]).index_copy_(0, places.long(), grad)
        elif rows is not None:
            grad = grad.index_select(0, rows)
        return None, None, None, *_batched(grad.reshape(ctx.shape), plan)


def _batched(x: torch.Tensor, plan: _Plan) -> list[torch.Tensor]:
    """Padded rows [P, heads, N] as [runs, heads, longest, N] for each batch: views."""
    parts = x.split([runs * longest for runs, longest in plan.batches])
    shapes = zip(parts, plan.batches, strict=True)
    return [part.reshape(runs, longest, *x.shape[1:]).transpose(1, 2) for part, (runs, longest) in shapes]


def _flat(batches: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The inverse of ``_batched``; a copy unless there is a single batch."""
    parts = [x.transpose(1, 2).flatten(0, 1) for x in batches]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mask(intervals: Intervals, start: int, length: int) -> torch.Tensor:
    """bool [length, length]: which keys of a run its rows see."""
    stop = start + length
    keys = torch.arange(start, stop, dtype=torch.int32, device=intervals.lo.device)
    return (keys >= intervals.lo[start:stop, None]) & (keys < intervals.hi[start:stop, None])


@functools.lru_cache(maxsize=64)
def _plan(lengths: tuple[int, ...], batched: bool, device: torch.device) -> _Plan:
    """Sort runs into batches. All layers of all stages ask for the same few micro-batches, hence the cache."""
    if not any(lengths):
        return _Plan(((1, 0),), None, None)
    if not batched:
        return _Plan(tuple((1, n) for n in lengths if n), None, None)
    sizes = np.asarray([n for n in lengths if n], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    batches = _batches(sizes)
    if len(batches) == len(sizes) or sizes.min() == sizes.max():
        return _Plan(tuple((1, n) for n in lengths if n) if len(batches) > 1 else batches, None, None)
    order = np.argsort(-sizes, kind="stable")
    gather, places = [], np.empty(int(sizes.sum()), dtype=np.int64)
    done = rows = 0
    for runs, longest in batches:
        own = order[done : done + runs]
        inside = np.arange(longest)
        index = starts[own, None] + np.minimum(inside, sizes[own, None] - 1)
        real = inside < sizes[own, None]
        places[index[real]] = rows + np.flatnonzero(real)
        gather.append(index.ravel())
        done, rows = done + runs, rows + index.size
    both = (torch.from_numpy(x).to(device, non_blocking=True) for x in (np.concatenate(gather), places))
    return _Plan(batches, *both)


def _batches(sizes: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Cut the runs, longest first, into batches: (runs, longest) of each."""
    batches: list[tuple[int, int]] = []
    runs = longest = wasted = 0
    for n in sorted(sizes.tolist(), reverse=True):
        wasted += longest * longest - n * n
        if runs and wasted <= _CALL_COST:
            runs += 1
            continue
        if runs:
            batches.append((runs, longest))
        runs, longest, wasted = 1, n, 0
    batches.append((runs, longest))
    return tuple(batches)


registry.declare(
    "attention",
    registry.Impl(
        "flash-attn",
        "unimega.kernels.flash:flash_attn",
        frozenset({"cuda"}),
        availability.flash_attn,
        note="never run on hardware",
    ),
    registry.triton("attention:attention"),
    registry.Impl(
        "torch-varlen",
        "unimega.kernels.flash:torch_varlen",
        frozenset({"cuda"}),
        availability.torch_varlen,
        only_named=frozenset({"cuda"}),
        note="never run on hardware",
    ),
    registry.npu("attention:attention", "npu_fusion_attention"),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
