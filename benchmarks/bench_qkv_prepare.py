"""python benchmarks/bench_qkv_prepare.py: q/k norm, RoPE and the gather into document order, after the qkv product."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Floor, Function, Job, Tensors, add, compiled, liger, noise, ours, run

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """T tokens, half of them of each modality; q and k have a norm for each."""

    tokens: int
    heads: int
    kv_heads: int
    width: int


SHAPES = {"tiny": (Shape(48, 4, 2, 16),), "cpu": (Shape(4096, 8, 2, 64),), "gpu": (Shape(20480, 16, 8, 128),)}


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """With norms and the gather, and RoPE alone."""
    for shape in SHAPES[sizes]:
        for norms in (True, False):
            yield job(shape, dtype, norms=norms)


def job(shape: Shape, dtype: torch.dtype, *, norms: bool) -> Job:
    """The peers: eager torch as the layers of transformers write it, and Liger's RoPE where nothing else is asked."""
    total, heads, kv_heads, width = shape.tokens, shape.heads, shape.kv_heads, shape.width
    counts, group = (total // 2, total - total // 2), heads // kv_heads
    angles = noise(total, width // 2, dtype=torch.float32, grad=False)
    cos, sin = angles.cos(), angles.sin()
    both_cos, both_sin = (torch.cat((t, t), dim=1)[:, None].to(dtype) for t in (cos, sin))
    rows = torch.randperm(total, device=cos.device).int() if norms else None
    inverse = rows.argsort().int() if rows is not None else None
    made, absent = ours("qkv_prepare")

    def unimega(op) -> Function:  # type: ignore[no-untyped-def]
        sizes = {"heads": heads, "kv_heads": kv_heads, "eps": EPS, "inverse": inverse}
        return lambda t: op(t[0], t[1:3] or None, t[3:5] or None, counts, cos, sin, rows, **sizes)

    def rope(x: torch.Tensor) -> torch.Tensor:
        turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * both_cos + turned * both_sin

    def norm(x: torch.Tensor, weights: Tensors) -> torch.Tensor:
        return torch.cat([F.rms_norm(p, (width,), w, EPS) for p, w in zip(x.split(counts), weights, strict=True)])

    def eager(t: Tensors) -> Tensors:
        blocks = t[0].view(total, kv_heads, group + 2, width)
        q, k, v = blocks[:, :, :group].reshape(total, heads, width), blocks[:, :, group], blocks[:, :, group + 1]
        if norms:
            q, k = norm(q, t[1:3]), norm(k, t[3:5])
        q, k = rope(q), rope(k)
        return (q, k, v.contiguous()) if rows is None else tuple(x.index_select(0, rows) for x in (q, k, v))

    contestants = {name: unimega(op) for name, op in made.items()} | {"torch": eager, "torch.compile": compiled(eager)}
    if not norms:
        whole_cos, whole_sin = both_cos.transpose(0, 1), both_sin.transpose(0, 1)

        def liger_rope(f) -> Function:  # type: ignore[no-untyped-def]
            def call(t: Tensors) -> Tensors:
                blocks = t[0].view(total, kv_heads, group + 2, width)
                q, k = blocks[:, :, :group].reshape(1, total, heads, width), blocks[None, :, :, group]
                q, k = f.apply(q.transpose(1, 2), k.transpose(1, 2), whole_cos, whole_sin)
                return q.transpose(1, 2)[0], k.transpose(1, 2)[0], blocks[:, :, group + 1].contiguous()

            return call

        add(contestants, absent, "liger", liger("ops.rope", "LigerRopeFunction"), liger_rope)
    moved = total * (heads + 2 * kv_heads) * width * dtype.itemsize
    return Job(
        "qkv_prepare",
        {"T": total, "h": heads, "k": kv_heads, "N": width, "norms": norms, "gather": norms},
        lambda: (
            noise(total, (heads + 2 * kv_heads) * width, dtype=dtype),
            *(noise(width, dtype=dtype) for _ in range(4 if norms else 0)),
        ),
        contestants,
        Floor(2 * moved),
        Floor((5 if norms else 4) * moved),
        dtype,
        absent,
    )


if __name__ == "__main__":
    run(__doc__, jobs)
