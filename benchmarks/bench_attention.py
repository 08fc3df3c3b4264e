"""python benchmarks/bench_attention.py: packed causal documents, and documents with images that are seen both ways."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from harness import Floor, Function, Job, Tensors, noise, ours, run

from unimega import backend
from unimega.batch import Intervals


@dataclass(frozen=True)
class Shape:
    """T tokens in documents of these lengths; ``image``: tokens in the middle of each that see each other both ways."""

    tokens: int
    shortest: int
    longest: int
    heads: int
    kv_heads: int
    width: int
    image: int = 0
    dense_mask: bool = True
    """Whether the peer with a T x T mask takes part; it is quadratic in T, in memory too."""


SHAPES = {
    "tiny": (Shape(96, 16, 48, 4, 2, 16), Shape(96, 24, 48, 4, 2, 16, image=8)),
    "cpu": (Shape(2048, 128, 512, 8, 2, 64), Shape(2048, 128, 512, 8, 2, 64, image=64)),
    "gpu": (
        Shape(16384, 512, 8192, 16, 8, 128, dense_mask=False),
        Shape(16384, 512, 2048, 16, 8, 128, image=256, dense_mask=False),
        Shape(4096, 512, 2048, 16, 8, 128, image=256),
    ),
}


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """One for each shape."""
    for shape in SHAPES[sizes]:
        yield job(shape, dtype)


def job(shape: Shape, dtype: torch.dtype) -> Job:
    """The peers: one call a document (as the original code does it), and one call with a dense mask."""
    lengths = draw_lengths(shape)
    starts = np.cumsum((0, *lengths[:-1]))
    blocks = [(s + n // 4, s + n // 4 + shape.image) for s, n in zip(starts.tolist(), lengths, strict=True)]
    host = Intervals.of_runs(lengths, both_ways=blocks if shape.image else ())
    intervals = backend.to_device(host)
    scale = shape.width**-0.5
    made, absent = ours("attention")

    def unimega(op) -> Function:  # type: ignore[no-untyped-def]
        return lambda t: (op(*t, intervals, scale=scale, rows=None, inverse=None),)

    keys = torch.arange(shape.tokens, device=intervals.lo.device)

    def mask(start: int, stop: int) -> torch.Tensor:
        own = keys[start:stop]
        return (own >= intervals.lo[start:stop, None]) & (own < intervals.hi[start:stop, None])

    def attend(t: Tensors, start: int, stop: int, seen: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (x[None, start:stop].transpose(1, 2) for x in t)
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)[0].flatten(1)

    def loop(t: Tensors) -> Tensors:
        spans = [(s, s + n) for s, n in zip(starts.tolist(), lengths, strict=True)]
        return (torch.cat([attend(t, a, b, None if host.causal else mask(a, b)) for a, b in spans]),)

    contestants = {name: unimega(op) for name, op in made.items()} | {"torch-loop": loop}
    if shape.dense_mask:
        contestants["torch-dense-mask"] = lambda t: (attend(t, 0, shape.tokens, mask(0, shape.tokens)),)
    pairs = int((host.hi.astype(np.int64) - host.lo).sum())
    rows = shape.tokens * (shape.heads + shape.kv_heads) * shape.width * dtype.itemsize
    forward = 4.0 * shape.heads * shape.width * pairs
    return Job(
        "attention",
        {"T": shape.tokens, "runs": len(lengths), "longest": max(lengths), "h": shape.heads, "k": shape.kv_heads}
        | {"N": shape.width, "image": shape.image},
        lambda: tuple(
            noise(shape.tokens, n, shape.width, dtype=dtype) for n in (shape.heads, shape.kv_heads, shape.kv_heads)
        ),
        contestants,
        Floor(2 * rows, forward),
        Floor(6 * rows, 3.5 * forward),
        dtype,
        absent,
    )


def draw_lengths(shape: Shape) -> tuple[int, ...]:
    """Documents of ``shortest`` to ``longest`` tokens; the last one takes what is left."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while (left := shape.tokens - sum(lengths)) > shape.longest:
        lengths.append(int(rng.integers(shape.shortest, min(shape.longest, left - shape.shortest) + 1)))
    return (*lengths, left)


if __name__ == "__main__":
    run(__doc__, jobs)
