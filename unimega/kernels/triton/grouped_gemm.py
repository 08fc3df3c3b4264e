"""GEMMs of experts on their runs of rows in Triton: programs deal tiles out from the offsets on the device.

A tile of rows belongs to one expert. Which one, and where its rows begin, follows from one load of the offsets and a
comparison: no map of tiles in memory, no count on the host. Rows may be gathered on their way in (``expert_ffn``).
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.kernels.triton.launch import Launch, capability, cdiv, power_of_2, programs


@triton.jit
def _inline_tiles(offsets, experts, total, TAIL: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Sums of the tiles of rows up to each expert, and starts and ends of their rows; ``TAIL``: number ``experts`` too.

    ``EXPERTS``: power of two above ``experts``.
    """
    number = tl.arange(0, EXPERTS)
    start = tl.load(offsets + number, mask=number <= experts, other=0)
    end = tl.load(offsets + number + 1, mask=number < experts, other=0)
    end = tl.where(number == experts, total if TAIL else start, end)
    count = tl.where(number <= experts, end - start, 0)
    return tl.cumsum((count + ROWS - 1) // ROWS, axis=0), start, end


@triton.jit
def _inline_find(tile, upto, start, end, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile of rows."""
    number = tl.arange(0, EXPERTS)
    expert = tl.sum((upto <= tile).to(tl.int32), axis=0)
    before = tl.max(tl.where(upto <= tile, upto, 0), axis=0)
    first = tl.sum(tl.where(number == expert, start, 0), axis=0) + (tile - before) * ROWS
    return expert, first, tl.sum(tl.where(number == expert, end, 0), axis=0)


@triton.jit
def _inline_rows(source, row, K: tl.constexpr, GATHER: tl.constexpr):
    """Numbers of the rows to read: those of the slots' tokens with ``GATHER``."""
    return (tl.load(source + row) // K if GATHER else row).to(tl.int64)


@triton.jit
def _multiply(
    x, weights, y, offsets, source, total, experts, width, out, stride_out, stride_width,
    K: tl.constexpr, GATHER: tl.constexpr, TAIL: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y[r] = x[r or its token] @ matrix of its expert``; strides: of the matrix [out, width]."""
    upto, start, end = _inline_tiles(offsets, experts, total, TAIL, ROWS, EXPERTS)
    across = tl.cdiv(out, OUT)
    for tile in range(tl.program_id(0), tl.max(upto, axis=0) * across, tl.num_programs(0)):
        expert, first, stop = _inline_find(tile // across, upto, start, end, ROWS, EXPERTS)
        row = first + tl.arange(0, ROWS)
        real = row < stop
        column = (tile % across) * OUT + tl.arange(0, OUT)
        inner = tl.arange(0, WIDTH)
        read = _inline_rows(source, tl.where(real, row, first), K, GATHER)
        left = x + read[:, None] * width + inner[None, :]
        right = weights + expert.to(tl.int64) * width * out
        right += column[None, :].to(tl.int64) * stride_out + inner[:, None].to(tl.int64) * stride_width
        value = tl.zeros([ROWS, OUT], tl.float32)
        for begin in range(0, tl.where(expert < experts, width, 0), WIDTH):
            kept = begin + inner < width
            a = tl.load(left, mask=kept[None, :], other=0.0)
            b = tl.load(right, mask=kept[:, None] & (column < out)[None, :], other=0.0)
            value = tl.dot(a, b, value, input_precision=PRECISION)
            left += WIDTH
            right += WIDTH * stride_width
        target = y + row.to(tl.int64)[:, None] * out + column[None, :]
        tl.store(target, value.to(y.dtype.element_ty), mask=real[:, None] & (column < out)[None, :])


@triton.jit
def _weight_grad(
    dy, x, grad, offsets, source, out, width,
    K: tl.constexpr, GATHER_DY: tl.constexpr, GATHER_X: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``grad[e] = dy[rows of e].T @ x[rows of e]``: one program for a tile, over all rows of the expert."""
    expert = tl.program_id(0)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    column = tl.program_id(1) * OUT + tl.arange(0, OUT)
    inner = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    value = tl.zeros([OUT, WIDTH], tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < stop
        row = tl.where(real, row, start)
        left = dy + _inline_rows(source, row, K, GATHER_DY)[:, None] * out + column[None, :]
        right = x + _inline_rows(source, row, K, GATHER_X)[:, None] * width + inner[None, :]
        a = tl.load(left, mask=real[:, None] & (column < out)[None, :], other=0.0)
        b = tl.load(right, mask=real[:, None] & (inner < width)[None, :], other=0.0)
        value = tl.dot(tl.trans(a), b, value, input_precision=PRECISION)
    target = grad + expert.to(tl.int64) * out * width + column.to(tl.int64)[:, None] * width + inner[None, :]
    tl.store(target, value.to(grad.dtype.element_ty), mask=(column < out)[:, None] & (inner < width)[None, :])


def grouped_gemm(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See ``unimega.kernels.grouped_gemm``."""
    return _GroupedGemm.apply(x, weights, offsets)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x, weights = x.contiguous(), weights.contiguous()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, offsets)
        return multiply(x, weights, offsets, tail=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, offsets = ctx.saved_tensors
        dy = dy.contiguous()
        dx = multiply(dy, weights, offsets, transpose=True, tail=True) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else weight_grad(dy, x, offsets), None


def multiply(
    x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor, *, transpose: bool = False, tail: bool = False
) -> torch.Tensor:
    """Rows of x times ``weights[e].T`` of their expert, or with ``transpose`` times ``weights[e]``; all contiguous.

    ``tail``: rows without an expert become zero; else they are not written.
    """
    total, (experts, rows, columns) = x.shape[0], weights.shape
    out, width = (columns, rows) if transpose else (rows, columns)
    strides = (1, columns) if transpose else (columns, 1)
    y = x.new_empty(total, out)
    sizes = tiles("multiply", x.dtype, capability(x.device))
    if total:
        _multiply[(grid(x.device, total, experts + 1, out, sizes),)](
            x, weights, y, offsets, None, total, experts, width, out, *strides, K=1, GATHER=False, TAIL=tail,
            EXPERTS=power_of_2(experts + 1), **sizes,
        )  # fmt: skip
    return y


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    source: torch.Tensor | None = None,
    *,
    k: int = 1,
    gather: str = "",
) -> torch.Tensor:
    """``dy[rows of e].T @ x[rows of e]`` for each expert; ``gather``: ``dy`` or ``x`` has rows of tokens."""
    experts, out, width = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    grad = x.new_empty(experts, out, width)
    sizes = tiles("weight_grad", x.dtype, capability(x.device))
    _weight_grad[(experts, cdiv(out, sizes["OUT"]), cdiv(width, sizes["WIDTH"]))](
        dy, x, grad, offsets, source, out, width, K=k, GATHER_DY=gather == "dy", GATHER_X=gather == "x", **sizes
    )
    return grad


def grid(device: torch.device, total: int, experts: int, out: int, sizes: Mapping[str, Any]) -> int:
    """Programs of a kernel whose tiles of rows are at most ``total / ROWS + experts``."""
    return min(programs(device), (cdiv(total, sizes["ROWS"]) + experts) * cdiv(out, sizes["OUT"]))


def tiles(part: str, dtype: torch.dtype, target: int) -> dict[str, Any]:
    """Tile sizes and options of a kernel; ``target``: compute capability."""
    wide = dtype == torch.float32
    rows, out, width, warps, stages = 128, 128, 64, 8, 3
    if part == "weight_grad":
        rows, width = 64, 128
    elif part != "multiply":  # two sums of this size, or one and what is loaded beside it
        out = 64
    if wide:  # the products of 4-byte numbers without rounding are no tensor core's: small tiles
        rows, out, width, warps, stages = (32, 64, 64, 4, 2) if part == "weight_grad" else (64, 64, 32, 4, 2)
    precision = "ieee" if wide and not torch.backends.cuda.matmul.allow_tf32 else "tf32"
    sizes = {"ROWS": rows, "OUT": out, "WIDTH": width, "PRECISION": precision}
    return sizes | {"num_warps": warps, "num_stages": stages}


def launches(
    name: str, kernel: Any, part: str, types: Mapping[str, str], constants: Mapping[str, Any], multiples: frozenset[str]
) -> tuple[Launch, ...]:
    """A kernel in bf16 on each architecture, as ``tiles`` has it launched."""
    found = []
    for target in (80, 90):
        sizes = tiles(part, torch.bfloat16, target)
        options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
        found.append(
            Launch(name, kernel, types, {**constants, **sizes}, multiples - set(constants), options, (target,))
        )
    return tuple(found)


TYPES = dict.fromkeys(("x", "weights", "y", "dy", "grad"), "*bf16") | dict.fromkeys(("offsets", "source"), "*i32")
TYPES |= dict.fromkeys(("total", "experts", "width", "out", "stride_out", "stride_width"), "i32")
ALIGNED = frozenset({"experts", "width", "out", "stride_out", "stride_width"})
_PLAIN = {"K": 1, "GATHER": False, "EXPERTS": 128, "source": None}
_GRAD = {"K": 1, "GATHER_DY": False, "GATHER_X": False, "source": None}
LAUNCHES = (
    *launches(
        "grouped_gemm_forward", _multiply, "multiply", TYPES, {**_PLAIN, "TAIL": True, "stride_width": 1}, ALIGNED
    ),
    *launches(
        "grouped_gemm_backward_x", _multiply, "multiply", TYPES, {**_PLAIN, "TAIL": True, "stride_out": 1}, ALIGNED
    ),
    *launches("grouped_gemm_backward_weights", _weight_grad, "weight_grad", TYPES, _GRAD, ALIGNED),
)
