"""Rows of tokens over tp: the runs of a modality, which of them this rank holds, and how they are gathered and summed.

T rows are in modality order. Under sequence parallelism rank r holds rows [r*T/tp, (r+1)*T/tp) between the linears.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

Spans = tuple[tuple[int, int], ...]
"""Ranges of rows, host ints."""


@dataclass(frozen=True)
class Layout:
    """What a linear needs to know of the ranks around it."""

    tp: dist.ProcessGroup
    sequence_parallel: bool

    @property
    def size(self) -> int:
        """Number of tp ranks."""
        return self.tp.size()


def spans(counts: tuple[int, ...]) -> Spans:
    """Neighbouring ranges of so many rows."""
    edges = [0]
    for count in counts:
        edges.append(edges[-1] + count)
    return tuple(pairwise(edges))


def shifted(spans: Spans) -> Spans:
    """Counted from the first of their rows."""
    first = spans[0][0]
    return tuple((start - first, stop - first) for start, stop in spans)


def local(spans: Spans, rows: int, layout: Layout) -> Spans:
    """What lies on this rank, which holds ``rows`` of them, counted from its first row; possibly nothing."""
    first = layout.tp.rank() * rows if layout.sequence_parallel else 0
    return tuple((min(max(start - first, 0), rows), min(max(stop - first, 0), rows)) for start, stop in spans)


def gathered(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[T, D] of [T / tp, D]: one all-gather of T*D*itemsize bytes."""
    full = x.new_empty(x.shape[0] * layout.size, x.shape[1])
    dist.all_gather_into_tensor(full, x.contiguous(), group=layout.tp)
    return full


def start_sum(full: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dist.Work | None]:
    """Start the sum over tp of [T, D], which is overwritten: this rank's rows (sp) or all, and what to wait for."""
    if layout.size == 1:
        return full, None
    if layout.sequence_parallel:
        mine = full.new_empty(full.shape[0] // layout.size, full.shape[1])
        return mine, dist.reduce_scatter_tensor(mine, full, group=layout.tp, async_op=True)
    return full, dist.all_reduce(full, group=layout.tp, async_op=True)


def summed(full: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The sum itself."""
    total, reduction = start_sum(full, layout)
    if reduction is not None:
        reduction.wait()
    return total
