"""The router: which experts a token goes to, and how much each contributes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from unimega.batch import TokenOrder
from unimega.config.experts import ExpertSpec
from unimega.kernels.precision import widen
from unimega.kernels.registry import resolve
from unimega.layers.context import Build
from unimega.moe.rows import Rows
from unimega.parallel.parameter import parameter


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router says of t tokens."""

    logits: torch.Tensor
    """[t, E] fp32; -inf for experts that the token's modality may not use. Rows of pads hold numbers too."""
    weights: torch.Tensor
    """[t, K] fp32; 0 for pads."""
    experts: torch.Tensor
    """[t, K] int32, best first; E (none) for pads."""


class Router(nn.Module):
    """``topk(score(x @ weight.T + closed[modality]) + bias)`` in fp32, whatever the precision of the run.

    In evaluation, and without ``noise`` in training too, it is a pure function of x.

    Attributes:
        bias: fp32 [E], only with ``bias_rate``: what ``balanced_bias`` moves between steps.
    """

    bias: torch.Tensor | None
    closed: torch.Tensor

    def __init__(self, build: Build, experts: ExpertSpec) -> None:
        super().__init__()
        modalities = len(build.spec.modalities)
        for name, given in (("sets", experts.sets), ("capacity", experts.capacity)):
            if given and len(given) != modalities:
                raise ValueError(f"{name} has {len(given)} entries for {modalities} modalities")
        self.spec = experts
        self.weight = parameter(experts.number, build.spec.width, on_local_rows=True)
        self.register_buffer("bias", torch.zeros(experts.number) if experts.bias_rate else None)
        self.register_buffer("closed", _closed(experts, modalities), persistent=False)
        impl = build.kernel("topk_routing")
        self.op = resolve("topk_routing", device=build.device, impl=impl, sizes=experts.sizes)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the bias, never rounds it: its steps vanish in 16 bits."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.bias = bias.to(self.weight.device)
        return self

    def forward(self, x_tD: torch.Tensor, order: TokenOrder, mine: Rows) -> Routing:
        """Route [t, D] rows in modality order. No collectives; nothing is read by the host.

        Args:
            order: of the whole micro-batch.
            mine: which of its rows these are.
        """
        spec = self.spec
        logits = F.linear(widen(x_tD), widen(self.weight))
        if spec.sets:
            parts = logits.split(order.local_counts)
            logits = torch.cat([part + closed for part, closed in zip(parts, self.closed, strict=True)])
        if spec.noise and self.training:
            # Drawn for the whole micro-batch on every tp rank: the numbers of one rank, and no two rows have the same.
            gumbel = logits.new_empty(sum(order.counts), spec.number).exponential_().log_().neg_()
            weights, experts = noisy_top2(logits, gumbel[mine.first : mine.first + mine.total], self.op)
        else:
            weights, experts = self.op(
                logits,
                k=spec.top_k,
                score=spec.score,
                bias=self.bias,
                normalize=spec.normalize,
                scale=spec.scale,
                groups=spec.groups,
                group_topk=spec.group_topk,
            )
        return Routing(logits, mine.blank_pads(weights, 0.0), mine.blank_pads(experts, spec.number))


def noisy_top2(logits: torch.Tensor, noise: torch.Tensor, op: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Uni-MoE's gating: the best expert, and the best of the others after noise; weights know nothing of the noise.

    Args:
        logits: [t, E] fp32.
        noise: [t, E], of a Gumbel distribution: then the second is drawn from the softmax over the others.
        op: the implementation of ``topk_routing``.

    Returns:
        Weights [t, 2] that sum to 1, experts [t, 2] int32.
    """
    with torch.no_grad():
        _, first = op(logits, k=1)
        _, second = op((logits + noise).scatter(1, first.long(), -torch.inf), k=1)
        experts = torch.cat((first, second), dim=1)
    chosen = logits.softmax(dim=1).gather(1, experts.long())
    return chosen / chosen.sum(dim=1, keepdim=True), experts


def balanced_bias(bias: torch.Tensor, slots: torch.Tensor, rate: float) -> torch.Tensor:
    """The bias after a step: up by ``rate`` for experts with less than the mean load, down for those with more.

    Args:
        bias: [E] fp32.
        slots: [E], slots of each expert in the global batch: summed over micro-batches and ranks.
        rate: ``bias_rate``.
    """
    load = slots.to(torch.float64)  # whole numbers beyond 2^24 stay exact
    return bias + rate * (load.mean() - load).sign().to(bias.dtype)


def _closed(experts: ExpertSpec, modalities: int) -> torch.Tensor:
    """[M, E]: -inf where a modality may not use an expert, else 0."""
    closed = torch.zeros(modalities, experts.number)
    for row, allowed in zip(closed, experts.sets, strict=False):
        row.fill_(-torch.inf)
        row[list(allowed)] = 0.0
    return closed
