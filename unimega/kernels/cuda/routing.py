"""Routing by csrc/routing.cu; see ``kernels.route``, ``kernels.topk_routing`` and ``kernels.expert_order``.

The library takes addresses and a stream. A call is three launches, the choice alone one; nothing is read on the host.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega import backend
from unimega.errors import KernelUnavailable
from unimega.kernels.cuda.library import LIMITS, NAME, library
from unimega.kernels.expert_order import ExpertOrder
from unimega.kernels.topk_routing import check, score_all, weigh


def route(
    logits: torch.Tensor,
    *,
    k: int,
    score: str = "softmax",
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    group_topk: int = 1,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, ExpertOrder]:
    """See ``kernels.route``. At most 512 experts, 16 of them chosen. The gradient is torch's, from the logits again."""
    check(logits, k, score, groups, group_topk)
    _fits(logits.shape[1], k)
    rows = logits.shape[0] if rows is None else rows
    weights, experts, *order = _Route.apply(logits, bias, rows, k, score, normalize, scale, groups, group_topk, True)
    return weights, experts, ExpertOrder(*order)


def topk_routing(
    logits: torch.Tensor,
    *,
    k: int,
    score: str = "softmax",
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    group_topk: int = 1,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.topk_routing``. At most 512 experts, 16 of them chosen. One launch."""
    check(logits, k, score, groups, group_topk)
    _fits(logits.shape[1], k)
    rows = logits.shape[0] if rows is None else rows
    weights, experts = _Route.apply(logits, bias, rows, k, score, normalize, scale, groups, group_topk, False)
    return weights, experts


def expert_order(experts: torch.Tensor, num_experts: int) -> ExpertOrder:
    """See ``kernels.expert_order``. At most 512 experts, 16 slots of a token."""
    tokens, k = experts.shape
    _fits(num_experts, k)
    experts = experts.contiguous()
    order, workspace = _buffers(experts, num_experts)
    if tokens:
        _call("unimega_expert_order", experts, tokens, num_experts, k, workspace, *order)
    return ExpertOrder(*order)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        rows: int,
        k: int,
        score: str,
        normalize: bool,
        scale: float,
        groups: int,
        group_topk: int,
        ordered: bool,
    ) -> tuple[torch.Tensor, ...]:
        tokens, num_experts = logits.shape
        wide = logits.float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        experts = torch.empty(tokens, k, dtype=torch.int32, device=logits.device)
        weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
        order: tuple[torch.Tensor, ...] = ()
        name, more = "unimega_topk_routing", order
        if ordered:
            order, workspace = _buffers(experts, num_experts)
            name, more = "unimega_route", (workspace, *order)
        if tokens:
            _call(
                name, wide, bias, tokens, rows, num_experts, k, score == "sigmoid", normalize, scale,
                groups, group_topk if groups > 1 else 1, weights, experts, *more,
            )  # fmt: skip
        ctx.rows, ctx.how = rows, {"score": score, "normalize": normalize, "scale": scale}
        ctx.save_for_backward(logits, experts)
        ctx.mark_non_differentiable(experts, *order)
        return weights, experts, *order

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weights: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        real = logits[: ctx.rows].detach().requires_grad_()
        with torch.enable_grad():
            scores = score_all(real.float(), ctx.how["score"])
            weights = weigh(scores, experts[: ctx.rows].long(), **ctx.how, pads=0)[0]
            (d_real,) = torch.autograd.grad((weights,), (real,), (d_weights[: ctx.rows],))
        pads = logits.shape[0] - ctx.rows
        d_logits = torch.cat((d_real, d_real.new_zeros(pads, logits.shape[1]))) if pads else d_real
        return d_logits, *(None,) * 9


def _fits(num_experts: int, k: int) -> None:
    """For who calls an op without a model, whose construction asks ``registry.resolve``."""
    most, slots = LIMITS["experts"], LIMITS["top_k"]
    if num_experts > most or k > slots:
        raise KernelUnavailable(
            f"experts={num_experts}, k={k} do not fit the CUDA kernels of routing, which take {most} experts and "
            f"{slots} slots of a token. Name another implementation in [kernels] for topk_routing, expert_order and "
            "route."
        )


def _buffers(experts: torch.Tensor, num_experts: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """offsets, place and source; and the workspace."""
    tokens = experts.shape[0]
    offsets = experts.new_empty(num_experts + 1) if tokens else experts.new_zeros(num_experts + 1)
    order = (offsets, torch.empty_like(experts), experts.new_empty(experts.numel()))
    return order, experts.new_empty(library().unimega_routing_workspace(tokens, num_experts))


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library on the current stream; tensors are passed as their addresses."""
    stream = backend.current().current_stream().cuda_stream
    passed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    if code := getattr(library(), name)(*passed, stream):
        reason = library().unimega_error(code).decode()
        raise KernelUnavailable(f"{name} of {NAME} failed: {reason} (CUDA error {code}).")
