"""What an expert has no room for: the lightest slots of a modality are dropped."""

import math
from typing import Any

import torch

from unimega.batch import TokenOrder
from unimega.config.experts import ExpertSpec
from unimega.moe import rows
from unimega.moe.router import Routing


def room(spec: ExpertSpec, modality: int, tokens: int) -> int:
    """Slots that each expert takes of ``tokens`` tokens of a modality: a fair share times the factor, rounded up."""
    return math.ceil(tokens * spec.top_k / spec.open_to(modality) * spec.capacity[modality])


def drop(
    routing: Routing, spec: ExpertSpec, order: TokenOrder, op: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leave out the slots for which an expert has no room; of each modality it keeps those of greatest weight.

    Weights that stay are not changed. Of equal weights the one of the earlier slot stays.

    Args:
        op: the implementation of ``expert_order``.

    Returns:
        Weights and experts [t, K] with 0 and E where a slot was dropped, and the dropped slots by modality, [M] int64.
    """
    keep = torch.ones_like(routing.experts, dtype=torch.bool)
    for modality, those in enumerate(rows.of_modalities(order)):
        experts = routing.experts[those]
        ranked = routing.weights.detach()[those].reshape(-1).sort(descending=True, stable=True).indices
        sorted_experts = experts.reshape(-1).index_select(0, ranked)[:, None]
        lying = op(sorted_experts, spec.number)
        place = lying.place - lying.offsets[:-1].index_select(0, sorted_experts.reshape(-1))[:, None]
        fits = (place < room(spec, modality, len(experts))).reshape(-1)
        keep[those] = torch.empty_like(fits).scatter_(0, ranked, fits).view(experts.shape)
    dropped = rows.sum_of_modalities(keep.logical_not(), order).sum(dim=1)
    return routing.weights.where(keep, 0.0), routing.experts.where(keep, spec.number), dropped
