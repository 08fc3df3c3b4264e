"""python benchmarks/bench_rms_norm.py: RMS norm, alone and with the residual sum, one weight and one per modality."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Floor, Function, Job, Tensors, add, compiled, liger, noise, ours, run

EPS = 1e-6
SHAPES = {"tiny": ((48, 64),), "cpu": ((4096, 1024),), "gpu": ((20480, 2048), (16384, 4096))}
"""(T, D)."""


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """The norm with one weight and with two, then the sum and norm."""
    for rows, width in SHAPES[sizes]:
        for counts in ((rows,), (rows // 4, rows - rows // 4)):
            yield norm(rows, width, counts, dtype)
        yield sum_and_norm(rows, width, dtype)


def norm(rows: int, width: int, counts: tuple[int, ...], dtype: torch.dtype) -> Job:
    """``rms_norm``; two weights have no peer but eager torch on slices."""

    def eager(t: Tensors) -> Tensors:
        parts = zip(t[0].split(counts), t[1:], strict=True)
        return (torch.cat([F.rms_norm(x, (width,), weight, EPS) for x, weight in parts]),)

    made, absent = ours("rms_norm")

    def unimega(op: Any) -> Function:
        return lambda t: (op(t[0], t[1:], counts, EPS),)

    contestants = {name: unimega(op) for name, op in made.items()}
    contestants |= {"torch": eager, "torch.compile": compiled(eager)}
    if len(counts) == 1:
        peer = liger("ops.rms_norm", "LigerRMSNormFunction")
        add(contestants, absent, "liger", peer, lambda f: lambda t: (f.apply(t[0], t[1], EPS, 0.0, "llama", False),))
    moved = rows * width * dtype.itemsize
    return Job(
        "rms_norm",
        {"T": rows, "D": width, "weights": len(counts)},
        lambda: (noise(rows, width, dtype=dtype), *(noise(width, dtype=dtype) for _ in counts)),
        contestants,
        Floor(2 * moved),
        Floor(5 * moved),
        dtype,
        absent,
    )


def sum_and_norm(rows: int, width: int, dtype: torch.dtype) -> Job:
    """``add_rms_norm``."""

    def eager(t: Tensors) -> Tensors:
        total = t[0] + t[1]
        return F.rms_norm(total, (width,), t[2], EPS), total

    made, absent = ours("add_rms_norm")

    def unimega(op: Any) -> Function:
        return lambda t: op(t[0], t[1], t[2:], (rows,), EPS)

    contestants = {name: unimega(op) for name, op in made.items()}
    contestants |= {"torch": eager, "torch.compile": compiled(eager)}
    peer = liger("ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    add(contestants, absent, "liger", peer, lambda f: lambda t: f.apply(t[0], t[1], t[2], EPS, 0.0, "llama", False))
    moved = rows * width * dtype.itemsize
    return Job(
        "add_rms_norm",
        {"T": rows, "D": width},
        lambda: (noise(rows, width, dtype=dtype), noise(rows, width, dtype=dtype), noise(width, dtype=dtype)),
        contestants,
        Floor(4 * moved),
        Floor(8 * moved),
        dtype,
        absent,
    )


if __name__ == "__main__":
    run(__doc__, jobs)
