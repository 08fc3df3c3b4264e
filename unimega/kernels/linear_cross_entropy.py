"""Head and loss without the logits: ``loss = sum_i w_i (ce_i + z lse_i^2)``, ``ce_i = lse_i - x_i W_label(i)``.

``lse_i = log(sum_j exp(x_i W_j))``, z: ``z_loss``, which keeps lse near 0 (PaLM, arXiv:2204.02311, section 5).

``linear_cross_entropy(x, weight, labels, token_weights, *, group, vocab_start, vocab_rows, chunk=None, z_loss=0.0)
-> loss, ce``

x: [n, D], the rows that carry loss, the same on all ranks of ``group``.
weight: [v, D], this rank's rows of the vocabulary, ids ``vocab_start .. vocab_start + v``, v the same on all ranks; ids
from ``vocab_rows`` on are padding: no part in the softmax, zero gradient.
labels: int [n], global ids below ``vocab_rows``. token_weights: float [n].
group: None or a ProcessGroup over which the vocabulary is cut.
chunk: rows at a time, the same on all ranks; None: so many that their logits take 96 MiB on a CPU and 1 GiB elsewhere,
but 1024 to 4096 of them: each chunk reads and rewrites the whole fp32 weight gradient.
loss: scalar, the same on all ranks. ce: [n], detached. Both fp32 (fp64 for fp64).
Gradients: of x, this rank's part, which the caller sums over ``group``; of weight. With p the softmax,
``dlogits = w (p (1 + 2 z lse) - onehot(label))``, ``dx = dlogits W``, ``dW = dlogits^T x``.

GEMMs in the dtype of x with fp32 accumulation, logits and dlogits rounded to it; statistics in fp32; dW summed over
chunks in fp32. The gradients are computed in forward, chunk by chunk, so that n x v logits never exist beyond one
chunk, and only those that are needed; saved for backward: dx [n, D] and dW [v, D] in fp32. Under ``no_grad`` neither is
computed.
Operations: 2 n v D for the loss, 4 n v D for the gradients. Collectives: one all-gather of [3, rows] fp32 a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from unimega.kernels import compiled as helper
from unimega.kernels import registry
from unimega.kernels.precision import widen

_LOGITS_BYTES, _LOGITS_BYTES_ON_CPU = 2**30, 96 * 2**20
_FEWEST_ROWS, _MOST_ROWS = 1024, 4096
_SLICE_ELEMENTS = 2**21

Statistics = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]
Gradient = Callable[[torch.Tensor, Any, torch.Tensor, torch.Tensor, torch.Tensor, float], None]


@dataclass(frozen=True)
class Chunk:
    """The rows of one turn: c of n, of which an implementation makes cross-entropy, lse and gradients."""

    x: torch.Tensor
    """[c, D]."""
    weight: torch.Tensor
    """[real, D]: this rank's rows of the vocabulary without padding; there may be none."""
    labels: torch.Tensor
    """int [c], relative to the first row of ``weight``, and out of range where another rank has them."""
    token_weights: torch.Tensor
    """fp32 [c]."""
    logits: torch.Tensor
    """[c * real] in the dtype of x: memory that all chunks share."""
    dx: torch.Tensor | None
    """[c, D] to be written, or None where it is not needed."""
    dw: torch.Tensor | None
    """fp32 [real, D], to which this chunk's part is added, or None where it is not needed."""
    first: bool
    """Whether ``dw`` holds nothing yet and is to be written."""
    group: dist.ProcessGroup | None
    z_loss: float


Compute = Callable[[Chunk], tuple[torch.Tensor, torch.Tensor]]


