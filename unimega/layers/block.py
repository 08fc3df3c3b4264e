"""The one transformer layer; what it is, its attention and FFN modules say."""

from functools import partial

import torch
from torch import nn

from unimega.layers.context import Call
from unimega.layers.norm import AddNorm, Norm
from unimega.parallel.recompute import recompute


class Block(nn.Module):
    """``x = x + attention(norm(x)); x = x + ffn(norm(x))``.

    Args:
        index: global number of the layer, part of its parameters' names.
        attention, ffn: modules called with (x [t, D], Call) that return [t, D].
        recompute_ffn: keep only the input of ``ffn`` and run it again in backward.
    """

    def __init__(
        self,
        index: int,
        *,
        attention_norm: Norm,
        attention: nn.Module,
        ffn_norm: AddNorm,
        ffn: nn.Module,
        recompute_ffn: bool = False,
    ) -> None:
        super().__init__()
        self.index, self.recompute_ffn = index, recompute_ffn
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn

    def forward(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        """[t, D] -> [t, D] in modality order."""
        counts = call.order.local_counts
        attended_tD = self.attention(self.attention_norm(x_tD, counts), call)
        normed_tD, x_tD = self.ffn_norm(attended_tD, x_tD, counts)
        ffn = partial(self.ffn, call=call)
        return x_tD + (recompute(ffn, normed_tD) if self.recompute_ffn else ffn(normed_tD))
