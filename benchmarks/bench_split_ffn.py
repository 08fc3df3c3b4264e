"""python benchmarks/bench_split_ffn.py: the FFN with a weight for each modality, beside boolean masks and a dense FFN.

Ours is what ``unimega.layers.ffn`` runs on one rank: ``split_linear`` on slices of rows in modality order, one SwiGLU
over all rows. ``masked`` picks the rows of each modality with ``x[mask]`` and puts them back with ``out[mask] = y``,
after asking the device whether there are any, as the original code does in every layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import Floor, Function, Job, Tensors, compiled, noise, ours, run
from syncs import count_syncs


@dataclass(frozen=True)
class Shape:
    """T tokens, one in four of them text, in documents that alternate; D width, F width of each modality's FFN."""

    tokens: int
    width: int
    ffn: int


SHAPES = {
    "tiny": (Shape(48, 32, 48),),
    "cpu": (Shape(2048, 512, 1408),),
    "gpu": (Shape(20480, 2048, 5632), Shape(20480, 3584, 9472)),
}
RUN = 16
"""Tokens of a run of one modality in input order; every fourth is text."""


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """One for each shape."""
    for shape in SHAPES[sizes]:
        yield job(shape, dtype)


def job(shape: Shape, dtype: torch.dtype) -> Job:
    """Leaves: x (its rows in modality order to ours, in input order to ``masked``), [gate; up] and down of each."""
    is_text = (torch.arange(shape.tokens) // RUN) % 4 == 0
    counts = (int(is_text.sum()), int((~is_text).sum()))
    device = noise(1, dtype=dtype, grad=False).device
    mask = is_text.to(device)
    linears, absent = ours("split_linear")
    gates = ours("swiglu")[0]

    def dense(t: Tensors) -> Tensors:
        gate, up = (t[0] @ t[1].t()).chunk(2, dim=-1)
        return ((F.silu(gate) * up) @ t[2].t(),)

    def masked(t: Tensors) -> Tensors:
        x = t[0]
        out = torch.zeros_like(x)
        for rows, (into, down) in ((mask, t[1:3]), (~mask, t[3:5])):
            if rows.any():
                gate, up = (x[rows] @ into.t()).chunk(2, dim=-1)
                out[rows] = (F.silu(gate) * up) @ down.t()
        return (out,)

    split = {name: ours_on(linear, gates, name, counts) for name, linear in linears.items()}
    flops = 6.0 * shape.tokens * shape.width * shape.ffn
    weights = 6 * shape.width * shape.ffn * dtype.itemsize
    rows = shape.tokens * dtype.itemsize
    return Job(
        "split_ffn",
        {"T": shape.tokens, "counts": counts, "D": shape.width, "F": shape.ffn},
        lambda: leaves(shape, dtype),
        split,
        Floor(2 * rows * shape.width + weights, flops),
        Floor(4 * rows * shape.width + 2 * weights, 3 * flops),
        dtype,
        absent,
        counters={"host_syncs": host_syncs},
        unlike={"masked": masked, "masked-compile": compiled(masked), "dense": dense},
    )


def ours_on(linear: Any, gates: dict[str, Any], name: str, counts: tuple[int, int]) -> Function:
    """The split FFN on the best SwiGLU there is, with the autograd function below in place of the collectives."""
    swiglu = next(iter(gates.values()))
    spans = ((0, counts[0]), (counts[0], sum(counts)))

    def call(t: Tensors) -> Tensors:
        hidden = swiglu(SplitLinear.apply(t[0], linear, spans, t[1], t[3]))
        return (SplitLinear.apply(hidden, linear, spans, t[2], t[4]),)

    return call


class SplitLinear(torch.autograd.Function):
    """``unimega.parallel.linear`` on one rank: the same calls of the op, no collectives."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: Any, spans: Any, *weights: torch.Tensor) -> torch.Tensor:
        """[T, d] -> [T, o]."""
        ctx.save_for_backward(x, *weights)
        ctx.linear, ctx.spans = linear, spans
        return linear.forward(x, spans, weights, [None] * len(weights))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of x and of each weight."""
        x, *weights = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = ctx.linear.grad_input(dy, ctx.spans, weights)
        return dx, None, None, *ctx.linear.grad_weight(dy, x, ctx.spans, ctx.needs_input_grad[3:])


def leaves(shape: Shape, dtype: torch.dtype) -> Tensors:
    """x, then two weights of text and two of vision."""
    pairs = [(noise(2 * shape.ffn, shape.width, dtype=dtype, scale=shape.width**-0.5), shape.ffn) for _ in range(2)]
    made = [noise(shape.tokens, shape.width, dtype=dtype)]
    for into, ffn in pairs:
        made += [into, noise(shape.width, ffn, dtype=dtype, scale=ffn**-0.5)]
    return tuple(made)


def host_syncs(function: Callable[[Tensors], Tensors], t: Tensors) -> int:
    """Times that the host would wait for a device in a forward and a backward."""
    return count_syncs(lambda: function(t)[0].sum().backward(inputs=[x for x in t if x.requires_grad]))[0]


if __name__ == "__main__":
    run(__doc__, jobs)
