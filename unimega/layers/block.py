"""The one transformer layer; what it is, its attention and FFN modules say."""

import torch
from torch import nn

from unimega.layers.context import Call
from unimega.layers.norm import AddNorm, Norm


class Block(nn.Module):
    """``x = x + attention(norm(x)); x = x + ffn(norm(x))``.

    Args:
        index: global number of the layer, part of its parameters' names.
        attention, ffn: modules called with (x [t, D], Call) that return [t, D].
    """

    def __init__(
        self, index: int, *, attention_norm: Norm, attention: nn.Module, ffn_norm: AddNorm, ffn: nn.Module
    ) -> None:
        super().__init__()
        self.index = index
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn

    def forward(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        """[t, D] -> [t, D] in modality order."""
        counts = call.order.local_counts
        attended_tD = self.attention(self.attention_norm(x_tD, counts), call)
        normed_tD, x_tD = self.ffn_norm(attended_tD, x_tD, counts)
        return x_tD + self.ffn(normed_tD, call)
