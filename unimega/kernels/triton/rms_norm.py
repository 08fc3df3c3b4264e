"""RMS norm in Triton, with or without the residual sum before it: a whole row in registers, one launch per weight."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unimega.kernels.triton.launch import TILE, Launch, cdiv, power_of_2, programs, tile


@triton.jit
def _forward(
    x, residual, weight, y, summed, rstd, total, width, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < total)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        value = value.to(summed.dtype.element_ty)
        tl.store(summed + place, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    normed = value * scale[:, None] * gain[None, :]
    tl.store(y + place, normed.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale, mask=row < total)


@triton.jit
def _backward(
    dy, d_summed, x, rstd, weight, dx, d_weight, total, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    real = column < width
    gain = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    d_gain = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(program * ROWS, total, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < total)[:, None] & real[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        scale = tl.load(rstd + row, mask=row < total, other=0.0)[:, None]
        normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
        d = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        d_gain += d * normed
        d *= gain
        mean = tl.sum(d * normed, axis=1) / width
        d = (d - normed * mean[:, None]) * scale
        if ADD:
            d += tl.load(d_summed + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(d_weight + program * width + column, tl.sum(d_gain, axis=0), mask=real)


def rms_norm(x: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...], eps: float) -> torch.Tensor:
    """See ``unimega.kernels.rms_norm``."""
    return _RMSNorm.apply(x, counts, eps, *weights)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``unimega.kernels.add_rms_norm``."""
    return _AddRMSNorm.apply(x, residual, counts, eps, *weights)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: tuple[int, ...], eps: float, *weights: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
        _run_forward(x, None, weights, counts, eps, y, x, rstd)
        ctx.counts = counts
        ctx.save_for_backward(x, rstd, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, *weights = ctx.saved_tensors
        dx, d_weights = _run_backward(dy, None, x, rstd, weights, ctx.counts, ctx.needs_input_grad[3:])
        return dx, None, None, *d_weights


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        counts: tuple[int, ...],
        eps: float,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        y, summed, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
        _run_forward(x, residual, weights, counts, eps, y, summed, rstd)
        ctx.counts = counts
        ctx.save_for_backward(summed, rstd, *weights)
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, d_summed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        summed, rstd, *weights = ctx.saved_tensors
        dx, d_weights = _run_backward(dy, d_summed, summed, rstd, weights, ctx.counts, ctx.needs_input_grad[4:])
        return dx, dx, None, None, *d_weights


def _run_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    counts: Sequence[int],
    eps: float,
    y: torch.Tensor,
    summed: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    width = x.shape[1]
    rows, columns = tile(width, max(TILE, power_of_2(width)))
    for (start, stop), weight in zip(_runs(counts), weights, strict=True):
        if start < stop:
            _forward[(cdiv(stop - start, rows),)](
                x[start:stop], None if residual is None else residual[start:stop], weight.contiguous(),
                y[start:stop], summed[start:stop], rstd[start:stop], stop - start, width, eps,
                ADD=residual is not None, ROWS=rows, COLUMNS=columns, num_warps=_warps(columns),
            )  # fmt: skip


def _run_backward(
    dy: torch.Tensor,
    d_summed: torch.Tensor | None,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weights: Sequence[torch.Tensor],
    counts: Sequence[int],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    width = x.shape[1]
    rows, columns = tile(width, max(TILE, power_of_2(width)))
    dy = dy.contiguous()
    d_summed = None if d_summed is None else d_summed.contiguous()
    dx = torch.empty_like(x)
    d_weights: list[torch.Tensor | None] = []
    for (start, stop), weight, needed in zip(_runs(counts), weights, needs, strict=True):
        grid = min(programs(x.device), cdiv(stop - start, rows))
        partial = x.new_empty(grid, width, dtype=torch.float32)
        if grid:
            _backward[(grid,)](
                dy[start:stop], None if d_summed is None else d_summed[start:stop], x[start:stop],
                rstd[start:stop], weight.contiguous(), dx[start:stop], partial, stop - start, width,
                ADD=d_summed is not None, ROWS=rows, COLUMNS=columns, num_warps=_warps(columns),
            )  # fmt: skip
        d_weights.append(partial.sum(0).to(weight.dtype) if needed else None)
    return dx, d_weights


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for count in counts:
        yield start, start + count
        start += count


def _warps(columns: int) -> int:
    return 4 if columns <= 2048 else 8 if columns <= 8192 else 16


_SIZES = {"total": "i32", "width": "i32"}


def _launches(width: int) -> Iterator[Launch]:
    rows, columns = tile(width, max(TILE, width))
    options = {"num_warps": _warps(columns)}
    for add in (False, True):
        constants = {"ADD": add, "ROWS": rows, "COLUMNS": columns}
        forward = {name: "*bf16" for name in ("x", "residual", "weight", "y", "summed")} | {"rstd": "*fp32"}
        backward = {name: "*bf16" for name in ("dy", "d_summed", "x", "weight", "dx")}
        backward |= {"rstd": "*fp32", "d_weight": "*fp32"}
        name, absent = ("add_rms_norm", {}) if add else ("rms_norm", {"residual": None})
        yield Launch(
            f"{name}_forward D {width}", _forward, {k: v for k, v in forward.items() if k not in absent} | _SIZES
            | {"eps": "fp32"}, constants | absent, frozenset({"width"}), options,
        )  # fmt: skip
        absent = {} if add else {"d_summed": None}
        yield Launch(
            f"{name}_backward D {width}", _backward, {k: v for k, v in backward.items() if k not in absent} | _SIZES,
            constants | absent, frozenset({"width"}), options,
        )  # fmt: skip


LAUNCHES = (*_launches(2048), *_launches(4096), *_launches(8192))
