"""python benchmarks/bench_experts.py: permute, unpermute and the FFN of routed experts, from the ids of the experts.

``expert_ffn``: every contestant makes its own order of the slots. Peers: a loop over experts as models write it (masks,
``nonzero``, ``index_add_``), and ``torch.nn.functional.grouped_mm`` between eager permutations.
``floor_flops``: the GEMMs; the bytes are those of weights, tokens and gradients.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import Floor, Function, Job, Tensors, noise, ours, run

from unimega import backend
from unimega.kernels import registry


@dataclass(frozen=True)
class Sizes:
    """Tokens, width, width of an expert, experts, experts a token."""

    t: int
    d: int
    f: int
    e: int
    k: int


SIZES = {
    "tiny": (Sizes(48, 32, 16, 8, 2),),
    "cpu": (Sizes(4096, 512, 256, 64, 8),),
    "gpu": (Sizes(16384, 2048, 1024, 64, 8), Sizes(16384, 2048, 768, 128, 8)),
}


def ids(s: Sizes) -> torch.Tensor:
    """[T, K] int32, different experts in a row."""
    return noise(s.t, s.e, dtype=torch.float32, grad=False).topk(s.k).indices.int()


def loop(t: Tensors) -> Tensors:
    """One expert after the other."""
    x, gate_up, down, weights, experts = t
    total = torch.zeros_like(x)
    for number in range(len(down)):
        token, slot = torch.where(experts == number)
        gate, up = F.linear(x[token], gate_up[number]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[number]) * weights[token, slot, None]
        total.index_add_(0, token, y.to(x.dtype))
    return (total,)


def grouped_mm(t: Tensors) -> Tensors:
    """Sort, gather, grouped GEMMs, weigh, back, sum."""
    x, gate_up, down, weights, experts = t
    k = experts.shape[1]
    sorted_ids, source = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(len(down), device=x.device), right=True, out_int32=True)
    gate, up = F.grouped_mm(x[source // k], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    y = (y * weights.flatten()[source][:, None]).to(x.dtype)
    back = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=x.device))
    return (y[back].view(-1, k, x.shape[1]).sum(dim=1),)


def ffn_job(s: Sizes, dtype: torch.dtype) -> Job:
    """``expert_ffn``."""
    made, absent = ours("expert_ffn")
    order = registry.resolve("expert_order", device=backend.current().device)

    def unimega(op: Any) -> Function:
        return lambda t: (op(*t[:4], order(t[4], s.e)),)

    def leaves() -> Tensors:
        return (
            noise(s.t, s.d, dtype=dtype),
            noise(s.e, 2 * s.f, s.d, dtype=dtype, scale=s.d**-0.5),
            noise(s.e, s.d, s.f, dtype=dtype, scale=s.f**-0.5),
            noise(s.t, s.k, dtype=torch.float32),
            ids(s),
        )

    flops = 6.0 * s.t * s.k * s.d * s.f
    held = dtype.itemsize * (2 * s.t * s.d + 3 * s.e * s.d * s.f)
    return Job(
        "expert_ffn",
        asdict(s),
        leaves,
        {name: unimega(op) for name, op in made.items() if device_fast(name)}
        | {"torch grouped_mm, eager permutation": grouped_mm, "torch loop over experts": loop},
        Floor(held, flops),
        Floor(3 * held, 3 * flops),
        dtype,
        absent,
    )


def device_fast(name: str) -> bool:
    """The reference in tiles shows numbers; beside a row that is made for the device its time says nothing."""
    return name != "unimega-reference"


def permute_job(s: Sizes, dtype: torch.dtype) -> Job:
    """``permute``, whose gradient is a sum."""
    made, absent = ours("permute")
    order = registry.resolve("expert_order", device=backend.current().device)(ids(s), s.e)
    token = (order.source // s.k).long()
    moved = dtype.itemsize * s.d * (s.t + s.t * s.k)
    return Job(
        "permute",
        asdict(s),
        lambda: (noise(s.t, s.d, dtype=dtype),),
        {name: lambda t, op=op: (op(t[0], order),) for name, op in made.items()}  # type: ignore[misc]
        | {"torch": lambda t: (t[0][token],)},
        Floor(moved),
        Floor(2 * moved),
        dtype,
        absent,
    )


def unpermute_job(s: Sizes, dtype: torch.dtype) -> Job:
    """``unpermute`` with weights."""
    made, absent = ours("unpermute")
    order = registry.resolve("expert_order", device=backend.current().device)(ids(s), s.e)
    place = order.place.long()
    moved = dtype.itemsize * s.d * (s.t + s.t * s.k)
    return Job(
        "unpermute",
        asdict(s),
        lambda: (noise(s.t * s.k, s.d, dtype=dtype), noise(s.t, s.k, dtype=torch.float32)),
        {name: lambda t, op=op: (op(t[0], t[1], order),) for name, op in made.items()}  # type: ignore[misc]
        | {"torch": lambda t: ((t[0][place] * t[1][:, :, None]).sum(dim=1).to(dtype),)},
        Floor(moved),
        Floor(2 * moved + dtype.itemsize * s.d * s.t * s.k),
        dtype,
        absent,
    )


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """The ops at each shape."""
    for each in SIZES[sizes]:
        yield ffn_job(each, dtype)
    yield permute_job(SIZES[sizes][0], dtype)
    yield unpermute_job(SIZES[sizes][0], dtype)


if __name__ == "__main__":
    run(__doc__, jobs)
