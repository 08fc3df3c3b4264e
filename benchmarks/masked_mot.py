"""MoT with boolean masks, in plain torch: ``masked.py`` for layers that are split throughout, attention over documents.

Every weight of a layer, norms too, exists twice; each is applied to ``x[mask]`` and its result put back with
``out[mask] = y``, after the host has asked whether there is a token of that modality. Attention sees all tokens of a
document, in input order.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from masked import IGNORED, Layer, MaskedUniX, attend, runs_of
from torch import nn

from unimega.config.model import ModelSpec

Parts = list[tuple[torch.Tensor, Layer]]
"""The mask of each modality, and its layer."""


class MaskedMoT(MaskedUniX):
    """All layers by two."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, encode=len(spec.layers), decode=0)

    def forward(
        self, ids: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy; arguments as of ``MaskedUniX``."""
        vision = (ids >= self.text_rows) | (ids == self.vision_start)
        x = self.embedding(ids)
        angles, runs = self._angles(positions), runs_of(documents)
        for number in range(len(self.text)):
            parts: Parts = [(~vision, self.layer(self.text, number)), (vision, self.layer(self.vision, number))]
            heads = by_mask(x, parts, lambda layer, own: torch.cat(layer.heads(layer.attention_norm(own)), dim=1))
            q, k, v = heads.split((self.spec.heads, self.spec.kv_heads, self.spec.kv_heads), dim=1)
            attended = attend(q, k, v, angles, runs)
            x = x + by_mask(attended, parts, lambda layer, own: layer.output(own))
            x = x + by_mask(x, parts, lambda layer, own: layer.feed_forward(layer.ffn_norm(own)))
        return F.cross_entropy(self.head(self.final_norm(x)).float(), labels, ignore_index=IGNORED)

    @staticmethod
    def layer(layers: nn.ModuleList, number: int) -> Layer:
        """One of them."""
        found = layers[number]
        assert isinstance(found, Layer)
        return found


def by_mask(x: torch.Tensor, parts: Parts, function: Callable[[Layer, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``function`` of each modality's rows by its layer, in the order of x."""
    out = None
    for mask, layer in parts:
        if mask.any():
            y = function(layer, x[mask])
            out = y.new_zeros(len(x), *y.shape[1:]) if out is None else out
            out[mask] = y
    assert out is not None
    return out
