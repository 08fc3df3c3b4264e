"""The FFN of routed experts, with the interface of ``layers.ffn.FFN``."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.kernels.registry import resolve
from unimega.layers.context import Build, Call
from unimega.layers.ffn import FFN
from unimega.moe import capacity, losses, rows
from unimega.moe.dispatch import Dispatch
from unimega.moe.experts import Experts
from unimega.moe.router import Router, Routing
from unimega.moe.rows import Rows
from unimega.moe.statistics import Statistics, count_slots, entropy_sums
from unimega.parallel.parameter import parameter


class SharedGate(nn.Module):
    """``sigmoid(x @ weight.T)``: how much of the shared FFN a token takes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = parameter(1, width, on_local_rows=True)

    def forward(self, x_tD: torch.Tensor) -> torch.Tensor:
        """[t, D] -> [t, 1]."""
        return F.linear(x_tD, self.weight).sigmoid()


class MoE(nn.Module):
    """``sum of its K experts(x) + gate(x) * shared(x)`` for every token; pads pass the shared FFN alone.

    Under sequence parallelism a tp rank routes its own rows; without it all tp ranks route all rows, alike, as any
    weight that tp does not cut is used. Loads, capacity and losses are those of the whole micro-batch in both cases.

    Args:
        dp: ranks whose micro-batches make the load of ``balance_over = "global_batch"``; None: this one's alone.

    Losses of the router join the gradient in training (``losses.attach``). What it did is summed in ``statistics``
    over forwards that gradients are kept of: recompute counts once, evaluation not at all.
    """

    def __init__(self, build: Build, experts: ExpertSpec, *, dp: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.spec, self.dp = experts, dp
        self.tp = build.layout.tp if build.layout.sequence_parallel and build.layout.size > 1 else None
        self.router = Router(build, experts)
        self.experts = Experts(build, experts)
        self.shared = FFN(build, LayerSpec(shared_ffn=experts.shared_width)) if experts.shared_width else None
        self.shared_gate = SharedGate(build.spec.width) if experts.shared_gate else None
        impl = build.kernel("expert_order")
        self.expert_order = resolve("expert_order", device=build.device, impl=impl, sizes=experts.sizes)
        self.dispatch = Dispatch(build, experts.number, self.expert_order)
        self.statistics: Statistics | None = None

    def forward(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        """[t, D] -> [t, D]: this rank's rows under sequence parallelism, else all.

        Collectives beside those of ``Dispatch``, the shared FFN's and ``capacity.drop``'s: in training one all-reduce
        of 8 E bytes (``balance_over = "document"``: 4 (E + 1) a document) over tp under sequence parallelism, and with
        ``global_batch`` one of 8 E over dp. The shared FFN is computed while rows are on their way.
        """
        spec = self.spec
        whole = rows.of_rank(call.order)
        mine = whole if self.tp is None else rows.of_rank(call.order, self.tp.rank(), self.tp.size())
        routing = self.router(x_tD, call.order, mine)
        weights, experts, dropped = routing.weights, routing.experts, None
        if spec.capacity:
            weights, experts, dropped = capacity.drop(routing, spec, mine, whole, self.expert_order, self.tp)
        if self.training and torch.is_grad_enabled():
            loss = self._observe(routing, dropped, mine, call.step_tokens)
            weights = weights if loss is None else losses.attach(weights, loss)
        beside = None if self.shared is None else partial(self._run_shared, x_tD, call)
        y_tD, shared = self.dispatch(x_tD, weights, experts, self.experts, beside)
        return y_tD if shared is None else y_tD + shared

    def take_statistics(self) -> Statistics | None:
        """What was summed since the last call; None: nothing."""
        taken, self.statistics = self.statistics, None
        return taken

    def _run_shared(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        assert self.shared is not None
        shared = self.shared(x_tD, call)
        return shared if self.shared_gate is None else shared * self.shared_gate(x_tD)

    def _observe(
        self, routing: Routing, dropped: torch.Tensor | None, mine: Rows, step_tokens: int
    ) -> torch.Tensor | None:
        """Add to the statistics; returns these rows' part of the router's losses, a scalar, if there are any."""
        spec = self.spec
        slots = count_slots(routing.experts, spec.number, mine, self.expert_order)
        with torch.set_grad_enabled(bool(spec.balance or spec.z_loss)):
            scores = losses.scores_of(routing.logits, spec.score)
            balance = self._balance(scores, slots, routing.experts, mine)
            z_loss = losses.z_sum(routing.logits, mine)
        seen = Statistics(
            tokens=mine.tokens,
            slots=slots,
            dropped=slots.new_zeros(len(mine.tokens)) if dropped is None else dropped,
            entropy=entropy_sums(scores.detach(), mine),
            balance=balance.detach(),
            z_loss=z_loss.detach(),
        )
        self.statistics = seen if self.statistics is None else self.statistics + seen
        weighed = [weight * loss for weight, loss in ((spec.balance, balance), (spec.z_loss, z_loss)) if weight]
        return torch.stack(weighed).sum() / max(1, step_tokens) if weighed else None

    def _balance(self, scores: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, mine: Rows) -> torch.Tensor:
        spec = self.spec
        if spec.balance_counts == "first":
            experts = experts[:, :1]
        if spec.balance_over == "document":
            return losses.document_balance_sum(scores, experts, mine, self.tp)
        if spec.balance_counts == "first":
            slots = count_slots(experts, spec.number, mine, self.expert_order)
        chosen = slots.sum(dim=0)
        if self.tp is not None:
            dist.all_reduce(chosen, group=self.tp)
        if spec.balance_over == "global_batch" and self.dp is not None:
            dist.all_reduce(chosen, group=self.dp)
        return losses.balance_sum(scores, chosen, mine)
