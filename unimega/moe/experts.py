"""The weights of routed experts, all of a kind in one tensor, and the op on them."""

import torch
from torch import nn

from unimega.config.experts import ExpertSpec
from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.registry import resolve
from unimega.layers.context import Build
from unimega.parallel.parameter import parameter


class ExpertWeights(nn.Module):
    """One weight of every expert, [E, O, D], as a direct attribute of a module that is called (see ``Weights``)."""

    def __init__(self, number: int, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight = parameter(number, d_out, d_in)

    def forward(self) -> torch.Tensor:
        """The weight."""
        return self.weight


class Experts(nn.Module):
    """``out[i] = sum_j weights[i, j] down[e] (silu(gate[e] x[i]) * up[e] x[i])``, e the expert of slot (i, j).

    Every rank holds all experts, whole.
    """

    def __init__(self, build: Build, experts: ExpertSpec) -> None:
        super().__init__()
        number, width = experts.number, experts.width
        self.gate_up = ExpertWeights(number, 2 * width, build.spec.width)
        self.down = ExpertWeights(number, build.spec.width, width)
        self.op = resolve("expert_ffn", device=build.device, impl=build.kernel("expert_ffn"))

    def forward(self, x_tD: torch.Tensor, weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        """[t, D] -> [t, D]; weights: [t, K] fp32. Slots without an expert add nothing. No collectives."""
        return self.op(x_tD, self.gate_up(), self.down(), weights, order)
