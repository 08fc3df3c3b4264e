"""One GEMM for each expert on its run of rows: ``y[rows of e] = x[rows of e] @ weights[e].T``.

``grouped_gemm(x, weights, offsets) -> y``

x: [N, D], weights: [E, O, D], one dtype. y: [N, O], same dtype. offsets: [E + 1] int32 on the device, ascending from 0:
rows offsets[e] .. offsets[e + 1] belong to expert e (``ExpertOrder.offsets``). Rows from offsets[E] on belong to none:
zeros in y and in the gradient of x, whatever they hold. Experts without rows have gradient zero.

GEMMs accumulate in fp32 (fp64 for fp64; a device may use less for fp32, torch's setting decides) and round once.
Gradients of x and weights; a frozen one is not computed. Saved for backward: x (if weights are trained) and weights.
Operations: 2 N D O forward, twice that backward. The host reads no count.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega.kernels import registry
from unimega.kernels.precision import widen


def reference(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See the module: the definition in plain torch, in tiles of rows of one expert; their number is at most known."""
    return _GroupedGemm.apply(x, weights, offsets)


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
        rows, expert = _tiles(len(dy), offsets)
        parts = torch.bmm(widen(_rows(dy, rows)).transpose(1, 2), widen(_rows(x, rows)))
        total = parts.new_zeros(weights.shape).index_add_(0, expert, parts)
        return dx, total.to(weights.dtype), None


def _tiles(total: int, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers [tiles, size] of tiles that hold rows of one expert (``total``: none) and the expert of each tile."""
    experts = offsets.shape[0] - 1
    size = max(1, -(-total // experts))
    number = -(-total // size) + experts  # at most: every expert has one tile that is not full
    ends = offsets.diff().add(size - 1).div(size, rounding_mode="floor").cumsum(0)
    tile = torch.arange(number, device=offsets.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp_(max=experts - 1)
    before = torch.cat((ends.new_zeros(1), ends))[expert]
    first = offsets[expert] + (tile - before) * size
    rows = first[:, None] + torch.arange(size, device=offsets.device)
    return rows.where(rows < offsets[expert + 1][:, None], total), expert


def _rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of x, zeros for row number len(x)."""
    padded = torch.cat((x, x.new_zeros(1, x.shape[1])))
    return padded.index_select(0, rows.reshape(-1)).view(*rows.shape, x.shape[1])


def _multiply(x: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows of expert e times ``matrices[e]``."""
    rows, expert = _tiles(len(x), offsets)
    tiles = torch.bmm(_rows(x, rows), matrices[expert])
    y = x.new_zeros(len(x) + 1, matrices.shape[2])
    return y.index_copy_(0, rows.reshape(-1), tiles.view(-1, matrices.shape[2]))[:-1]


registry.declare(
    "grouped_gemm",
    registry.triton("grouped_gemm:grouped_gemm"),
    registry.Impl("cpu", "unimega.kernels.cpu:grouped_gemm", frozenset({"cpu"})),
    registry.npu("experts:grouped_gemm", "npu_grouped_matmul"),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
