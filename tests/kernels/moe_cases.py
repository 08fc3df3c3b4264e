"""Definitions and cases of the ops of routed experts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tests.kernels.case import Case, Tensors, noise, wide
from unimega.kernels.expert_order import ExpertOrder

# topk_routing


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
    total, experts = logits.shape
    logits = wide(logits)
    scores = (1 + torch.tanh(logits / 2)) / 2 if score == "sigmoid" else torch.exp(logits.log_softmax(1))
    keys = scores.detach() + (0 if bias is None else bias)
    keys = keys.where(logits > -torch.inf, -torch.inf)
    if groups > 1:
        members = keys.view(total, groups, -1).sort(dim=2, descending=True).values
        worth = members[:, :, :2].sum(2) if score == "sigmoid" else members[:, :, 0]
        best = worth.argsort(dim=1, descending=True, stable=True)[:, :group_topk]
        is_open = (best[:, :, None] == torch.arange(groups, device=logits.device)).any(1)
        keys = keys.where(is_open.repeat_interleave(experts // groups, dim=1), -torch.inf)
    chosen = keys.argsort(dim=1, descending=True, stable=True)[:, :k]
    weights = torch.stack([scores[torch.arange(total), chosen[:, j]] for j in range(k)], dim=1)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + (1e-20 if score == "sigmoid" else 0))
    pad = torch.arange(total, device=logits.device)[:, None] >= (total if rows is None else rows)
    return (weights * scale).masked_fill(pad, 0), chosen.masked_fill(pad, experts).int()


def topk_case(
    name: str,
    tokens: int,
    experts: int,
    *,
    biased: bool = False,
    coarse: bool = False,
    closed: Sequence[int] = (),
    strided: bool = False,
    **how: Any,
) -> Case:
    logits = 2 * noise(tokens, experts)
    logits = logits.round() if coarse else logits
    logits[:, list(closed)] = -torch.inf

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        bias = (0.5 * noise(experts, seed=3)).float().to(t[0].device) if biased else None
        weights, chosen = op(t[0], bias=bias, **how)
        assert chosen.dtype == torch.int32
        return weights, chosen.double()

    return Case(name, (logits,), call, strided)


# expert_order


def expert_order(experts: torch.Tensor, num_experts: int) -> ExpertOrder:
    ids = experts.flatten().tolist()
    runs = [[slot for slot, e in enumerate(ids) if e == own] for own in range(num_experts)]
    offsets = [sum(map(len, runs[:e])) for e in range(num_experts + 1)]
    source = [slot for run in runs for slot in run] + [s for s, e in enumerate(ids) if not 0 <= e < num_experts]
    place = [source.index(slot) for slot in range(len(ids))]
    offsets, place, source = (
        torch.tensor(numbers, dtype=torch.int32, device=experts.device) for numbers in (offsets, place, source)
    )
    return ExpertOrder(offsets, place.view(experts.shape), source)


def choices(tokens: int, k: int, experts: int, kind: str) -> torch.Tensor:
    """[tokens, k] int32: no row twice the same expert, but for ``kind`` "all to one"."""
    scores = noise(tokens, experts, seed=7).float()
    if kind == "empty expert":  # the first, the last and one between have no token
        scores[:, [0, experts // 2, experts - 1]] = -9.0
    chosen = scores.argsort(dim=1, descending=True)[:, :k].int()
    if kind == "all to one":
        chosen[:] = experts // 2
    if kind == "pads":
        chosen[tokens - max(1, tokens // 3) :] = experts
    if kind == "dropped slots":
        chosen[::3, k - 1] = experts
        chosen[1::6, 0] = -1  # any number that is no expert
    if kind == "no token":
        chosen[:] = experts
    return chosen


KINDS = ("usual", "empty expert", "all to one", "pads", "dropped slots", "no token")


def order_case(kind: str, tokens: int, k: int, experts: int, *, strided: bool = False, name: str = "") -> Case:
    chosen = choices(tokens, k, experts, kind)

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        own = chosen.to(t[0].device)
        order = op(own.t().contiguous().t() if strided else own, experts)
        assert {part.dtype for part in (order.offsets, order.place, order.source)} == {torch.int32}
        return order.offsets.double(), order.place.double(), order.source.double()

    return Case(name or kind, (noise(1),), call)


# route


def route(logits: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor, ExpertOrder]:
    weights, chosen = topk_routing(logits, **how)
    return weights, chosen, expert_order(chosen, logits.shape[1])


def route_case(name: str, tokens: int, experts: int, **options: Any) -> Case:
    inner = topk_case(name, tokens, experts, **options)

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        orders = []

        def choose(*args: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
            *routing, order = op(*args, **how)
            orders.append(order)
            return tuple(routing)

        outputs = inner.call(choose, t)
        (order,) = orders
        return *outputs, *(part.double() for part in (order.offsets, order.place, order.source))

    return dataclasses.replace(inner, call=call)


def order_on(device: torch.device, kind: str, tokens: int, k: int, experts: int) -> ExpertOrder:
    return expert_order(choices(tokens, k, experts, kind).to(device), experts)


def row_owner(order: ExpertOrder) -> torch.Tensor:
    """Expert of each row in expert-major order; E: none."""
    rows = torch.arange(len(order.source), device=order.source.device)
    return (rows[:, None] >= order.offsets[None, 1:]).sum(1)


# permute, unpermute


def permute(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    rows = x[(order.source // order.place.shape[1]).long()]
    real = torch.arange(len(rows), device=x.device) < order.offsets[-1]
    return torch.where(real[:, None], rows, torch.zeros_like(rows))


def unpermute(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    real = torch.arange(len(y), device=y.device) < order.offsets[-1]
    rows = torch.where(real[:, None], wide(y), torch.zeros_like(wide(y)))[order.place.long()]
    return (rows if weights is None else rows * weights[:, :, None]).sum(1).to(y.dtype)


def permute_case(kind: str, tokens: int, k: int, experts: int, width: int, **options: Any) -> Case:
    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        return (op(t[0], order_on(t[0].device, kind, tokens, k, experts)),)

    return Case(options.pop("name", kind), (noise(tokens, width),), call, **options)


def unpermute_case(
    kind: str, tokens: int, k: int, experts: int, width: int, *, weighted: bool = True, **options: Any
) -> Case:
    leaves = (noise(tokens * k, width), noise(tokens, k).abs())

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        order = order_on(t[0].device, kind, tokens, k, experts)
        return (op(t[0], wide(t[1]) if weighted else None, order),)

    return Case(options.pop("name", kind), leaves[: 1 + weighted], call, **options)


# grouped_gemm, expert_ffn


def grouped_gemm(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    borders = offsets.tolist()
    parts = [x[a:b] @ w.T for a, b, w in zip(borders, borders[1:], weights, strict=False)]
    return torch.cat((*parts, torch.zeros_like(x[borders[-1] :, :1] @ weights[0, :, :1].T)))


def grouped_gemm_case(
    counts: Sequence[int], width: int, out: int, *, behind: int = 0, name: str, **options: Any
) -> Case:
    leaves = (noise(sum(counts) + behind, width), noise(len(counts), out, width))
    borders = [sum(counts[:e]) for e in range(len(counts) + 1)]

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        return (op(t[0], t[1], torch.tensor(borders, dtype=torch.int32, device=t[0].device)),)

    return Case(name, leaves, call, **options)


def expert_ffn(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, order: ExpertOrder
) -> torch.Tensor:
    k = order.place.shape[1]
    experts = row_owner(order)[order.place.long()]
    total = wide(x.new_zeros(x.shape))
    for j in range(k):
        own = experts[:, j].clamp(max=len(down) - 1)
        gate, up = wide(torch.einsum("ti,toi->to", x, gate_up[own])).chunk(2, dim=1)
        hidden = (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)
        y = wide(torch.einsum("ti,toi->to", hidden, down[own])) * weights[:, j, None]
        total = total + y.where((experts[:, j] < len(down))[:, None], 0)
    return total.to(x.dtype)


def expert_ffn_case(kind: str, tokens: int, k: int, experts: int, width: int, ffn: int, **options: Any) -> Case:
    leaves = (
        noise(tokens, width),
        noise(experts, 2 * ffn, width) / width**0.5,
        noise(experts, width, ffn) / ffn**0.5,
        noise(tokens, k).abs() + 0.1,
    )

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        return (op(t[0], t[1], t[2], wide(t[3]), order_on(t[0].device, kind, tokens, k, experts)),)

    return Case(options.pop("name", kind), leaves, call, **options)


DEFINITIONS: dict[str, Any] = {
    "topk_routing": topk_routing,
    "expert_order": expert_order,
    "route": route,
    "permute": permute,
    "unpermute": unpermute,
    "grouped_gemm": grouped_gemm,
    "expert_ffn": expert_ffn,
}

CASES: dict[str, tuple[Case, ...]] = {
    "topk_routing": (
        topk_case("one row", 1, 3, k=1),
        topk_case("softmax", 33, 8, k=2),
        topk_case("odd experts", 19, 41, k=6),
        topk_case("not normalised", 19, 40, k=3, normalize=False, scale=2.5),
        topk_case("all chosen", 5, 7, k=7),
        topk_case("softmax, bias", 21, 16, k=4, biased=True),
        topk_case("softmax, ties", 37, 24, k=5, coarse=True),
        topk_case("softmax, groups", 17, 24, k=3, groups=4, group_topk=2, normalize=False),
        topk_case("softmax, pads", 18, 12, k=2, rows=11),
        topk_case("all pads", 4, 12, k=2, rows=0),
        topk_case("softmax, closed experts", 18, 12, k=3, closed=(0, 5, 11)),
        topk_case("sigmoid", 18, 64, k=8, score="sigmoid", scale=2.5),
        topk_case("sigmoid, not normalised", 9, 5, k=2, score="sigmoid", normalize=False),
        topk_case("sigmoid, bias", 21, 130, k=6, score="sigmoid", biased=True),
        topk_case("sigmoid, ties", 21, 13, k=4, score="sigmoid", coarse=True),
        topk_case("sigmoid, groups", 25, 32, k=4, score="sigmoid", biased=True, groups=8, group_topk=3, rows=23),
        topk_case("sigmoid, groups, ties", 25, 32, k=4, score="sigmoid", coarse=True, groups=8, group_topk=3),
        topk_case("groups of one", 9, 6, k=2, score="sigmoid", groups=6, group_topk=3),
        topk_case("sigmoid, closed experts", 18, 12, k=3, score="sigmoid", biased=True, closed=(1, 2, 3)),
        topk_case("strided", 14, 20, k=3, strided=True),
        topk_case("sigmoid, strided", 14, 20, k=3, score="sigmoid", strided=True),
        topk_case("no rows", 0, 8, k=2),
    ),
    "expert_order": (
        *(order_case(kind, 37, 3, 11) for kind in KINDS),
        order_case("usual", 1, 1, 1, name="one slot"),
        order_case("usual", 9, 5, 5, name="all chosen"),
        order_case("usual", 70, 2, 130, name="more experts than slots of a block"),
        order_case("pads", 190, 3, 6, name="several blocks"),
        order_case("pads", 37, 3, 11, strided=True, name="strided"),
        order_case("usual", 0, 2, 4, name="no rows"),
    ),
    "route": (
        route_case("one row", 1, 3, k=1),
        route_case("softmax", 70, 8, k=2),
        route_case("all chosen", 5, 7, k=7),
        route_case("softmax, ties", 37, 24, k=5, coarse=True),
        route_case("softmax, groups", 17, 24, k=3, groups=4, group_topk=2, normalize=False),
        route_case("softmax, pads", 130, 12, k=2, rows=61),
        route_case("softmax, closed experts", 18, 12, k=3, closed=(0, 5, 11)),
        route_case("sigmoid, bias", 21, 130, k=6, score="sigmoid", biased=True, scale=2.5),
        route_case("sigmoid, groups", 25, 32, k=4, score="sigmoid", biased=True, groups=8, group_topk=3, rows=23),
        route_case("sigmoid, closed experts", 18, 12, k=3, score="sigmoid", biased=True, closed=(1, 2, 3)),
        route_case("strided", 14, 20, k=3, strided=True),
        route_case("no rows", 0, 8, k=2),
    ),
    "permute": (
        *(permute_case(kind, 13, 3, 7, 20) for kind in KINDS),
        permute_case("usual", 1, 1, 1, 1, name="one row"),
        permute_case("pads", 9, 2, 5, 41, name="strided", strided=True),
        permute_case("usual", 0, 2, 4, 8, name="no rows"),
    ),
    "unpermute": (
        *(unpermute_case(kind, 13, 3, 7, 20) for kind in KINDS),
        unpermute_case("usual", 13, 3, 7, 20, weighted=False, name="no weights"),
        unpermute_case("pads", 13, 3, 7, 20, weighted=False, name="pads, no weights"),
        unpermute_case("dropped slots", 150, 3, 7, 200, name="several blocks"),
        unpermute_case("usual", 1, 1, 1, 1, name="one row"),
        unpermute_case("pads", 9, 2, 5, 41, name="strided", strided=True),
        unpermute_case("usual", 0, 2, 4, 8, name="no rows"),
    ),
    "grouped_gemm": (
        grouped_gemm_case((1,), 1, 1, name="one row"),
        grouped_gemm_case((5, 0, 17, 0), 24, 40, name="empty expert"),
        grouped_gemm_case((0, 0, 33), 7, 9, name="all to one"),
        grouped_gemm_case((3, 4, 0, 1, 9), 17, 13, behind=6, name="rows of no expert"),
        grouped_gemm_case((140, 1, 66), 72, 150, behind=3, name="several tiles"),
        grouped_gemm_case((0, 0), 8, 5, behind=7, name="no token"),
        grouped_gemm_case((3, 6, 2), 17, 9, behind=2, name="strided", strided=True),
        grouped_gemm_case((0, 0, 0), 4, 6, name="no rows"),
    ),
    "expert_ffn": (
        *(expert_ffn_case(kind, 13, 3, 7, 20, 12) for kind in KINDS),
        expert_ffn_case("usual", 1, 1, 1, 1, 1, name="one row"),
        expert_ffn_case("usual", 5, 4, 4, 9, 7, name="all chosen"),
        expert_ffn_case("usual", 140, 2, 3, 72, 70, name="several tiles"),
        expert_ffn_case("pads", 9, 2, 5, 17, 9, name="strided", strided=True),
        expert_ffn_case("usual", 0, 2, 4, 8, 6, name="no rows"),
    ),
}
