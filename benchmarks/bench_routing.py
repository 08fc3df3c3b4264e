"""python benchmarks/bench_routing.py: the k best experts of each token, and the order of slots by expert.

Three ops. ``topk_routing`` in fp32 against softmax, topk and division. ``expert_order`` from given ids, without
gradients, against what others sort to permute tokens: the ids as int64 (torchtitan and others), and the map of E x T
booleans of megatron-core, sorted for experts of a fixed capacity (``argsort``) and else read by ``masked_select``.
Theirs gives the tokens of each expert alone, ours also the inverse and the offsets. ``route`` is both, against eager
torch that makes all of these.
"""

from collections.abc import Iterator
from typing import Any

import torch
from harness import Floor, Function, Job, Tensors, compiled, noise, ours, run

SHAPES = {"tiny": ((64, 8, 2),), "cpu": ((16384, 128, 8),), "gpu": ((16384, 64, 8), (16384, 128, 8), (32768, 256, 8))}
"""(T, E, K)."""


def route(op: Any, k: int) -> Function:
    """One of ours."""
    return lambda t: op(t[0], k=k)


def eager(k: int) -> Any:
    """As models write it."""

    def routed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), experts.int()

    return routed


def routing_job(tokens: int, experts: int, k: int) -> Job:
    """``topk_routing``: logits in, weights and ids out."""
    made, absent = ours("topk_routing")
    plain, fused = eager(k), compiled(eager(k))
    moved = tokens * (experts * 4 + 8 * k)
    return Job(
        "topk_routing",
        {"T": tokens, "E": experts, "K": k},
        lambda: (noise(tokens, experts, dtype=torch.float32),),
        {name: route(op, k) for name, op in made.items()}
        | {"torch": lambda t: plain(t[0]), "torch.compile": lambda t: fused(t[0])},
        Floor(moved),
        Floor(moved + tokens * (2 * experts * 4 + 8 * k)),
        torch.float32,
        absent,
        tolerance=1e-4,
    )


def route_job(tokens: int, experts: int, k: int) -> Job:
    """``route``: logits in, weights and order out; what a layer does before it moves a row."""
    made, absent = ours("route")
    choose = eager(k)

    def plain(logits: torch.Tensor) -> Tensors:
        weights, chosen = choose(logits)
        ids, source = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(experts, dtype=ids.dtype, device=ids.device), right=True)
        place = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=ids.device))
        return weights, source.int(), place.int(), ends.int()

    def unimega(op: Any) -> Function:
        def call(t: Tensors) -> Tensors:
            weights, _, order = op(t[0], k=k)
            return weights, order.source, order.place.flatten(), order.offsets[1:]

        return call

    fused = compiled(plain)
    moved = tokens * (experts * 4 + 16 * k)
    return Job(
        "route",
        {"T": tokens, "E": experts, "K": k},
        lambda: (noise(tokens, experts, dtype=torch.float32),),
        {name: unimega(op) for name, op in made.items()}
        | {"torch": lambda t: plain(t[0]), "torch.compile": lambda t: fused(t[0])},
        Floor(moved),
        Floor(moved),
        torch.float32,
        absent,
        tolerance=1e-4,
        passes=("forward",),
    )


def order_leaves(tokens: int, experts: int, k: int) -> Tensors:
    """Ids of k different experts a token: int32 [T, K], int64 [T K], and booleans [T, E]."""
    ids = noise(tokens, experts, dtype=torch.float32, grad=False).topk(k).indices
    chosen = torch.zeros(tokens, experts, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    return ids.int(), ids.flatten(), chosen


def order_job(tokens: int, experts: int, k: int) -> Job:
    """``expert_order``: ids in, order out."""
    made, absent = ours("expert_order")
    slots = tokens * k
    capacity = 2 * slots // experts

    def sorted_map(t: Tensors) -> Tensors:
        rows = t[2].to(torch.int8).T.contiguous()
        return (rows.argsort(dim=-1, descending=True, stable=True)[:, :capacity].contiguous(),)

    def selected_map(t: Tensors) -> Tensors:
        rows = t[2].T.contiguous()
        numbers = torch.arange(tokens, device=rows.device).expand(experts, -1)
        return (numbers.masked_select(rows),)

    return Job(
        "expert_order",
        {"T": tokens, "E": experts, "K": k},
        lambda: order_leaves(tokens, experts, k),
        {name: lambda t, op=op: (op(t[0], experts).source,) for name, op in made.items()}  # type: ignore[misc]
        | {"torch argsort of int64": lambda t: (t[1].argsort(stable=True),)},
        Floor(12 * slots),
        Floor(12 * slots),
        torch.float32,
        absent,
        tolerance=0.0,
        unlike={"megatron-core argsort of E x T": sorted_map, "megatron-core masked_select of E x T": selected_map},
        passes=("forward",),
    )


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """All ops at each shape; in fp32 whatever ``dtype``."""
    for tokens, experts, k in SHAPES[sizes]:
        yield order_job(tokens, experts, k)
        yield routing_job(tokens, experts, k)
        yield route_job(tokens, experts, k)


if __name__ == "__main__":
    run(__doc__, jobs, dtypes=("fp32",))
