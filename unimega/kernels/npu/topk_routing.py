"""Top-k routing whose choice is torch-npu's ``npu_moe_gating_top_k``; see ``kernels.topk_routing``.

The operator chooses; weights and their gradient are torch's, since its own derivative knows sigmoid alone. ``auto``
passes this row over: the documentation is silent about ties, which our contract gives to the lowest expert, and about
logits of -inf.
"""

import torch

from unimega.kernels.precision import widen
from unimega.kernels.topk_routing import check, score_all, weigh

NORM = {"softmax": 0, "sigmoid": 1}
GROUP_WORTH = {"softmax": 0, "sigmoid": 1}
"""Its best expert, or its two best."""


def topk_routing(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.topk_routing``. At most 2048 experts, more than 2 in a group."""
    check(logits, k, score, groups, group_topk)
    real = widen(logits if rows is None else logits[:rows])
    scores = score_all(real, score)
    if not real.shape[0]:
        chosen = torch.zeros(0, k, dtype=torch.long, device=logits.device)
    else:
        chosen = torch.ops.npu.npu_moe_gating_top_k(
            real.detach(),
            k,
            bias=bias,
            k_group=group_topk if groups > 1 else 1,
            group_count=groups,
            group_select_mode=GROUP_WORTH[score],
            norm_type=NORM[score],
        )[1].long()
    return weigh(scores, chosen, score=score, normalize=normalize, scale=scale, pads=len(logits) - len(real))
