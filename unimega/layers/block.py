"""The one transformer layer; what it is, its attention and FFN modules say."""

import torch
from torch import nn

from unimega.layers.context import Call
from unimega.layers.norm import Norm


class Block(nn.Module):
    """``x = x + attention(norm(x)); x = x + ffn(norm(x))``.

    Args:
        index: global number of the layer, part of its parameters' names.
        attention, ffn: modules called with (x [t, D], Call) that return [t, D].
    """

    def __init__(
        self, index: int, *, attention_norm: Norm, attention: nn.Module, ffn_norm: Norm, ffn: nn.Module
    ) -> None:
        super().__init__()
        self.index = index
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn

    def forward(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        """[t, D] -> [t, D] in modality order."""
        counts = call.order.local_counts
        x_tD = x_tD + self.attention(self.attention_norm(x_tD, counts), call)
        return x_tD + self.ffn(self.ffn_norm(x_tD, counts), call)
