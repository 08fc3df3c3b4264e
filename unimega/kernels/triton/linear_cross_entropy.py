"""The two passes over a chunk's logits in Triton; the GEMMs stay cuBLAS's, which no kernel of ours would reach."""

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from unimega.kernels.linear_cross_entropy import by_rows, in_chunks
from unimega.kernels.triton.launch import Launch, power_of_2

_COLUMNS = 4096


@triton.jit
def _statistics(logits, labels, out, total, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * width
    top = -float("inf")
    summed = 0.0
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(own + column, mask=column < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(value))
        summed = summed * tl.exp(top - higher) + tl.sum(tl.exp(value - higher))
        top = higher
    label = tl.load(labels + row).to(tl.int64)
    target = tl.load(own + label, mask=(label >= 0) & (label < width), other=0.0).to(tl.float32)
    tl.store(out + row, top)
    tl.store(out + total + row, summed)
    tl.store(out + 2 * total + row, target)


@triton.jit
def _gradient(logits, labels, lse, token_weights, z_loss, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * width
    label = tl.load(labels + row).to(tl.int64)
    level = tl.load(lse + row)
    weight = tl.load(token_weights + row)
    slope = weight * (1.0 + 2.0 * z_loss * level)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(own + column, mask=column < width, other=0.0).to(tl.float32)
        grad = tl.exp(value - level) * slope - tl.where(column == label, weight, 0.0)
        tl.store(own + column, grad.to(logits.dtype.element_ty), mask=column < width)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_rows: int,
    chunk: int | None = None,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``unimega.kernels.linear_cross_entropy``."""
    sizes = (vocab_start, vocab_rows, chunk)
    compute = by_rows(statistics, gradient)
    return in_chunks(compute, x, weight, labels, token_weights, *sizes, group=group, z_loss=z_loss)


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, None]:
    """One read of the logits, whatever the width of the vocabulary."""
    total, width = logits.shape
    out = logits.new_empty(3, total, dtype=torch.float32)
    _statistics[(total,)](logits, labels, out, total, width, **_options(width))
    return out, None


def gradient(
    logits: torch.Tensor,
    state: None,
    labels: torch.Tensor,
    lse: torch.Tensor,
    token_weights: torch.Tensor,
    z_loss: float,
) -> None:
    """One read and one write of the logits, in place."""
    total, width = logits.shape
    _gradient[(total,)](logits, labels, lse, token_weights, z_loss, width, **_options(width))


def _options(width: int) -> dict[str, int]:
    return {"COLUMNS": min(_COLUMNS, power_of_2(width)), "num_warps": 8}


_TYPES = {"logits": "*bf16", "labels": "*i32", "width": "i32"}
LAUNCHES = (
    Launch(
        "linear_cross_entropy_statistics",
        _statistics,
        _TYPES | {"out": "*fp32", "total": "i32"},
        {"COLUMNS": _COLUMNS},
        frozenset({"width"}),
        {"num_warps": 8},
    ),
    Launch(
        "linear_cross_entropy_gradient",
        _gradient,
        _TYPES | {"lse": "*fp32", "token_weights": "*fp32", "z_loss": "fp32"},
        {"COLUMNS": _COLUMNS},
        frozenset({"width"}),
        {"num_warps": 8},
    ),
)
