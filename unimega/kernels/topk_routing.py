"""Top-k routing: the k best experts of every token, and what each contributes.

``topk_routing(logits, *, k, score="softmax", bias=None, normalize=True, scale=1.0, groups=1, group_topk=1, rows=None)``
``-> (weights, experts)``

logits: [t, E], any float dtype, one row a token. weights: [t, k] fp32, experts: [t, k] int32, best expert first.
score: ``softmax`` over all E experts, or ``sigmoid`` of each.
bias: [E] fp32, added to the scores for the choice alone (DeepSeek's balancing); no gradient.
normalize: weights are divided by their sum (for ``sigmoid`` by sum + 1e-20). Then they are multiplied with ``scale``.
groups, group_topk: host ints; E is cut into ``groups`` equal runs and only experts of the ``group_topk`` best groups
may be chosen. A group is worth its best score (``softmax``, DeepSeek-V2) or the sum of its two best (``sigmoid``, V3),
with the bias added. group_topk x E / groups must be at least k.
rows: host int; rows from there on are pads: expert E (none) and weight 0. None: there are no pads.

The choice is made in fp32. Ties go to the lowest expert, among groups too. Experts with a logit of -inf are never
chosen as long as k others may be; k different experts are chosen in any case.
Gradient: to logits, through weights alone. Nothing is read by the host.
Bytes, forward: t (E itemsize + 8 k); backward as much.
"""

from collections.abc import Callable

import torch

from unimega.kernels import compiled as helper
from unimega.kernels import registry
from unimega.kernels.precision import widen

SCORES = ("softmax", "sigmoid")


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module: the definition in plain torch."""
    return _route(_best, logits, k, score, bias, normalize, scale, groups, group_topk, rows)


def compiled(
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
    """See the module: the choice in C++."""
    return _route(_best_compiled, logits, k, score, bias, normalize, scale, groups, group_topk, rows)


def _route(
    best: Callable[[torch.Tensor, int], torch.Tensor],
    logits: torch.Tensor,
    k: int,
    score: str,
    bias: torch.Tensor | None,
    normalize: bool,
    scale: float,
    groups: int,
    group_topk: int,
    rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check(logits, k, score, groups, group_topk)
    real = widen(logits if rows is None else logits[:rows])
    scores = score_all(real, score)
    with torch.no_grad():
        # Softmax keeps the order of its logits, and rounds neighbours of them together.
        keys = real if score == "softmax" and bias is None else scores
        if bias is not None:
            keys = keys + bias
        keys = keys.float().masked_fill(real == -torch.inf, -torch.inf)
        if groups > 1:
            keys = _limit_groups(keys, groups, group_topk, 2 if score == "sigmoid" else 1)
        experts = best(keys, k)
    return weigh(scores, experts, score=score, normalize=normalize, scale=scale, pads=len(logits) - len(real))


def score_all(logits: torch.Tensor, score: str) -> torch.Tensor:
    """Scores of all experts from logits in fp32 (or fp64)."""
    return logits.softmax(dim=1) if score == "softmax" else logits.sigmoid()


def weigh(
    scores: torch.Tensor, chosen: torch.Tensor, *, score: str, normalize: bool, scale: float, pads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and experts as int32, of a choice [rows, k] int64; ``pads`` rows without an expert come behind."""
    weights = scores.gather(1, chosen)
    if normalize:
        total = weights.sum(dim=1, keepdim=True)
        weights = weights / (total + 1e-20 if score == "sigmoid" else total)
    if scale != 1.0:
        weights = weights * scale
    if pads:
        width = chosen.shape[1]
        weights = torch.cat((weights, weights.new_zeros(pads, width)))
        chosen = torch.cat((chosen, chosen.new_full((pads, width), scores.shape[1])))
    return weights, chosen.int()


def check(logits: torch.Tensor, k: int, score: str, groups: int, group_topk: int) -> None:
    """Raise ValueError for a call that no implementation can do."""
    experts = logits.shape[1]
    if score not in SCORES:
        raise ValueError(f"score={score!r} is not one of {', '.join(SCORES)}")
    if not 1 <= groups <= experts or experts % groups or not 1 <= group_topk <= groups:
        raise ValueError(f"{groups} groups, {group_topk} of them open, do not fit {experts} experts")
    if not 1 <= k <= (group_topk if groups > 1 else groups) * (experts // groups):
        raise ValueError(f"k={k} experts cannot be chosen of {experts} in {groups} groups, {group_topk} of them open")


def _limit_groups(keys: torch.Tensor, groups: int, group_topk: int, best: int) -> torch.Tensor:
    """``keys`` with -inf for experts outside of the best groups."""
    size = keys.shape[1] // groups
    worth = keys.view(-1, groups, size).topk(min(best, size), dim=2).values.sum(dim=2)
    closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, _best(worth, group_topk), False)
    return keys.view(-1, groups, size).masked_fill(closed[:, :, None], -torch.inf).view_as(keys)


def _best(keys: torch.Tensor, k: int) -> torch.Tensor:
    """Numbers of the k largest of each row of fp32, ties to the lowest: no two packed integers are equal."""
    last = keys.shape[1] - 1
    bits = (keys + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.long() << 32) + torch.arange(last, -1, -1, device=keys.device)
    return last - (packed.topk(k, dim=1).values & 0xFFFFFFFF)


def _best_compiled(keys: torch.Tensor, k: int) -> torch.Tensor:
    keys = keys.contiguous()
    best = torch.empty(len(keys), k, dtype=torch.int32, device=keys.device)
    helper.module.topk(keys.data_ptr(), *keys.shape, k, best.data_ptr())
    return best.long()


registry.declare(
    "topk_routing",
    registry.cuda("routing:topk_routing"),
    registry.triton("routing:topk_routing"),
    registry.Impl("cpp", f"{__name__}:compiled", frozenset({"cpu"}), helper.why_not),
    registry.npu("topk_routing:topk_routing", "npu_moe_gating_top_k", only_named=True),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
