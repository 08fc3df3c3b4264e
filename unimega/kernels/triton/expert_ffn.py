"""The FFN of routed experts in Triton: grouped GEMMs with what stands around them inside.

Forward: GEMM with the gather of its rows, SwiGLU and the slots' weights; GEMM; sum over the slots of a token.
Backward: GEMM with the gather of the gradients' rows, the derivative of SwiGLU and that of the weights; GEMM; sum; and
the gradients of both weights, each with a gather. No permuted copy of x or of the gradient is written.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.triton.grouped_gemm import (
    ALIGNED,
    TYPES,
    _inline_find,
    _inline_tiles,
    grid,
    launches,
    multiply,
    tiles,
    weight_grad,
)
from unimega.kernels.triton.launch import Launch, capability, cdiv, power_of_2
from unimega.kernels.triton.permute import gather


@triton.jit
def _up(
    x, gate_up, chances, both, hidden, offsets, source, total, experts, width, out,
    K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """both = x[token] @ gate_up[e].T; hidden = silu(gate) * up * weight of the slot. ``out``: F."""
    upto, start, end = _inline_tiles(offsets, experts, total, False, ROWS, EXPERTS)
    across = tl.cdiv(out, OUT)
    for tile in range(tl.program_id(0), tl.max(upto, axis=0) * across, tl.num_programs(0)):
        expert, first, stop = _inline_find(tile // across, upto, start, end, ROWS, EXPERTS)
        row = first + tl.arange(0, ROWS)
        real = row < stop
        column = (tile % across) * OUT + tl.arange(0, OUT)
        inner = tl.arange(0, WIDTH)
        slot = tl.load(source + tl.where(real, row, first))
        left = x + (slot // K).to(tl.int64)[:, None] * width + inner[None, :]
        right = gate_up + expert.to(tl.int64) * 2 * out * width
        right += column[None, :].to(tl.int64) * width + inner[:, None]
        further = right + out.to(tl.int64) * width
        gate = tl.zeros([ROWS, OUT], tl.float32)
        up = tl.zeros([ROWS, OUT], tl.float32)
        for begin in range(0, width, WIDTH):
            kept = begin + inner < width
            a = tl.load(left, mask=kept[None, :], other=0.0)
            inside = kept[:, None] & (column < out)[None, :]
            gate = tl.dot(a, tl.load(right, mask=inside, other=0.0), gate, input_precision=PRECISION)
            up = tl.dot(a, tl.load(further, mask=inside, other=0.0), up, input_precision=PRECISION)
            left += WIDTH
            right += WIDTH
            further += WIDTH
        inside = real[:, None] & (column < out)[None, :]
        target = both + row.to(tl.int64)[:, None] * (2 * out) + column[None, :]
        tl.store(target, gate.to(both.dtype.element_ty), mask=inside)
        tl.store(target + out, up.to(both.dtype.element_ty), mask=inside)
        # What backward reads again is rounded: the same numbers here.
        gate = gate.to(both.dtype.element_ty).to(tl.float32)
        up = up.to(both.dtype.element_ty).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * tl.load(chances + slot)[:, None]
        target = hidden + row.to(tl.int64)[:, None] * out + column[None, :]
        tl.store(target, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _inline_swiglu_backward(d, both, d_both, hidden, chance, column, first, real, out):
    """From d hidden of some columns: d_both, hidden times the slots' weights, and each row's <hidden, d hidden>."""
    inside = real[:, None] & (column < out)[None, :]
    # Addresses are 32 bits from the tile's first row.
    within = tl.arange(0, d.shape[0])[:, None] * out + column[None, :]
    place = within + tl.arange(0, d.shape[0])[:, None] * out
    corner = first.to(tl.int64) * out
    gate = tl.load(both + 2 * corner + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + 2 * corner + out + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    gate = gate * s
    part = tl.sum(gate * up * d, axis=1)
    tl.store(hidden + corner + within, (gate * up * chance).to(hidden.dtype.element_ty), mask=inside)
    d = d * chance
    tl.store(d_both + 2 * corner + out + place, (d * gate).to(d_both.dtype.element_ty), mask=inside)
    up = d * up * (s + gate * (1.0 - s))
    tl.store(d_both + 2 * corner + place, up.to(d_both.dtype.element_ty), mask=inside)
    return part


@triton.jit
def _down_backward(
    dout, down, chances, both, d_both, hidden, d_chances, offsets, source, total, experts, width, out,
    K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d hidden = dout[token] @ down[e]; d_both, hidden again, and the part of <hidden, d hidden>. ``out``: F."""
    upto, start, end = _inline_tiles(offsets, experts, total, False, ROWS, EXPERTS)
    across = tl.cdiv(out, OUT)
    for tile in range(tl.program_id(0), tl.max(upto, axis=0) * across, tl.num_programs(0)):
        expert, first, stop = _inline_find(tile // across, upto, start, end, ROWS, EXPERTS)
        row = first + tl.arange(0, ROWS)
        real = row < stop
        column = (tile % across) * OUT + tl.arange(0, OUT)
        inner = tl.arange(0, WIDTH)
        slot = tl.load(source + tl.where(real, row, first))
        left = dout + (slot // K).to(tl.int64)[:, None] * width + inner[None, :]
        right = down + expert.to(tl.int64) * width * out
        right += inner[:, None].to(tl.int64) * out + column[None, :]
        d = tl.zeros([ROWS, OUT], tl.float32)
        for begin in range(0, width, WIDTH):
            kept = begin + inner < width
            a = tl.load(left, mask=kept[None, :], other=0.0)
            b = tl.load(right, mask=kept[:, None] & (column < out)[None, :], other=0.0)
            d = tl.dot(a, b, d, input_precision=PRECISION)
            left += WIDTH
            right += WIDTH * out
        # Half of the columns after the other: registers are what this kernel has least of.
        low, high = tl.split(tl.permute(tl.reshape(d, [ROWS, 2, OUT // 2]), [0, 2, 1]))
        column = (tile % across) * OUT + tl.arange(0, OUT // 2)
        chance = tl.load(chances + slot)[:, None]
        part = _inline_swiglu_backward(low, both, d_both, hidden, chance, column, first, real, out)
        part += _inline_swiglu_backward(high, both, d_both, hidden, chance, column + OUT // 2, first, real, out)
        tl.store(d_chances + row.to(tl.int64) * across + tile % across, part, mask=real)


@triton.jit
def _sum_parts(parts, source, behind, d_weights, total, across, ROWS: tl.constexpr):
    """The parts of each row, first to last; zero for rows without an expert."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (row < tl.load(behind)) & (row < total)
    value = tl.zeros([ROWS], tl.float32)
    for i in range(across):
        value += tl.load(parts + row.to(tl.int64) * across + i, mask=real, other=0.0)
    tl.store(d_weights + tl.load(source + row, mask=row < total, other=0), value, mask=row < total)


def expert_ffn(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, order: ExpertOrder
) -> torch.Tensor:
    """See ``unimega.kernels.expert_ffn``."""
    return _ExpertFFN.apply(x, gate_up, down, weights, order)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        weights: torch.Tensor,
        order: ExpertOrder,
    ) -> torch.Tensor:
        x, gate_up, down, weights = (t.contiguous() for t in (x, gate_up, down, weights))
        total, (experts, width, out) = order.source.shape[0], down.shape
        both, hidden = x.new_empty(total, 2 * out), x.new_empty(total, out)
        sizes = tiles("up", x.dtype, capability(x.device))
        if total:
            _up[(grid(x.device, total, experts, out, sizes),)](
                x, gate_up, weights, both, hidden, order.offsets, order.source, total, experts, width, out,
                K=order.place.shape[1], EXPERTS=power_of_2(experts + 1), **sizes,
            )  # fmt: skip
        ctx.order = order
        ctx.save_for_backward(x, both, gate_up, down, weights)
        return gather(multiply(hidden, down, order.offsets), None, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, both, gate_up, down, weights = ctx.saved_tensors
        order: ExpertOrder = ctx.order
        need_x, need_gate_up, need_down, need_weights, _ = ctx.needs_input_grad
        dout = dout.contiguous()
        d_both, hidden, parts = _run_down_backward(dout, both, down, weights, order)
        k = order.place.shape[1]
        d_weights = torch.empty_like(weights) if need_weights else None
        if d_weights is not None and len(parts):
            _sum_parts[(cdiv(len(parts), 256),)](
                parts, order.source, order.offsets[-1:], d_weights, *parts.shape, ROWS=256, num_warps=4
            )
        dx = gather(multiply(d_both, gate_up, order.offsets, transpose=True), None, order) if need_x else None
        sizes = (order.offsets, order.source)
        d_gate_up = weight_grad(d_both, x, *sizes, k=k, gather="x") if need_gate_up else None
        d_down = weight_grad(dout, hidden, *sizes, k=k, gather="dy") if need_down else None
        return dx, d_gate_up, d_down, d_weights, None


def _run_down_backward(
    dout: torch.Tensor, both: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, order: ExpertOrder
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of ``both``, the rows between the GEMMs times their weights, and parts of that of the weights."""
    total, (experts, width, out) = len(both), down.shape
    sizes = tiles("down_backward", dout.dtype, capability(dout.device))
    d_both, hidden = torch.empty_like(both), both.new_empty(total, out)
    parts = both.new_empty(total, cdiv(out, sizes["OUT"]), dtype=torch.float32)
    if total:
        _down_backward[(grid(dout.device, total, experts, out, sizes),)](
            dout, down, weights, both, d_both, hidden, parts, order.offsets, order.source, total, experts, width, out,
            K=order.place.shape[1], EXPERTS=power_of_2(experts + 1), **sizes,
        )  # fmt: skip
    return d_both, hidden, parts


_TYPES = TYPES | dict.fromkeys(("gate_up", "down", "both", "d_both", "hidden", "dout"), "*bf16")
_TYPES |= dict.fromkeys(("chances", "d_chances"), "*fp32")
_SIZES = {"K": 8, "EXPERTS": 128}
LAUNCHES = (
    *launches("expert_ffn_up K 8", _up, "up", _TYPES, _SIZES, ALIGNED),
    *launches("expert_ffn_down_backward K 8", _down_backward, "down_backward", _TYPES, _SIZES, ALIGNED),
    Launch(
        "expert_ffn_weights_backward",
        _sum_parts,
        {"parts": "*fp32", "source": "*i32", "behind": "*i32", "d_weights": "*fp32", "total": "i32", "across": "i32"},
        {"ROWS": 256},
        options={"num_warps": 4},
    ),
)
