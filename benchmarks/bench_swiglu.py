"""python benchmarks/bench_swiglu.py: ``silu(gate) * up`` on the columns [gate | up] of one product."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Floor, Function, Job, Tensors, add, compiled, liger, noise, ours, run

SHAPES = {"tiny": ((48, 64),), "cpu": ((4096, 2816),), "gpu": ((20480, 5632), (8192, 14336))}
"""(T, F)."""


def eager(t: Tensors) -> Tensors:
    """As models write it."""
    gate, up = t[0].chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def unimega(op: Any) -> Function:
    """One of ours."""
    return lambda t: (op(t[0]),)


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """One for each shape."""
    for rows, width in SHAPES[sizes]:
        made, absent = ours("swiglu")
        contestants = {name: unimega(op) for name, op in made.items()}
        contestants |= {"torch": eager, "torch.compile": compiled(eager)}
        peer = liger("ops.swiglu", "LigerSiLUMulFunction")
        add(contestants, absent, "liger", peer, lambda f: lambda t: (f.apply(*t[0].chunk(2, dim=-1)),))
        moved = rows * width * dtype.itemsize
        yield Job(
            "swiglu",
            {"T": rows, "F": width},
            lambda rows=rows, width=width: (noise(rows, 2 * width, dtype=dtype),),  # type: ignore[misc]
            contestants,
            Floor(3 * moved),
            Floor(8 * moved),
            dtype,
            absent,
        )


if __name__ == "__main__":
    run(__doc__, jobs)
