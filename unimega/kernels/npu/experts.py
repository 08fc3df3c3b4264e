"""Rows of experts by torch-npu's token permutation and grouped matmul; see ``kernels.permute`` and ``grouped_gemm``.

The permuting operators sort: they are given the places of slots, which are different numbers, so what they sort into
is the order that ``expert_order`` made, and the two are inverse to each other whatever else calls them.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.npu.elementwise import swiglu

ONE_OUTPUT, OUTPUT_OF_GROUPS = 2, 3
"""``split_item``: a single tensor comes back."""
ROWS, INNER = 0, 2
"""``group_type``: groups are runs of the rows of x, or of the dim that is summed."""
ENDS = 0
"""``group_list_type``: where groups end. The other form, counts, does not take a single group."""


def permute(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """See ``kernels.permute``. Fewer than 2^24 - 1 slots."""
    if x.shape[0] == 0:
        return x[:0]
    rows, _ = torch.ops.npu.npu_moe_token_permute(x, order.place)
    return rows.masked_fill(_behind(order)[:, None], 0.0)


def unpermute(y: torch.Tensor, weights: torch.Tensor | None, order: ExpertOrder) -> torch.Tensor:
    """See ``kernels.permute``."""
    if weights is None:  # an operator without weights takes k for 1
        weights = torch.ones(order.place.shape, dtype=torch.float32, device=y.device)
    if y.shape[0] == 0:
        return y * weights[:, :1].to(y.dtype)
    none = order.place >= order.offsets[-1]
    y = y.masked_fill(_behind(order)[:, None], 0.0)  # NaN times a weight of 0 is NaN
    return torch.ops.npu.npu_moe_token_unpermute(y, order.place.view(-1), probs=weights.masked_fill(none, 0.0))


def grouped_gemm(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See ``kernels.grouped_gemm``. At most 1023 experts."""
    return _GroupedGemm.apply(x, weights, offsets)


def expert_ffn(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, order: ExpertOrder
) -> torch.Tensor:
    """See ``kernels.expert_ffn``. Keeps more for backward than an implementation in one piece would."""
    hidden = swiglu(grouped_gemm(permute(x, order), gate_up, order.offsets))
    return unpermute(grouped_gemm(hidden, down, order.offsets), weights, order)


class _GroupedGemm(torch.autograd.Function):
    """``npu_grouped_matmul`` has no derivative: without this, gradients are None, with a single warning from C++."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, offsets)
        return _multiply(x, weights.contiguous().transpose(1, 2), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, offsets = ctx.saved_tensors
        dx = _multiply(dy, weights.contiguous(), offsets) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else _weight_gradient(dy, x, offsets), None


def _multiply(x: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows of expert e times ``matrices[e]``, zeros behind."""
    total = x.shape[0]
    if total == 0:
        return x.new_zeros(0, matrices.shape[2])
    ends = offsets[1:].long()
    ends[-1] = total  # groups must fill x; what the last one makes of rows without an expert is blanked
    y = torch.ops.npu.npu_grouped_matmul(
        [x.contiguous()], [matrices], group_list=ends, split_item=ONE_OUTPUT, group_type=ROWS, group_list_type=ENDS
    )[0]
    return y.masked_fill_((torch.arange(total, device=x.device) >= offsets[-1])[:, None], 0.0)


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``dy[rows of e].T @ x[rows of e]`` for each expert: [E, O, D]."""
    experts = offsets.shape[0] - 1
    if x.shape[0] == 0:
        return x.new_zeros(experts, dy.shape[1], x.shape[1])
    ends = torch.cat((offsets[1:], offsets.new_full((1,), x.shape[0]))).long()  # a group more: rows without an expert
    grads = torch.ops.npu.npu_grouped_matmul(
        [dy.contiguous().t()],
        [x.contiguous()],
        group_list=ends,
        split_item=OUTPUT_OF_GROUPS,
        group_type=INNER,
        group_list_type=ENDS,
    )[0][:experts]
    empty = offsets.diff() == 0
    return grads.masked_fill_(empty[:, None, None], 0.0)  # the documentation does not say what an empty group leaves


def _behind(order: ExpertOrder) -> torch.Tensor:
    """bool [N]: rows of slots without an expert."""
    return torch.arange(order.source.shape[0], device=order.source.device) >= order.offsets[-1]
