"""SwiGLU FFN: one for all tokens, one per modality, or both."""

from collections.abc import Sequence

import torch
from torch import nn

from unimega.config.layer import LayerSpec
from unimega.kernels.registry import resolve
from unimega.layers.context import Build, Call
from unimega.parallel.factors import Fused
from unimega.parallel.linear import Weights, column_linear, row_linear, split_linear_op
from unimega.parallel.recompute import recompute


class SharedFFN(nn.Module):
    """The weights of the FFN that all tokens pass beside that of their modality."""

    def __init__(self, build: Build, width: int) -> None:
        super().__init__()
        self.gate_up, self.down = _pair(build, width, None)


class FFN(nn.Module):
    """``sum of down(silu(gate(x)) * up(x))`` over the FFNs that a token passes; widths are cut over tp.

    All of them share one gather on the way in and one reduction on the way out.
    """

    def __init__(self, build: Build, layer: LayerSpec) -> None:
        super().__init__()
        self.layout, self.selective_recompute = build.layout, build.selective_recompute
        if layer.ffn:
            self.gate_up, self.down = _pair(build, layer.ffn, build.spec.modalities)
            self.shared = SharedFFN(build, layer.shared_ffn) if layer.shared_ffn else None
        else:
            self.gate_up, self.down = _pair(build, layer.shared_ffn, None)
            self.shared = None
        self.gemms = split_linear_op(build.device, build.kernels)
        self.swiglu = resolve("swiglu", device=build.device, impl=build.kernel("swiglu"))

    def forward(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        """[t, D] -> [t, D]. Collectives: those of one column and one row linear, however many FFNs there are."""
        counts = call.order.counts
        into, out = self.gate_up(counts), self.down(counts)
        if self.shared is not None:
            into, out = into + self.shared.gate_up(counts), out + self.shared.down(counts)
        hidden = column_linear(x_tD, into, self.layout, self.gemms)
        gated = [recompute(self.swiglu, h) if self.selective_recompute else self.swiglu(h) for h in hidden]
        return row_linear(gated, out, sum(counts), self.layout, self.gemms)


def _pair(build: Build, width: int | Sequence[int], modalities: tuple[str, ...] | None) -> tuple[Weights, Weights]:
    """gate_up: D -> [gate; up], down: F -> D."""
    double = 2 * width if isinstance(width, int) else [2 * w for w in width]
    gate_up = Weights(build.spec.width, double, modalities=modalities, dim=0, layout=build.layout, fused=Fused((1, 1)))
    return gate_up, Weights(width, build.spec.width, modalities=modalities, dim=1, layout=build.layout)
