"""How rows of tokens reach the ranks of their experts and come back.

T tokens of a micro-batch, t of them here, K experts each, E experts, D width, b bytes of an activation.

Over tp: under sequence parallelism each rank has rows of its own, and they are what it sends. Without it all tp ranks
have the same rows: each takes its 1/tp of them (``take_part``), so that none is computed twice. Where tp cuts the width
of experts (etp = tp) every tp rank needs all rows instead: they are gathered, what comes out is summed and scattered.

Over ep, one of two ways:

- ``alltoall``: a slot's row goes to its expert's rank alone, about t K D b bytes there and as many back. What a rank
  receives only the device knows, and a collective wants to be told: the host reads 2 ep numbers, once a layer.
- ``allgather``: all ranks get all rows, ep t D b bytes there and back; nothing is read by the host, and buffers have
  room for ep t K slots of which a rank fills about 1/ep. For few ranks, large K, or where a sync hurts more.

The weights of slots travel with the rows and are applied there, inside ``expert_ffn``: what comes back only has to be
added, so that the outputs of the experts, t K D b bytes a layer, need not be kept for the weights' gradient. That costs
4 bytes beside each D b in forward and as many in backward, which bring the gradient of the weights home.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from unimega import backend
from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.registry import resolve
from unimega.layers.context import Build
from unimega.moe.transfer import Travel, exchange, gather, gathered, part_of, replicate, take_part, travel

Experts = Callable[[torch.Tensor, torch.Tensor, ExpertOrder], torch.Tensor]
"""(x [n, D], weights [n, k] fp32, order by the experts of this rank) -> [n, D], partial sums where etp cuts them."""
Beside = Callable[[], torch.Tensor]
"""What is computed while rows travel."""


class Dispatch:
    """Runs the experts of all ep ranks on the rows of this one.

    Args:
        number: E.
        order: the implementation of ``expert_order``.
    """

    def __init__(self, build: Build, number: int, order: Any) -> None:
        self.layout, self.ranks, self.number, self.order = build.layout, build.experts, number, order
        self.permute, self.unpermute = (
            resolve(op, device=build.device, impl=build.kernel(op)) for op in ("permute", "unpermute")
        )
        self.over_ep: Any = self._local
        if self.ranks is not None and self.ranks.ep.size() > 1:
            self.over_ep = {"alltoall": self._all_to_all, "allgather": self._all_gather}[self.ranks.dispatch]

    def __call__(
        self,
        x_tD: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        experts: Experts,
        beside: Beside | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send rows to their experts, compute, bring back the sums.

        Args:
            x_tD: [t, D], this tp rank's rows under sequence parallelism, else those of all tp ranks.
            weights: [t, K] fp32.
            chosen: [t, K] int32, numbers from 0 to E - 1; E: none.
            experts: those of this rank.
            beside: computed while rows are on their way over ep.

        Returns:
            [t, D], and what ``beside`` gave. Collectives: see ``_all_to_all`` and ``_all_gather`` for those over ep.
            Over tp, forward and backward alike: with etp = tp an all-gather and a reduce-scatter of T D b (sequence
            parallelism), else an all-reduce of T D b; with etp 1 an all-gather of T D b without sequence parallelism.
            The weights of slots and their gradients go along, 4 K bytes a row.
        """
        tp, total = self.layout.tp, len(x_tD)
        own_rows, cut = self.layout.sequence_parallel, self.ranks is not None and self.ranks.etp.size() > 1
        if self.layout.size == 1 or (own_rows and not cut):
            return self.over_ep(x_tD, weights, chosen, experts, beside)
        if not cut:
            into, out = take_part(tp, total), take_part(tp, total).adjoint
            chosen = part_of(chosen, tp, fill=self.number)
        elif own_rows:
            into, out = gather(tp), gather(tp).adjoint
            chosen = gathered(chosen, tp)
        else:
            into, out = replicate(tp), replicate(tp).adjoint
        x_tD, weights = travel(into, x_tD, weights)
        y_tD, other = self.over_ep(x_tD, weights, chosen, experts, beside)
        return travel(out, y_tD)[0], other

    def _local(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts, beside: Beside | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All experts are here. No collectives."""
        y = experts(x, weights, self.order(chosen, self.number))
        return y, None if beside is None else beside()

    def _all_to_all(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts, beside: Beside | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each slot's row to the rank of its expert and back.

        Expert-major order is the order of ranks too, so what goes to a rank is one run of rows, and the counts of a run
        say which expert each of its rows is for. Forward: all-to-alls of 4 E bytes of counts, of t K D b and 4 t K
        bytes of rows and weights, of t K D b coming back. Backward: the same, without counts. One host read of 2 ep
        numbers, which were copied while the rows were permuted; backward uses them again.
        """
        ep = self._ep.size()
        lying = self.order(chosen, self.number)
        sent = lying.offsets.diff()
        coming = torch.empty_like(sent)
        dist.all_to_all_single(coming, sent, group=self._ep)
        sizes = torch.stack((sent.view(ep, -1).sum(dim=1), coming.view(ep, -1).sum(dim=1)))
        copy = backend.current().to_host(sizes)
        rows, chances = self.permute(x, lying), _ByRow.apply(weights, lying)
        sends, receives = copy.read()
        here, there = chosen.numel(), sum(receives)
        movement = exchange(self._ep, sends, receives, rows_there=there, rows_here=here)
        journey = Travel(movement, rows, chances)
        other = None if beside is None else beside()
        rows, chances = journey.arrive()
        y = experts(rows, chances, self.order(_expert_of_rows(coming, ep, there), self.number // ep))
        (y,) = travel(movement.adjoint, y)
        return self.unpermute(y, None, lying), other

    def _all_gather(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts, beside: Beside | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All rows to all ranks, each adds up what its experts make of them; t is the same on all ranks.

        Forward: all-gathers of ep t D b of rows and 8 ep t K of routing, a reduce-scatter of ep t D b. Backward: the
        adjoints of all but 4 ep t K. Sums over ranks are rounded to the rows' dtype on the way. No host read.
        """
        movement = gather(self._ep)
        journey = Travel(movement, x, weights)
        held = self.number // self._ep.size()
        all_chosen = gathered(chosen, self._ep) - self._ep.rank() * held  # those of other ranks are no experts here
        other = None if beside is None else beside()
        rows, all_weights = journey.arrive()
        y = experts(rows, all_weights, self.order(all_chosen, held))
        return travel(movement.adjoint, y)[0], other

    @property
    def _ep(self) -> dist.ProcessGroup:
        assert self.ranks is not None
        return self.ranks.ep


class _ByRow(torch.autograd.Function):
    """Weights of slots [t, K] in expert-major order, [N, 1]; backward gathers too: no atomics."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        ctx.order = order
        return weights.reshape(-1, 1).index_select(0, order.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        place = ctx.order.place
        return grads.index_select(0, place.reshape(-1)).view(place.shape), None


def _expert_of_rows(coming: torch.Tensor, ranks: int, total: int) -> torch.Tensor:
    """[total, 1] int32: the expert, counted from this rank's first, of rows in runs by rank, then expert.

    Args:
        coming: [E] int32, lengths of the runs.
        total: their sum, on the host.
    """
    held = torch.arange(len(coming) // ranks, dtype=torch.int32, device=coming.device)
    return held.repeat(ranks).repeat_interleave(coming, output_size=total)[:, None]
