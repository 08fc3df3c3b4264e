"""What an expert has no room for: the lightest slots of a modality in a micro-batch are dropped."""

import math
from typing import Any

import torch
import torch.distributed as dist

from unimega.config.experts import ExpertSpec
from unimega.moe.router import Routing
from unimega.moe.rows import Rows
from unimega.moe.transfer import gathered


def room(spec: ExpertSpec, modality: int, tokens: int) -> int:
    """Slots that each expert takes of ``tokens`` tokens of a modality: a fair share times the factor, rounded up.

    Never more than there are tokens, which is all that can come: a huge factor would leave the integers of a device.
    """
    fair = tokens * spec.top_k / spec.open_to(modality)
    return math.ceil(min(fair * spec.capacity[modality], tokens))


def drop(
    routing: Routing, spec: ExpertSpec, mine: Rows, whole: Rows, op: Any, tp: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leave out the slots for which an expert has no room; of each modality it keeps those of greatest weight.

    Weights that stay are not changed. Of equal weights the one of the earlier slot stays. The slots of a whole
    micro-batch are compared, on however many tp ranks its rows lie; those of another dp rank are another micro-batch.

    Args:
        routing: of this rank's rows.
        mine: this rank's rows.
        whole: all rows of the micro-batch.
        op: the implementation of ``expert_order``.
        tp: ranks that hold the other rows; None: there are none. Two all-gathers of 4 T K bytes.

    Returns:
        Weights and experts [t, K] with 0 and E where a slot was dropped, and the dropped slots of this rank's rows by
        modality, [M] int64.
    """
    all_weights, all_experts = routing.weights.detach(), routing.experts
    if tp is not None:
        all_weights, all_experts = gathered(all_weights, tp), gathered(all_experts, tp)
    all_keep = torch.ones_like(all_experts, dtype=torch.bool)
    for modality, span in enumerate(whole.spans):
        experts = all_experts[span]
        ranked = all_weights[span].reshape(-1).sort(descending=True, stable=True).indices
        sorted_experts = experts.reshape(-1).index_select(0, ranked)[:, None]
        lying = op(sorted_experts, spec.number)
        place = lying.place - lying.offsets[:-1].index_select(0, sorted_experts.reshape(-1))[:, None]
        fits = (place < room(spec, modality, len(experts))).reshape(-1)
        all_keep[span] = torch.empty_like(fits).scatter_(0, ranked, fits).view(experts.shape)
    keep = all_keep[mine.first : mine.first + mine.total]
    dropped = mine.sums(keep.logical_not()).sum(dim=1)
    return routing.weights.where(keep, 0.0), routing.experts.where(keep, spec.number), dropped
