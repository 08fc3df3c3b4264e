"""Top-k routing and the order of its slots as one op.

``route(logits, *, k, score="softmax", bias=None, normalize=True, scale=1.0, groups=1, group_topk=1, rows=None)``
``-> (weights, experts, order)``

``weights, experts = topk_routing(...)`` with the same arguments, ``order = expert_order(experts, E)``: see both.
"""

from typing import Any

import torch

from unimega.kernels import compiled as helper
from unimega.kernels import expert_order, registry, topk_routing
from unimega.kernels.expert_order import ExpertOrder


def reference(
    logits: torch.Tensor,
    *,
    k: int,
    score: str = "softmax",
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    group_topk: int = 1,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, ExpertOrder]:
    """See the module: the definition in plain torch."""
    weights, experts = topk_routing.reference(
        logits, k=k, score=score, bias=bias, normalize=normalize, scale=scale, groups=groups, group_topk=group_topk,
        rows=rows,
    )  # fmt: skip
    return weights, experts, expert_order.reference(experts, logits.shape[1])


def compiled(logits: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor, ExpertOrder]:
    """See the module: the choice and the order in C++."""
    weights, experts = topk_routing.compiled(logits, **how)
    return weights, experts, expert_order.compiled(experts, logits.shape[1])


registry.declare(
    "route",
    registry.cuda("routing:route"),
    registry.triton("routing:route"),
    registry.Impl("cpp", f"{__name__}:compiled", frozenset({"cpu"}), helper.why_not),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
