"""The passes of ``linear_cross_entropy`` over logits on a CPU: a few rows at a time, which stay in cache.

The reference passes over whole chunks seven times, in fp32: as long as half of its GEMMs take where memory is slow.
``softmax`` of torch is one vectorised loop, and ``lse = top - log(max p)`` follows from it: max p >= 1 / v.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from unimega.kernels.linear_cross_entropy import in_chunks
from unimega.kernels.precision import widen

_BLOCK_ELEMENTS = 2**18


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
    return in_chunks(
        statistics, gradient, x, weight, labels, token_weights, *sizes, group=group, z_loss=z_loss, at_once=at_once
    )


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference's; the state is each row's own log-sum-exp [c]."""
    column, owned = _columns(logits, labels)
    top = widen(logits.amax(dim=1))
    target = widen(logits.gather(1, column)).squeeze(1) * owned
    highest = torch.empty_like(top)
    for part in _blocks(logits):
        highest[part] = torch.softmax(widen(logits[part]), dim=1).amax(dim=1)
    return torch.stack((top, 1 / highest, target)), top - highest.log()


def gradient(
    logits: torch.Tensor,
    state: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    token_weights: torch.Tensor,
    z_loss: float,
) -> None:
    """As the reference's: p of the whole vocabulary is p of this rank's part times ``exp(own lse - lse)``."""
    column, owned = _columns(logits, labels)
    slope = (state - lse).exp_() * token_weights * (1 + 2 * z_loss * lse)
    for part in _blocks(logits):
        p = torch.softmax(widen(logits[part]), dim=1)
        logits[part] = _finished(p, slope[part], column[part], (token_weights * owned)[part])


def at_once(
    logits: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse, target) [c] of a vocabulary that lies on one rank, and logits overwritten with their gradient: one pass."""
    column = labels.long()[:, None]
    target = widen(logits.gather(1, column)).squeeze(1)
    lse = widen(logits.amax(dim=1))
    for part in _blocks(logits):
        p = torch.softmax(widen(logits[part]), dim=1)
        lse[part] -= p.amax(dim=1).log_()
        slope = token_weights[part] * (1 + 2 * z_loss * lse[part])
        logits[part] = _finished(p, slope, column[part], token_weights[part])
    return lse, target


def _finished(p: torch.Tensor, slope: torch.Tensor, column: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
    """``slope p - hit onehot(column)``, in place."""
    return p.mul_(slope[:, None]).scatter_add_(1, column, -hit[:, None])


def _columns(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the labels [c, 1], 0 or the last for another rank's, and whether they are this rank's [c]."""
    width = logits.shape[1]
    return labels.clamp(0, width - 1).long()[:, None], (labels >= 0) & (labels < width)


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Rows, a few at a time: 1 MiB in fp32, which is half of a core's cache."""
    rows, width = logits.shape
    step = max(1, _BLOCK_ELEMENTS // width)
    return (slice(low, min(low + step, rows)) for low in range(0, rows, step))
