"""Permutation of rows and the weighted sum back in Triton: each row is read once and written once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.triton.launch import Launch, cdiv, tile


@triton.jit
def _gather(
    y, weights, place, behind, out, total, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over the slots of each token. ``behind``: address of the number of rows that have an expert."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = tl.load(behind)
    value = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(K):
        slot = row.to(tl.int64) * K + j
        at = tl.load(place + slot, mask=row < total, other=real)
        inside = (at < real)[:, None] & (column < width)[None, :]
        own = tl.load(y + at.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            own = own * tl.load(weights + slot, mask=at < real, other=0.0).to(tl.float32)[:, None]
        value += own
    inside = (row < total)[:, None] & (column < width)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    x, weights, y, source, behind, out, d_weights, total, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, WRITE: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of tokens in expert-major order, times the slots' weights; ``DOT``: their products with the rows of y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(source + row, mask=row < total, other=0)
    real = (row < tl.load(behind)) & (row < total)
    start = row.to(tl.int64)[:, None] * width
    begin = (slot // K).to(tl.int64)[:, None] * width
    if WEIGHTED:
        weight = tl.load(weights + slot, mask=real, other=0.0).to(tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = real[:, None] & (column < width)[None, :]
        value = tl.load(x + begin + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if DOT:
            own = tl.load(y + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
            product += tl.sum(own * value, axis=1)
        if WRITE:
            if WEIGHTED:
                value = value * weight[:, None]
            written = (row < total)[:, None] & (column < width)[None, :]
            tl.store(out + start + column[None, :], value.to(out.dtype.element_ty), mask=written)
    if DOT:
        tl.store(d_weights + slot, product, mask=row < total)


def permute(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """See ``unimega.kernels.permute``."""
    return _Permute.apply(x, order)


def unpermute(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """See ``unimega.kernels.permute``."""
    return _Unpermute.apply(y, weights, order)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        ctx.order = order
        return spread(x.contiguous(), None, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather(dy.contiguous(), None, ctx.order), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
        y = y.contiguous()
        weights = None if weights is None else weights.contiguous()
        ctx.order = order
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights)
        return gather(y, weights, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, weights = ctx.saved_tensors
        order, width = ctx.order, dout.shape[1]
        dy = dout.new_empty(order.source.shape[0], width) if ctx.needs_input_grad[0] else None
        d_weights = None if y is None else torch.empty_like(weights)
        _run_spread(dout.contiguous(), weights, y, order, dy, d_weights)
        return dy, d_weights, None


def gather(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """``unpermute`` of contiguous tensors, without autograd."""
    (total, k), width = order.place.shape, y.shape[1]
    out = y.new_empty(total, width)
    rows, columns = tile(width)
    if total:
        _gather[(cdiv(total, rows), cdiv(width, columns))](
            y, weights, order.place, order.offsets[-1:], out, total, width, K=k, WEIGHTED=weights is not None,
            ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out


def spread(x: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """``permute`` of contiguous x, without autograd, its rows times the weights of their slots."""
    out = x.new_empty(order.source.shape[0], x.shape[1])
    _run_spread(x, weights, None, order, out, None)
    return out


def _run_spread(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    y: torch.Tensor | None,
    order: ExpertOrder,
    out: torch.Tensor | None,
    d_weights: torch.Tensor | None,
) -> None:
    total, width = order.source.shape[0], x.shape[1]
    rows, columns = tile(width)
    if total:
        _spread[(cdiv(total, rows),)](
            x, weights, y, order.source, order.offsets[-1:], out, d_weights, total, width, K=order.place.shape[1],
            WEIGHTED=weights is not None, WRITE=out is not None, DOT=y is not None, ROWS=rows, COLUMNS=columns,
            num_warps=4,
        )  # fmt: skip


_TYPES = dict.fromkeys(("x", "y", "out"), "*bf16") | dict.fromkeys(("weights", "d_weights"), "*fp32")
_TYPES |= dict.fromkeys(("place", "source", "behind"), "*i32") | dict.fromkeys(("total", "width"), "i32")
_TILE = {"K": 8, "ROWS": 1, "COLUMNS": 1024}
_WIDTH, _OPTIONS = frozenset({"width"}), {"num_warps": 4}
_PLAIN = {"WEIGHTED": False, "weights": None}
_NO_DOT = {"DOT": False, "y": None, "d_weights": None}
LAUNCHES = (
    Launch("permute K 8", _spread, _TYPES, _TILE | _PLAIN | _NO_DOT | {"WRITE": True}, _WIDTH, _OPTIONS),
    Launch("permute_backward K 8", _gather, _TYPES, _TILE | _PLAIN, _WIDTH, _OPTIONS),
    Launch("unpermute K 8", _gather, _TYPES, _TILE | {"WEIGHTED": True}, _WIDTH, _OPTIONS),
    Launch(
        "unpermute_backward K 8", _spread, _TYPES, _TILE | {"WEIGHTED": True, "WRITE": True, "DOT": True}, _WIDTH,
        _OPTIONS,
    ),
)  # fmt: skip
