"""Rows of tokens on their way to other ranks and back, with time to compute something else meanwhile.

A ``Movement`` is a collective and its adjoint. ``Travel`` sets tensors on their way, ``arrive`` waits for them; what
stands between the two runs beside the transfer. Backward mirrors it: the node of ``arrive`` starts the adjoint, that of
``Travel`` waits, and autograd, which runs the youngest node that is ready, does between them the backward of what stood
between them in forward.

Bytes as in docs/parallelism.md, of the whole array: each rank sends (n - 1)/n of them, twice that in an all-reduce.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Move = Callable[[torch.Tensor], tuple[torch.Tensor, dist.Work | None]]
"""Starts: returns where the rows will be, and what to wait for (None: nothing)."""


@dataclass(frozen=True)
class Movement:
    """A linear map of rows over ranks: forward and its adjoint."""

    there: Move
    back: Move

    @property
    def adjoint(self) -> "Movement":
        """The way back."""
        return Movement(self.back, self.there)


def gather(group: dist.ProcessGroup) -> Movement:
    """[t, ...] -> [n t, ...], all ranks' rows; the adjoint adds them up. An all-gather and a reduce-scatter of n t D b.

    t is the same on all ranks.
    """
    return Movement(lambda x: _gather(x, group), lambda x: _reduce_scatter(x, group))


def replicate(group: dist.ProcessGroup) -> Movement:
    """Equal rows on all ranks, of which each will use a part of the width: nothing, and an all-reduce of t D b."""
    return Movement(lambda x: (x.view_as(x), None), lambda x: _all_reduce(x, group))


def take_part(group: dist.ProcessGroup, total: int) -> Movement:
    """[T, ...], equal on all ranks -> this rank's [c, ...], c = T/n rounded up: nothing, and an all-gather of n c D b.

    The last ranks' rows beyond T are zeros.
    """

    def whole(x: torch.Tensor) -> tuple[torch.Tensor, dist.Work | None]:
        rows, work = _gather(x, group)
        if len(rows) == total:
            return rows, work
        if work is not None:
            work.wait()
        return rows[:total].clone(), None  # autograd allows no view of what a collective still writes

    return Movement(lambda x: (part_of(x, group, fill=0.0), None), whole)


def exchange(
    group: dist.ProcessGroup, sends: Sequence[int], receives: Sequence[int], *, rows_there: int, rows_here: int
) -> Movement:
    """The first ``sum(sends)`` rows to the ranks in their order, ``sends[r]`` each; ``receives[r]`` come from rank r.

    [rows_here, ...] -> [rows_there, ...]; rows beyond what comes are zeros. An all-to-all of ``sum(sends)`` rows of D b
    bytes each way.
    """
    return Movement(
        lambda x: _all_to_all(x, group, sends, receives, rows_there),
        lambda x: _all_to_all(x, group, receives, sends, rows_here),
    )


class Travel:
    """Tensors on their way by one movement."""

    def __init__(self, movement: Movement, *tensors: torch.Tensor) -> None:
        self.movement = movement
        self.works: list[dist.Work | None] = []
        self.home: tuple[torch.Tensor | None, ...] = ()
        """Gradients on their way back."""
        self.buffers: tuple[torch.Tensor, ...] = _Start.apply(self, *tensors)

    def arrive(self) -> tuple[torch.Tensor, ...]:
        """Wait; the tensors of the other side. To be called once."""
        buffers, self.buffers = self.buffers, ()  # they know this object, which must not know them for ever
        return _Arrive.apply(self, *buffers)

    def start(self, move: Move, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Without autograd."""
        started = [move(values.contiguous()) for values in tensors]
        self.works = [work for _, work in started]
        return tuple(values for values, _ in started)

    def wait(self) -> None:
        """Until what was started is done."""
        for work in self.works:
            if work is not None:
                work.wait()
        self.works = []


def travel(movement: Movement, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """There at once."""
    return Travel(movement, *tensors).arrive()


def part_of(values: torch.Tensor, group: dist.ProcessGroup, *, fill: float) -> torch.Tensor:
    """[T, ...] -> [c, ...]: this rank's rows as ``take_part`` cuts them, the last ranks' filled up. No collectives."""
    total, part = len(values), -(-len(values) // group.size())
    first = min(group.rank() * part, total)
    own = values[first : min(first + part, total)]
    return torch.cat((own, own.new_full((part - len(own), *own.shape[1:]), fill)))


def gathered(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[t, ...] -> [n t, ...], outside autograd: an all-gather."""
    rows, work = _gather(values.detach().contiguous(), group)
    if work is not None:
        work.wait()
    return rows


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Travel, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.journey = journey
        buffers = journey.start(journey.movement.there, tensors)
        ctx.mark_non_differentiable(
            *(b for b, needs in zip(buffers, ctx.needs_input_grad[1:], strict=True) if not needs)
        )
        return buffers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.journey.wait()
        home, ctx.journey.home = ctx.journey.home, ()
        return None, *home


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Travel, *buffers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.journey = journey
        journey.wait()
        return tuple(buffer.view_as(buffer) for buffer in buffers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        journey, needs = ctx.journey, ctx.needs_input_grad[1:]
        started = iter(journey.start(journey.movement.back, [g for g, n in zip(grads, needs, strict=True) if n]))
        journey.home = tuple(next(started) if needed else None for needed in needs)
        return None, *grads  # of the shape autograd expects; what counts is on its way


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work | None]:
    rows = x.new_empty(len(x) * group.size(), *x.shape[1:])
    return rows, dist.all_gather_into_tensor(rows, x, group=group, async_op=True)


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work | None]:
    rows = x.new_empty(len(x) // group.size(), *x.shape[1:])
    return rows, dist.reduce_scatter_tensor(rows, x, group=group, async_op=True)


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work | None]:
    total = x.clone()
    return total, dist.all_reduce(total, group=group, async_op=True)


def _all_to_all(
    x: torch.Tensor, group: dist.ProcessGroup, sends: Sequence[int], receives: Sequence[int], rows: int
) -> tuple[torch.Tensor, dist.Work | None]:
    out, coming = x.new_empty(rows, *x.shape[1:]), sum(receives)
    out[coming:].zero_()
    work = dist.all_to_all_single(
        out[:coming], x[: sum(sends)], list(receives), list(sends), group=group, async_op=True
    )
    return out, work
