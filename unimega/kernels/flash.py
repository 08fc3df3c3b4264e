"""Attention by flash-attn's or torch's varlen kernel where intervals are causal, else by our Triton kernel.

Both know runs by their borders and take grouped heads as they are. Neither takes fp32 or an odd width of a head: such
calls are Triton's too. Everything that decides is on the host. Never run on a GPU by us.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega.batch import Intervals
from unimega.errors import optional
from unimega.kernels.triton.attention import attention as by_intervals

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Intervals, float], torch.Tensor]
"""(q, k, v, intervals, scale) -> [T, h, N] in the order of q; differentiable."""

_WIDEST_HEAD = 256


def flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    scale: float,
    rows: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    """See ``unimega.kernels.attention``; ``deterministic``: a call repeats bit for bit, at some cost in backward."""
    return _choose(_flash_attn, q, k, v, intervals, scale, rows, inverse)


def torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    scale: float,
    rows: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    """See ``unimega.kernels.attention``; its backward repeats bit for bit if torch is told to be deterministic."""
    return _choose(_torch_varlen, q, k, v, intervals, scale, rows, inverse)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, scale: float) -> torch.Tensor:
    borders, longest = intervals.cu_seqlens, intervals.longest
    return optional("flash_attn", extra="flash-attn").flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        deterministic=True,
    )


def _torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, scale: float
) -> torch.Tensor:
    borders, longest = intervals.cu_seqlens, intervals.longest
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _choose(
    varlen: Varlen,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    scale: float,
    rows: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    width = q.shape[-1]
    takes = q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= _WIDEST_HEAD
    if not (intervals.causal and takes and q.shape[0]):
        return by_intervals(q, k, v, intervals, scale=scale, rows=rows, inverse=inverse)
    out = varlen(q, k, v, intervals, scale).flatten(1)
    return out if rows is None else _Scatter.apply(out, rows, inverse)


class _Scatter(torch.autograd.Function):
    """The attention's order to modality order: a gather both ways, where autograd's own would add atomically."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.rows = rows
        return out.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.index_select(0, ctx.rows), None, None
