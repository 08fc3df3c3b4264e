"""Rows of the table for a CPU: loops over experts, whose GEMMs stay in cache with what stands around them.

On a CPU the offsets are in the host's memory: reading them waits for nothing.
"""

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from unimega.kernels import permute as definition
from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.precision import widen

_BLOCK_ELEMENTS = 2**16
"""Of rows that are worked on at a time: two buffers in fp32 stay in a core's cache."""


def permute(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """See ``unimega.kernels.permute``."""
    return _Permute.apply(x, order)


def unpermute(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """See ``unimega.kernels.permute``."""
    return _Unpermute.apply(y, weights, order)


def grouped_gemm(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See ``unimega.kernels.grouped_gemm``."""
    return _GroupedGemm.apply(x, weights, offsets)


def expert_ffn(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, order: ExpertOrder
) -> torch.Tensor:
    """See ``unimega.kernels.expert_ffn``."""
    return _ExpertFFN.apply(x, gate_up, down, weights, order)


def _borders(offsets: torch.Tensor) -> list[int]:
    """The numbers of a contiguous int32 tensor on a CPU."""
    return (ctypes.c_int32 * offsets.numel()).from_address(offsets.data_ptr())[:]


def _runs(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows)."""
    for expert, (start, stop) in enumerate(itertools.pairwise(_borders(offsets))):
        yield expert, slice(start, stop)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        ctx.order = order
        y = x.index_select(0, order.source // order.place.shape[1])
        y[_borders(order.offsets)[-1] :] = 0.0
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _sum(dy, None, ctx.order), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
        ctx.order = order
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights)
        if weights is None or weights.dtype == y.dtype:
            return _sum(y, weights, order)
        return _sum(widen(y), weights, order).to(y.dtype)  # embedding_bag would round the weights to 16 bits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, weights = ctx.saved_tensors
        order: ExpertOrder = ctx.order
        if weights is None:
            return definition.spread(dout, None, order), None, None
        tokens, chances = order.source // order.place.shape[1], _by_row(weights, order)
        real, total, width = _borders(order.offsets)[-1], len(tokens), dout.shape[1]
        dy = dout.new_empty(total, width) if ctx.needs_input_grad[0] else None
        d_chances = None if y is None else chances.new_zeros(total)
        step = max(1, _BLOCK_ELEMENTS // max(1, width))
        buffers = torch.empty(2, min(step, total), width, dtype=chances.dtype)
        for low in range(0, real, step):
            rows = slice(low, min(low + step, real))
            d, product = buffers[:, : rows.stop - low].unbind(0)
            d.copy_(dout.index_select(0, tokens[rows]))
            if d_chances is not None:
                torch.sum(torch.mul(d, y[rows], out=product), dim=1, out=d_chances[rows])
            if dy is not None:
                dy[rows] = d.mul_(chances[rows])
        if dy is not None:
            dy[real:] = 0.0
        return dy, None if d_chances is None else _by_slot(d_chances, order).to(weights.dtype), None


def _sum(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """Weighted sum of the rows of each token: one pass of ``embedding_bag``, which adds in fp32."""
    place, real = order.place, _borders(order.offsets)[-1]
    if real < place.numel():
        y, place = torch.cat((y[:real], y.new_zeros(1, y.shape[1]))), place.clamp(max=real)
    if not place.numel():
        return y.new_zeros(len(place), y.shape[1])
    return F.embedding_bag(place, y.contiguous(), mode="sum", per_sample_weights=weights)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, offsets)
        return _multiply(x, weights.transpose(1, 2), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, offsets = ctx.saved_tensors
        dx = _multiply(dy, weights, offsets) if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None, None
        d_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
        for expert, rows in _runs(offsets):
            torch.mm(dy[rows].t(), x[rows], out=d_weights[expert])
        return dx, d_weights, None


def _multiply(x: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(x.shape[0], matrices.shape[2])
    for expert, rows in _runs(offsets):
        torch.mm(x[rows], matrices[expert], out=y[rows])
    y[_borders(offsets)[-1] :] = 0.0
    return y


class _ExpertFFN(torch.autograd.Function):
    """The weights of the slots multiply the rows between the GEMMs: what comes out only has to be added.

    Buffers of an expert are those of the one before: fresh memory costs more than what is done in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        weights: torch.Tensor,
        order: ExpertOrder,
    ) -> torch.Tensor:
        tokens, chances = order.source // order.place.shape[1], _by_row(weights, order)
        both = x.new_empty(len(tokens), gate_up.shape[1])
        out = torch.zeros_like(widen(x), memory_format=torch.contiguous_format)
        buffers = _Buffers(order.offsets)
        for expert, rows in _runs(order.offsets):
            own = tokens[rows]
            x_rows = torch.index_select(x, 0, own, out=buffers.of("rows", own, x))
            torch.mm(x_rows, gate_up[expert].t(), out=both[rows])
            gate, up = buffers.wide("both", both[rows]).chunk(2, dim=1)
            hidden = torch.ops.aten.silu.out(gate, out=buffers.of("hidden", own, gate)).mul_(up).mul_(chances[rows])
            y = torch.mm(buffers.narrow("narrow", hidden, x), down[expert].t(), out=x_rows)
            out.index_add_(0, own, buffers.wide("y", y))
        ctx.order = order
        ctx.save_for_backward(x, both, gate_up, down, weights)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, both, gate_up, down, weights = ctx.saved_tensors
        order: ExpertOrder = ctx.order
        need_x, need_gate_up, need_down, need_weights, _ = ctx.needs_input_grad
        tokens, chances = order.source // order.place.shape[1], _by_row(weights, order)
        dx = torch.zeros_like(widen(x), memory_format=torch.contiguous_format) if need_x else None
        d_gate_up, d_down = (
            torch.empty_like(t, memory_format=torch.contiguous_format) if needed else None
            for t, needed in ((gate_up, need_gate_up), (down, need_down))
        )
        d_chances = chances.new_zeros(len(tokens)) if need_weights else None
        buffers = _Buffers(order.offsets)
        for expert, rows in _runs(order.offsets):
            own, chance = tokens[rows], chances[rows]
            d = torch.index_select(dout, 0, own, out=buffers.of("rows", own, dout))
            gate, up = buffers.wide("both", both[rows]).chunk(2, dim=1)
            silu = torch.ops.aten.silu.out(gate, out=buffers.of("silu", own, gate))
            hidden = torch.mul(silu, up, out=buffers.of("hidden", own, gate))
            d_hidden = torch.mm(d, down[expert], out=buffers.of("d_hidden", own, down, gate.shape[1]))
            d_hidden = buffers.wide("wide", d_hidden)
            if d_chances is not None:
                torch.sum(torch.mul(hidden, d_hidden, out=buffers.of("product", own, gate)), dim=1, out=d_chances[rows])
            if d_down is not None:
                torch.mm(d.t(), buffers.narrow("narrow", hidden.mul_(chance), x), out=d_down[expert])
            if dx is None and d_gate_up is None:
                continue
            d_wide = buffers.of("d_both", own, gate, both.shape[1])
            d_gate, d_up = d_wide.chunk(2, dim=1)
            torch.mul(d_hidden.mul_(chance), silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
            d_both = buffers.narrow("d_both, narrow", d_wide, x)
            if d_gate_up is not None:
                x_rows = torch.index_select(x, 0, own, out=buffers.of("rows", own, x))
                torch.mm(d_both.t(), x_rows, out=d_gate_up[expert])
            if dx is not None:
                d_rows = torch.mm(d_both, gate_up[expert], out=buffers.of("rows", own, x))
                dx.index_add_(0, own, buffers.wide("dx", d_rows))
        return (
            None if dx is None else dx.to(x.dtype),
            d_gate_up,
            d_down,
            None if d_chances is None else _by_slot(d_chances, order).to(weights.dtype),
            None,
        )


class _Buffers:
    """Scratch memory by name, as long as the longest run."""

    def __init__(self, offsets: torch.Tensor) -> None:
        self._longest = max(rows.stop - rows.start for _, rows in _runs(offsets))
        self._made: dict[str, torch.Tensor] = {}

    def of(self, name: str, rows: torch.Tensor, like: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """[rows, width of ``like`` or ``width``] in its dtype; contents are undefined."""
        if name not in self._made:
            self._made[name] = like.new_empty(self._longest, width or like.shape[1])
        return self._made[name][: len(rows)]

    def wide(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` in the precision of sums."""
        return x if widen(x[:0]).dtype == x.dtype else self.of(name, x, widen(x[:0])).copy_(x)

    def narrow(self, name: str, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """``x`` in the dtype of ``like``."""
        return x if x.dtype == like.dtype else self.of(name, x, like, x.shape[1]).copy_(x)


def _by_row(weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Weights of slots in expert-major order, [N, 1]."""
    return weights.reshape(-1).index_select(0, order.source)[:, None]


def _by_slot(rows: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Numbers of rows at their slots, [t, k]."""
    return rows.index_select(0, order.place.reshape(-1)).view(order.place.shape)
