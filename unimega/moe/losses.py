"""Losses of the router, as sums over tokens: whoever adds them to the loss of a step divides once, by its tokens."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from unimega.moe.rows import Rows


def scores_of(logits: torch.Tensor, score: str) -> torch.Tensor:
    """[t, E] fp32 scores that sum to 1 over experts: softmax, or sigmoids divided by their sum."""
    if score == "softmax":
        return logits.softmax(dim=1)
    scores = logits.sigmoid()
    return scores / (scores.sum(dim=1, keepdim=True) + 1e-20)


def balance_sum(scores: torch.Tensor, slots: torch.Tensor, mine: Rows) -> torch.Tensor:
    """``E sum_x sum_e scores[x, e] slots[e] / sum(slots)``: divided by tokens it is 1 when loads are even.

    Args:
        scores: [t, E], the only way gradients take.
        slots: [E]: how often each expert was chosen, in the micro-batch or in those of all dp ranks.
        mine: the t rows, whose pads are left out.
    """
    return scores.shape[1] * (mine.sums(scores).sum(dim=0) * _share(slots)).sum()


def document_balance_sum(
    scores: torch.Tensor, experts: torch.Tensor, mine: Rows, tp: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """``balance_sum`` of each document by its own choices, summed over documents (DeepSeek-V3's per sequence).

    Args:
        scores: [t, E].
        experts: [t, j] int32, the choices that count; E for pads.
        mine: the t rows.
        tp: ranks that hold the other rows of the documents, or None. One all-reduce of 4 (E + 1) bytes a document.
    """
    number, wide = mine.documents, scores.shape[1] + 1
    keys = mine.document[:, None] * wide + experts
    slots = scores.new_zeros(number * wide).index_add_(0, keys.reshape(-1), scores.new_ones(keys.numel()))
    if tp is not None:
        dist.all_reduce(slots, group=tp)
    share = _share(slots.view(number, wide)[:, :-1])  # pads are documents without slots: zeros
    return scores.shape[1] * (scores * share.index_select(0, mine.document)).sum()


def z_sum(logits: torch.Tensor, mine: Rows) -> torch.Tensor:
    """``sum_x logsumexp(logits[x])^2``: keeps logits small."""
    return mine.sums(logits.logsumexp(dim=1).square()).sum()


def attach(carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """``carrier``, through which ``loss`` (a scalar) joins the loss that is run backward, with factor 1.

    The gradients of micro-batches and of dp ranks are summed, as those of the main loss are, so ``loss`` must be this
    micro-batch's part of the sum: divided by the tokens of the step, not by its own.
    """
    return _Attach.apply(carrier, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.like = (loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)


def _share(slots: torch.Tensor) -> torch.Tensor:
    """[..., E]: of all slots, as fp32; zeros if there are none."""
    return slots.float() / slots.sum(dim=-1, keepdim=True).clamp(min=1)
