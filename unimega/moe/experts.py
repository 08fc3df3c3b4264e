"""The weights of routed experts, all of a kind in one tensor, and the ops on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from unimega.config.experts import ExpertSpec
from unimega.config.schema import Lora
from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.registry import resolve
from unimega.layers.context import Build
from unimega.parallel.experts import ExpertLayout
from unimega.parallel.factors import ONE, Fused, Pair
from unimega.parallel.lora import EXPERTS, Adapted, Factors, drop, summed_gradient
from unimega.parallel.parameter import expert_parameter


@dataclass(frozen=True)
class ExpertProduct:
    """One GEMM of every expert, and what LoRA adds to it."""

    weight: torch.Tensor
    factors: Factors | None


class ExpertWeights(Adapted):
    """One weight of every expert, [E, O, D], as a direct attribute of a module that is called (see ``Weights``).

    Args:
        dim: 1 cuts the outputs over etp, 2 the inputs; ep cuts the experts. ``layout`` None: all is here.
        fused: the projections that the outputs of this rank are made of.
    """

    def __init__(
        self, number: int, d_out: int, d_in: int, *, dim: int, layout: ExpertLayout | None, fused: Fused = ONE
    ) -> None:
        super().__init__(fused)
        self.size, self.dim, self.layout = (number, d_out, d_in), dim, layout
        self.ep, self.etp = (layout.ep.size(), layout.etp.size()) if layout is not None else (1, 1)
        self.weight = expert_parameter(number, d_out, d_in, dim=dim, ep=self.ep, etp=self.etp)

    def adapt(self, lora: Lora) -> None:
        """Make a pair for every expert."""
        (number, d_out, d_in), column = self.size, self.dim == 1
        cut = {"ep": self.ep, "etp": self.etp}
        a = expert_parameter(number, self.fused.number * lora.rank, d_in, dim=None if column else 2, **cut)
        b = expert_parameter(number, d_out, lora.rank, dim=1 if column else None, **cut)
        self.register("", a, b, outputs=b.shape[1])

    def pairs(self) -> Iterator[tuple[torch.Tensor, Pair]]:
        """The weight, with its factors."""
        yield self.weight, self.pair("")

    def forward(self) -> ExpertProduct:
        """The weight, and its factors: what etp does not cut of them has its gradient summed over it.

        With etp, backward: an all-reduce of the gradient of one of the two, E/ep * R * D * b bytes.
        """
        if not self.is_added:
            return ExpertProduct(self.weight, None)
        pair = self.pair("")
        if self.layout is not None and self.dim == 1:
            pair = replace(pair, a=summed_gradient(pair.a, self.layout.etp))
        elif self.layout is not None:
            pair = replace(pair, b=summed_gradient(pair.b, self.layout.etp))
        return ExpertProduct(self.weight, Factors((pair,), self.dropout))


class Experts(nn.Module):
    """``out[i] = sum_j weights[i, j] down[e] (silu(gate[e] x[i]) * up[e] x[i])``, e the expert of slot (i, j).

    A rank has [E / ep, 2 F / etp, D] and [E / ep, D, F / etp].
    """

    def __init__(self, build: Build, experts: ExpertSpec) -> None:
        super().__init__()
        number, width, layout = experts.number, experts.width, build.experts
        both = Fused((1, 1))
        self.gate_up = ExpertWeights(number, 2 * width, build.spec.width, dim=1, layout=layout, fused=both)
        self.down = ExpertWeights(number, build.spec.width, width, dim=2, layout=layout)
        self.op = resolve("expert_ffn", device=build.device, impl=build.kernel("expert_ffn"))
        self.permute, self.gemm, self.swiglu, self.unpermute = (
            resolve(op, device=build.device, impl=build.kernel(op))
            for op in ("permute", "grouped_gemm", "swiglu", "unpermute")
        )

    def forward(self, x_tD: torch.Tensor, weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        """[t, D] -> [t, D]; weights: [t, K] fp32. Slots without an expert add nothing. No collectives."""
        gate_up, down = self.gate_up(), self.down()
        if gate_up.factors is None and down.factors is None:
            return self.op(x_tD, gate_up.weight, down.weight, weights, order)
        # etp ranks share rows, and the columns between the two GEMMs
        hidden = self._multiply(
            self.permute(x_tD, order), gate_up, order, apart="" if self.gate_up.etp > 1 else EXPERTS
        )
        y = self._multiply(self.swiglu(hidden), down, order, apart=EXPERTS)
        return self.unpermute(y, weights, order)

    def _multiply(self, rows: torch.Tensor, product: ExpertProduct, order: ExpertOrder, *, apart: str) -> torch.Tensor:
        """[N, D] -> [N, O], the rows of each expert by its weight and factors."""
        y = self.gemm(rows, product.weight, order.offsets)
        if product.factors is None:
            return y
        (pair,) = product.factors.pairs
        low = self.gemm(drop(rows, product.factors.dropout, apart=apart), pair.a, order.offsets)
        return y + self.gemm(low, pair.wide(), order.offsets)
