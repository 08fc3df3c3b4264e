"""python benchmarks/bench_linear_cross_entropy.py: head and loss, all rows scored and a third of them without loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import Floor, Function, Job, Tensors, add, compiled, liger, noise, ours, run

IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """T tokens, D width, V rows of the vocabulary, and one in how many tokens carries no loss (0: none)."""

    tokens: int
    width: int
    vocabulary: int
    silent: int = 0


SHAPES = {
    "tiny": (Shape(48, 32, 96), Shape(48, 32, 96, silent=3)),
    "cpu": tuple(Shape(4096, 512, v, silent) for v in (48000, 160128) for silent in (0, 3)),
    "gpu": tuple(Shape(8192, 2048, 160128, silent) for silent in (0, 3)),
}


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """One for each shape."""
    for shape in SHAPES[sizes]:
        yield job(shape, dtype)


def job(shape: Shape, dtype: torch.dtype) -> Job:
    """The peers compute every row; ours is told on the host which rows carry loss, as the loader tells the engine.

    ``logits-fp32`` is what models of transformers and the original code do: logits widened before ``cross_entropy``.
    ``logits`` leaves them in the dtype of x, and its loss is rounded to it, as that of ``F.linear_cross_entropy`` is.
    """
    made, absent = ours("linear_cross_entropy")
    labels = torch.randint(shape.vocabulary, (shape.tokens,), generator=torch.Generator().manual_seed(0))
    if shape.silent:
        labels[:: shape.silent] = IGNORED
    host_rows = torch.nonzero(labels != IGNORED).squeeze(1)
    device = noise(1, dtype=dtype, grad=False).device
    scored, rows, labels = labels[host_rows].to(device), host_rows.to(device), labels.to(device)
    weights = torch.full((len(rows),), 1 / len(rows), device=device)

    def unimega(op: Any) -> Function:
        def call(t: Tensors) -> Tensors:
            x = t[0].index_select(0, rows) if shape.silent else t[0]
            return op(x, t[1], scored, weights, group=None, vocab_start=0, vocab_rows=shape.vocabulary)[:1]

        return call

    def wide(t: Tensors) -> Tensors:
        return (F.cross_entropy((t[0] @ t[1].t()).float(), labels),)

    def narrow(t: Tensors) -> Tensors:
        return (F.cross_entropy(t[0] @ t[1].t(), labels).float(),)

    contestants = {name: unimega(op) for name, op in made.items()}
    contestants |= {"logits-fp32": wide, "logits": narrow, "torch.compile": compiled(wide)}
    fused = getattr(F, "linear_cross_entropy", "this torch has no linear_cross_entropy")
    add(contestants, absent, "F.linear_cross_entropy", fused, lambda f: lambda t: (f(t[0], t[1], labels).float(),))
    options = getattr(torch.nn, "LinearCrossEntropyOptions", "this torch has no LinearCrossEntropyOptions")
    add(contestants, absent, "F.linear_cross_entropy-chunked", options, lambda o: chunked(fused, o(), labels))
    peer = liger("ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    add(contestants, absent, "liger", peer, lambda f: lambda t: (f.apply(t[0], t[1], labels)[0],))
    held = (shape.tokens + shape.vocabulary) * shape.width * dtype.itemsize
    product = 2.0 * len(rows) * shape.vocabulary * shape.width
    return Job(
        "linear_cross_entropy",
        {"T": shape.tokens, "D": shape.width, "V": shape.vocabulary, "rows_with_loss": len(rows)},
        lambda: (
            noise(shape.tokens, shape.width, dtype=dtype),
            noise(shape.vocabulary, shape.width, dtype=dtype, scale=shape.width**-0.5),
        ),
        contestants,
        Floor(held, product),
        Floor(2 * held, 3 * product),
        dtype,
        absent,
        passes=("both",),
    )


def chunked(fused: Any, options: Any, labels: torch.Tensor) -> Function:
    """torch's own loss in chunks."""
    return lambda t: (fused(t[0], t[1], labels, options=options).float(),)


if __name__ == "__main__":
    run(__doc__, jobs)
