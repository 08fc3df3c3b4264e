"""``linear_cross_entropy`` on a CPU: logits [vocabulary, tokens], a slice of the vocabulary at a time.

Why not a row a token and whole GEMMs, as elsewhere: a slice is still in cache when its statistics and its gradient are
made, two of the three GEMMs transpose no large operand, and with tokens along memory csrc/softmax.cpp has no sums
across a vector. dx is the fp32 sum of its slices' products, each rounded to the dtype of x.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from unimega.kernels import compiled as helper
from unimega.kernels.linear_cross_entropy import Chunk, add_product, combine, in_chunks
from unimega.kernels.precision import widen

_SLICE_ELEMENTS = 2**20
_SLICE_ROWS = 1024, 4096

Statistics = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
Gradient = Callable[..., None]


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
    compute = partial(by_slices, statistics, gradient)
    return in_chunks(compute, x, weight, labels, token_weights, *sizes, group=group, z_loss=z_loss)


def compiled(
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
    """See ``unimega.kernels.linear_cross_entropy``: the passes over logits in C++, those of fp16 and fp64 in torch."""
    sizes = (vocab_start, vocab_rows, chunk)
    passes = (compiled_statistics, compiled_gradient) if x.dtype in _COMPILED else (statistics, gradient)
    compute = partial(by_slices, *passes)
    return in_chunks(compute, x, weight, labels, token_weights, *sizes, group=group, z_loss=z_loss)


def by_slices(statistics: Statistics, gradient: Gradient, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and lse [c] of a chunk; its ``dx`` and ``dw`` are written."""
    x, weight, labels, token_weights = chunk.x, chunk.weight, chunk.labels.long(), chunk.token_weights
    c, real = len(x), len(weight)
    logits = chunk.logits.view(real, c)
    top = token_weights.new_full((c,), torch.finfo(token_weights.dtype).min)
    total = torch.zeros_like(top)
    for part in _slices(real, c):
        statistics(torch.mm(weight[part], x.t(), out=logits[part]), top, total)
    row, owned = _rows(labels, real)
    lse, target = combine(torch.stack((top, total, widen(logits.gather(0, row)).squeeze(0) * owned)), chunk.group)
    if chunk.dx is None and chunk.dw is None:
        return lse - target, lse
    slope = token_weights * (1 + 2 * chunk.z_loss * lse)
    dx = None if chunk.dx is None else chunk.dx.to(token_weights.dtype)
    memory = torch.empty_like(logits[next(_slices(real, c))])
    for part in _slices(real, c):
        dlogits = memory[: part.stop - part.start]
        gradient(logits[part], dlogits, labels - part.start, lse, slope, token_weights)
        if dx is not None:
            add_product(dx, dlogits.t(), weight[part], first=part.start == 0)
        if chunk.dw is not None:
            add_product(chunk.dw[part], dlogits, x, chunk.first)
    if chunk.dx is not None and dx is not None:
        chunk.dx.copy_(dx)  # into itself where it is as wide
    return lse - target, lse


def statistics(logits: torch.Tensor, top: torch.Tensor, total: torch.Tensor) -> None:
    """Carry on, over columns of [s, c]: top [c], the largest logit so far; total [c], the sum of exp(logit - top)."""
    wide = widen(logits)
    higher = torch.maximum(top, wide.amax(dim=0))
    total.mul_((top - higher).exp_()).add_((wide - higher).exp_().sum(dim=0))
    top.copy_(higher)


def gradient(
    logits: torch.Tensor,
    out: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    slope: torch.Tensor,
    hit: torch.Tensor,
) -> None:
    """Out [s, c]: ``slope exp(logit - lse)``, less ``hit`` in the row that int64 labels [c] name, if one is named."""
    row, owned = _rows(labels, len(logits))
    p = (widen(logits) - lse).exp_().mul_(slope)
    out.copy_(p.scatter_add_(0, row, -(hit * owned)[None]))


_COMPILED = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def compiled_statistics(logits: torch.Tensor, *columns: torch.Tensor) -> None:
    """``statistics`` of csrc/softmax.cpp."""
    function = getattr(helper.softmax, f"softmax_statistics_{_COMPILED[logits.dtype]}")
    function(logits.data_ptr(), *logits.shape, *(t.data_ptr() for t in columns), torch.get_num_threads())


def compiled_gradient(logits: torch.Tensor, out: torch.Tensor, *columns: torch.Tensor) -> None:
    """``gradient`` of csrc/softmax.cpp."""
    function = getattr(helper.softmax, f"softmax_gradient_{_COMPILED[logits.dtype]}")
    addresses = (t.data_ptr() for t in columns)
    function(logits.data_ptr(), out.data_ptr(), *logits.shape, *addresses, torch.get_num_threads())


def _rows(labels: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the labels [1, c], the first or the last for another's, and whether they are among these rows [c]."""
    return labels.clamp(0, rows - 1)[None], (labels >= 0) & (labels < rows)


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Rows of the vocabulary whose logits stay in cache: not so few that sums of dx cost more than its products, nor so
    many that a product for dw is large."""
    fewest, most = _SLICE_ROWS
    step = min(max(_SLICE_ELEMENTS // columns, fewest), most)
    return (slice(low, min(low + step, rows)) for low in range(0, rows, step))
