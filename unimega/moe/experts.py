"""The weights of routed experts, all of a kind in one tensor, and the op on them."""

import torch
from torch import nn

from unimega.config.experts import ExpertSpec
from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.registry import resolve
from unimega.layers.context import Build
from unimega.parallel.experts import ExpertLayout
from unimega.parallel.parameter import expert_parameter


class ExpertWeights(nn.Module):
    """One weight of every expert, [E, O, D], as a direct attribute of a module that is called (see ``Weights``).

    Args:
        dim: 1 cuts the outputs over etp, 2 the inputs; ep cuts the experts. ``layout`` None: all is here.
    """

    def __init__(self, number: int, d_out: int, d_in: int, *, dim: int, layout: ExpertLayout | None) -> None:
        super().__init__()
        ep, etp = (layout.ep.size(), layout.etp.size()) if layout is not None else (1, 1)
        self.weight = expert_parameter(number, d_out, d_in, dim=dim, ep=ep, etp=etp)

    def forward(self) -> torch.Tensor:
        """The weight."""
        return self.weight


class Experts(nn.Module):
    """``out[i] = sum_j weights[i, j] down[e] (silu(gate[e] x[i]) * up[e] x[i])``, e the expert of slot (i, j).

    A rank has [E / ep, 2 F / etp, D] and [E / ep, D, F / etp].
    """

    def __init__(self, build: Build, experts: ExpertSpec) -> None:
        super().__init__()
        number, width = experts.number, experts.width
        self.gate_up = ExpertWeights(number, 2 * width, build.spec.width, dim=1, layout=build.experts)
        self.down = ExpertWeights(number, build.spec.width, width, dim=2, layout=build.experts)
        self.op = resolve("expert_ffn", device=build.device, impl=build.kernel("expert_ffn"))

    def forward(self, x_tD: torch.Tensor, weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        """[t, D] -> [t, D]; weights: [t, K] fp32. Slots without an expert add nothing. No collectives."""
        return self.op(x_tD, self.gate_up(), self.down(), weights, order)
