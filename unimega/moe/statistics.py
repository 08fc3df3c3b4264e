"""What a layer's router did, as sums that may be added over micro-batches and ranks and divided at the end."""

from dataclasses import dataclass
from typing import Any

import torch

from unimega.moe.rows import Rows


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over tokens; tensors stay on the device until whoever logs them reads them all together."""

    tokens: tuple[int, ...]
    """Tokens of each modality, pads left out, M host ints."""
    slots: torch.Tensor
    """[M, E] int64: slots that the router gave to each expert, dropped ones too."""
    dropped: torch.Tensor
    """[M] int64: slots for which there was no room."""
    entropy: torch.Tensor
    """[M] fp32: sums of the entropies, in nats, of tokens' scores over all experts."""
    balance: torch.Tensor
    """fp32: the balance loss summed over tokens, without its weight."""
    z_loss: torch.Tensor
    """fp32: squares of the logits' logsumexp, summed over tokens."""

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True)),
            self.slots + other.slots,
            self.dropped + other.dropped,
            self.entropy + other.entropy,
            self.balance + other.balance,
            self.z_loss + other.z_loss,
        )


def count_slots(experts: torch.Tensor, number: int, mine: Rows, op: Any) -> torch.Tensor:
    """[M, E] int64: how often each modality chose each expert; ``op``: the implementation of ``expert_order``."""
    return torch.stack([op(experts[span], number).offsets.diff() for span in mine.spans]).long()


def entropy_sums(scores: torch.Tensor, mine: Rows) -> torch.Tensor:
    """[M] fp32: sums over tokens of ``-sum_e p log p``; scores of 0 add nothing."""
    return mine.sums(torch.special.entr(scores).sum(dim=1))
