"""The FFN of routed experts, with the interface of ``layers.ffn.FFN``."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from unimega.batch import TokenOrder
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.errors import ConfigError
from unimega.kernels.registry import resolve
from unimega.layers.context import Build, Call
from unimega.layers.ffn import FFN
from unimega.moe import capacity, losses
from unimega.moe.experts import Experts
from unimega.moe.router import Router, Routing
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

    Args:
        dp: ranks whose micro-batches make the load of ``balance_over = "global_batch"``; None: this one's alone.

    Raises:
        ConfigError: tp > 1, which is not built.

    Losses of the router join the gradient in training (``losses.attach``). What it did is summed in ``statistics``
    over forwards that gradients are kept of: recompute counts once, evaluation not at all.
    """

    def __init__(self, build: Build, experts: ExpertSpec, *, dp: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if build.layout.size > 1:
            raise ConfigError(
                f"parallel.tp={build.layout.size} cuts layers of routed experts, which is not built yet. Set it to 1."
            )
        self.spec, self.dp = experts, dp
        self.router = Router(build, experts)
        self.experts = Experts(build, experts)
        self.shared = FFN(build, LayerSpec(shared_ffn=experts.shared_width)) if experts.shared_width else None
        self.shared_gate = SharedGate(build.spec.width) if experts.shared_gate else None
        self.expert_order = resolve("expert_order", device=build.device, impl=build.kernel("expert_order"))
        self.statistics: Statistics | None = None

    def forward(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        """[t, D] -> [t, D]. Collectives: with ``global_batch``, one all-reduce of 8 E bytes over dp in training."""
        order, spec = call.order, self.spec
        routing = self.router(x_tD, order)
        weights, experts, dropped = routing.weights, routing.experts, None
        if spec.capacity:
            weights, experts, dropped = capacity.drop(routing, spec, order, self.expert_order)
        if self.training and torch.is_grad_enabled():
            loss = self._observe(routing, dropped, call)
            weights = weights if loss is None else losses.attach(weights, loss)
        y_tD = self.experts(x_tD, weights, self.expert_order(experts, spec.number))
        if self.shared is None:
            return y_tD
        shared = self.shared(x_tD, call)
        return y_tD + (shared if self.shared_gate is None else shared * self.shared_gate(x_tD))

    def take_statistics(self) -> Statistics | None:
        """What was summed since the last call; None: nothing."""
        taken, self.statistics = self.statistics, None
        return taken

    def _observe(self, routing: Routing, dropped: torch.Tensor | None, call: Call) -> torch.Tensor | None:
        """Add to the statistics; returns this micro-batch's part of the router's losses, a scalar, if there are any."""
        order, spec = call.order, self.spec
        slots = count_slots(routing.experts, spec.number, order, self.expert_order)
        with torch.set_grad_enabled(bool(spec.balance or spec.z_loss)):
            scores = losses.scores_of(routing.logits, spec.score)
            balance = self._balance(scores, slots, routing.experts, order)
            z_loss = losses.z_sum(routing.logits, order)
        tokens = tuple(count - (order.pads if not m else 0) for m, count in enumerate(order.counts))
        seen = Statistics(
            tokens=tokens,
            slots=slots,
            dropped=slots.new_zeros(len(tokens)) if dropped is None else dropped,
            entropy=entropy_sums(scores.detach(), order),
            balance=balance.detach(),
            z_loss=z_loss.detach(),
        )
        self.statistics = seen if self.statistics is None else self.statistics + seen
        weighed = [weight * loss for weight, loss in ((spec.balance, balance), (spec.z_loss, z_loss)) if weight]
        total = sum(tokens) if call.step_tokens is None else call.step_tokens
        return torch.stack(weighed).sum() / max(1, total) if weighed else None

    def _balance(
        self, scores: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, order: TokenOrder
    ) -> torch.Tensor:
        spec = self.spec
        if spec.balance_counts == "first":
            experts = experts[:, :1]
        if spec.balance_over == "document":
            return losses.document_balance_sum(scores, experts, order)
        if spec.balance_counts == "first":
            slots = count_slots(experts, spec.number, order, self.expert_order)
        chosen = slots.sum(dim=0)
        if spec.balance_over == "global_batch" and self.dp is not None:
            dist.all_reduce(chosen, group=self.dp)
        return losses.balance_sum(scores, chosen, order)