def reference(
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
    """See the module: the definition in plain torch."""
    sizes = (vocab_start, vocab_rows, chunk)
    compute = by_rows(statistics, gradient)
    return in_chunks(compute, x, weight, labels, token_weights, *sizes, group=group, z_loss=z_loss)


def in_chunks(
    compute: Compute,
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    vocab_start: int,
    vocab_rows: int,
    chunk: int | None,
    *,
    group: dist.ProcessGroup | None,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op, from what an implementation does with a chunk: cross-entropy [c] and lse [c], and its gradients."""
    if chunk is None:  # from sizes that are equal on all ranks, or they would enter different numbers of collectives
        total = _LOGITS_BYTES_ON_CPU if x.device.type == "cpu" else _LOGITS_BYTES
        rows = total // (weight.shape[0] * x.element_size()) // _FEWEST_ROWS * _FEWEST_ROWS
        chunk = min(max(rows, _FEWEST_ROWS), _MOST_ROWS)
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    real = min(max(vocab_rows - vocab_start, 0), weight.shape[0])
    compute = compute if real else _padding_alone
    return _LinearCrossEntropy.apply(
        x, weight, labels, token_weights, compute, vocab_start, real, chunk, needs, group, z_loss
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor,
        compute: Compute,
        start: int,
        real: int,
        chunk: int,
        needs: tuple[bool, bool],
        group: dist.ProcessGroup | None,
        z_loss: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.shape[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        ce = torch.empty(rows, dtype=dtype, device=x.device)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        dw = torch.empty(weight.shape, dtype=dtype, device=x.device) if needs[1] else None
        if dw is not None:
            dw[real if rows else 0 :].zero_()
        token_weights = token_weights.to(dtype).contiguous()  # passes take addresses
        loss = token_weights.new_zeros(())
        logits = x.new_empty(min(chunk, rows) * real)  # for all chunks: fresh pages cost a CPU a tenth of a GEMM
        for low in range(0, rows, chunk):
            part = slice(low, min(low + chunk, rows))
            own = Chunk(
                x[part],
                weight[:real],
                labels[part] - start,
                token_weights[part],
                logits[: (part.stop - low) * real],
                None if dx is None else dx[part],
                None if dw is None else dw[:real],
                low == 0,
                group,
                z_loss,
            )
            ce[part], lse = compute(own)
            loss += torch.dot(own.token_weights, ce[part] if not z_loss else ce[part] + z_loss * lse.square())
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(ce)
        return loss, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else dx * d_loss.to(dx.dtype)
        dw = None if dw is None else _scaled(dw, d_loss, ctx.weight_dtype)
        return dx, dw, *(None,) * 9


def _scaled(dw: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``dw * factor`` in another dtype, without a second fp32 copy of it."""
    scaled = torch.empty_like(dw, dtype=dtype)
    for part in _slices(dw):
        torch.mul(dw[part], factor, out=scaled[part])
    return scaled


def _slices(dw: torch.Tensor) -> Iterator[slice]:
    """Rows of a weight gradient, a bounded number of elements at a time."""
    step = max(1, _SLICE_ELEMENTS // max(1, dw.shape[1])) if dw.device.type == "cpu" else max(1, len(dw))
    return (slice(low, low + step) for low in range(0, len(dw), step))


def _padding_alone(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """For a rank without a row of the vocabulary: it still takes part in the collective."""
    if chunk.dx is not None:
        chunk.dx.zero_()
    mine = chunk.token_weights.new_tensor((-torch.inf, 0.0, 0.0)).repeat(len(chunk.x), 1).t().contiguous()
    lse, target = combine(mine, chunk.group)
    return lse - target, lse


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """``out += a @ b``, or ``out = a @ b`` where it is the first; out may be wider than the product."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=0 if first else 1)
    elif first:
        out.copy_(a @ b)
    else:
        out += a @ b


def by_rows(statistics: Statistics, gradient: Gradient) -> Compute:
    """Logits [c, real], a row a token, from an implementation's two passes over them; whole GEMMs."""

    def compute(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, labels, token_weights = chunk.x, chunk.weight, chunk.labels, chunk.token_weights
        logits = chunk.logits.view(len(x), len(weight))
        torch.mm(x, weight.t(), out=logits)
        mine, state = statistics(logits, labels)
        lse, target = combine(mine, chunk.group)
        if chunk.dx is not None or chunk.dw is not None:
            gradient(logits, state, labels, lse, token_weights, chunk.z_loss)
        if chunk.dx is not None:
            torch.mm(logits, weight, out=chunk.dx)
        if chunk.dw is not None:
            for part in _slices(chunk.dw):
                add_product(chunk.dw[part], logits[:, part].t(), x, chunk.first)
        return lse - target, lse

    return compute


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """[3, c] fp32: the largest logit l of each row, sum of exp(l_j - l), the target's logit or 0 where it is elsewhere.

    Args:
        logits: [c, v].
        labels: [c], relative to the first column; outside of 0 .. v: another rank's.

    Returns:
        Those, and what ``gradient`` takes as its state: here exp(l_j - l) and l, so that no exponential is
        computed twice; logits in fp32 are overwritten by them.
    """
    wide = widen(logits)
    owned = (labels >= 0) & (labels < logits.shape[1])
    column = labels.clamp(0, logits.shape[1] - 1).long()[:, None]
    top = wide.amax(dim=1)
    target = wide.gather(1, column).squeeze(1) * owned
    total = wide.sub_(top[:, None]).exp_().sum(dim=1)
    return torch.stack((top, total, target)), (wide, top)


def gradient(
    logits: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    lse: torch.Tensor,
    token_weights: torch.Tensor,
    z_loss: float,
) -> None:
    """Overwrite logits [c, v] with their gradient ``w (p (1 + 2 z lse) - onehot)``, rounded to their dtype."""
    wide, top = state
    owned = (labels >= 0) & (labels < logits.shape[1])
    column = labels.clamp(0, logits.shape[1] - 1).long()[:, None]
    wide.mul_(((top - lse).exp_() * token_weights * (1 + 2 * z_loss * lse))[:, None])
    wide.scatter_add_(1, column, (-token_weights * owned)[:, None])
    if wide is not logits:
        logits.copy_(wide)


def combine(mine: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and target logit [c] over the whole vocabulary, from each rank's ``statistics``."""
    if group is None or group.size() == 1:
        return mine[0] + mine[1].log(), mine[2]
    everyone = mine.new_empty(group.size() * 3, mine.shape[1])
    dist.all_gather_into_tensor(everyone, mine, group=group)
    tops, totals, targets = everyone.view(group.size(), 3, -1).unbind(1)
    highest = tops.amax(dim=0)
    return highest + (totals * (tops - highest).exp()).sum(dim=0).log(), targets.sum(dim=0)


registry.declare(
    "linear_cross_entropy",
    registry.triton("linear_cross_entropy:linear_cross_entropy"),
    registry.Impl("cpp", f"{__name__}_cpu:compiled", frozenset({"cpu"}), helper.why_no_softmax),
    registry.Impl("cpu", f"{__name__}_cpu:linear_cross_entropy", frozenset({"cpu"})),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
