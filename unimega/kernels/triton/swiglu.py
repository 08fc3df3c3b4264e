"""SwiGLU in Triton: one pass over gate_up forward, one backward; the sigmoid is computed again."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.kernels.triton.launch import Launch, cdiv, tile


@triton.jit
def _forward(gate_up, y, total, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < total)[:, None] & (column < width)[None, :]
    start = row.to(tl.int64)[:, None] * width + column[None, :]
    source = gate_up + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy, gate_up, d_gate_up, total, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < total)[:, None] & (column < width)[None, :]
    start = row.to(tl.int64)[:, None] * width + column[None, :]
    both = row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    d = tl.load(dy + start, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + both, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + both + width, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = d * up * s * (1.0 + gate * (1.0 - s))
    tl.store(d_gate_up + both, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + both + width, (d * gate * s).to(d_gate_up.dtype.element_ty), mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``unimega.kernels.swiglu``."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        _launch(_forward, y, gate_up, y)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        _launch(_backward, dy, dy.contiguous(), gate_up, grad)
        return grad


def _launch(kernel: Any, like: torch.Tensor, *tensors: torch.Tensor) -> None:
    total, width = like.shape
    rows, columns = tile(width)
    if total:
        kernel[(cdiv(total, rows), cdiv(width, columns))](
            *tensors, total, width, ROWS=rows, COLUMNS=columns, num_warps=4
        )


_SIZES = {"total": "i32", "width": "i32"}
_TILE = {"ROWS": 1, "COLUMNS": 1024}
LAUNCHES = (
    Launch("swiglu_forward", _forward, {"gate_up": "*bf16", "y": "*bf16"} | _SIZES, _TILE, frozenset({"width"})),
    Launch(
        "swiglu_backward",
        _backward,
        {"dy": "*bf16", "gate_up": "*bf16", "d_gate_up": "*bf16"} | _SIZES,
        _TILE,
        frozenset({"width"}),
    ),
)
