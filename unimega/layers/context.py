"""What every layer of a model is built with and called with."""

from dataclasses import dataclass, field

import torch

from unimega.batch import TokenOrder
from unimega.config.model import ModelSpec
from unimega.parallel.experts import ExpertLayout
from unimega.parallel.linear import Layout


@dataclass(frozen=True)
class Build:
    """The same for all layers of a model: sizes, ranks, and which implementation of each op to take."""

    spec: ModelSpec
    layout: Layout
    device: torch.device
    kernels: dict[str, str] = field(default_factory=dict)
    """op -> implementation; absent: auto."""
    experts: ExpertLayout | None = None
    """Ranks that share a layer's experts; None: every rank holds all of them, whole."""
    selective_recompute: bool = False
    """Keep the outputs of the linears only: attention and SwiGLU run again in backward."""
    moe_recompute: bool = False
    """Keep only the input of routed experts: router, dispatch, experts and the shared FFN run again in backward."""

    def kernel(self, op: str) -> str:
        """The implementation asked for."""
        return self.kernels.get(op, "auto")


@dataclass(frozen=True)
class Call:
    """The same for all layers of one forward: the order of the tokens and the angles of their positions."""

    order: TokenOrder
    """Arrays on the device."""
    cos: torch.Tensor
    """[T, N/2] fp32 in modality order."""
    sin: torch.Tensor
    step_tokens: int
    """Tokens of the global batch without pads, which losses of routers are divided by."""
