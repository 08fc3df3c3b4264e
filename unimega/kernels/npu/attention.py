"""Attention by torch-npu's ``npu_fusion_attention`` on packed rows (layout TND); see ``kernels.attention``."""

import functools
import itertools
from collections.abc import Iterator

import torch

from unimega.batch import Intervals

RUNS = 1024
"""Most runs that one call takes."""
TRIANGLE = 2048
"""Rows of the mask that ``sparse_mode`` 3 wants, whatever the length of the runs."""
WHOLE_MASK, CAUSAL = 1, 3


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
    """See ``kernels.attention``. Causal runs: one call. Else one call per run, with a mask of that run."""
    lengths = [n for n in intervals.lengths if n]
    if not lengths:  # nothing to call, but gradients of q, k and v there are
        return q.flatten(1) + (k.sum() + v.sum())
    if intervals.causal:
        triangle = _triangle(q.device)
        parts = [_call(q[a:b], k[a:b], v[a:b], ends, triangle, CAUSAL, scale) for a, b, ends in _calls(tuple(lengths))]
    else:
        borders = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        parts = [
            _call(q[a:b], k[a:b], v[a:b], (b - a,), _hidden(intervals, a, b), WHOLE_MASK, scale) for a, b in borders
        ]
    out = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
    if inverse is None:
        return out
    return _Reorder.apply(out, rows, inverse)


def _calls(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """First row, last row + 1 and ends of the runs, counted from that first row, of every call."""
    start = 0
    for first in range(0, len(lengths), RUNS):
        ends = tuple(itertools.accumulate(lengths[first : first + RUNS]))  # without a leading 0
        yield start, start + ends[-1], ends
        start += ends[-1]


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: tuple[int, ...],
    mask: torch.Tensor,
    mode: int,
    scale: float,
) -> torch.Tensor:
    return torch.ops.npu.npu_fusion_attention(
        q,
        k,
        v,
        q.shape[1],
        "TND",
        atten_mask=mask,  # without one, sparse_mode is ignored and every key is seen
        scale=scale,
        sparse_mode=mode,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]


class _Reorder(torch.autograd.Function):
    """``out[inverse]``, whose gradient is a gather as well: an index_add would add in any order."""

    @staticmethod
    def forward(ctx: object, out: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)  # type: ignore[attr-defined]
        return out.index_select(0, inverse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad.index_select(0, rows), None, None


@functools.lru_cache(maxsize=1)
def _triangle(device: torch.device) -> torch.Tensor:
    """bool [2048, 2048]: True hides a key, the opposite of torch's masks."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu_(1)


def _hidden(intervals: Intervals, start: int, stop: int) -> torch.Tensor:
    """bool [run, run]: which keys of a run its rows do not see."""
    keys = torch.arange(start, stop, dtype=torch.int32, device=intervals.lo.device)
    return (keys < intervals.lo[start:stop, None]) | (keys >= intervals.hi[start:stop, None])
