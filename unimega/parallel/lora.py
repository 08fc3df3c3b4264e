"""LoRA: ``y = x W^T + scale * dropout(x) A^T B^T`` beside any linear, its factors cut over tp as the weight is.

A weight may hold several projections (q, k, v; gate, up): each has an A of its own, [rank, D], which lie one below the
other, and rows of B, [O, rank], beside those of the weight; so they are PEFT's factors of each projection. B starts at
zero. P projections, R = P * rank.

The pieces that are not cut see this rank's rows, and between the two factors lie R columns for each row: they are
what travels. A is small, its gradient is summed over tp with those of the norms (``sequence_parallel``).

| linear | A | B | forward, T*R*b bytes | backward, T*R*b bytes |
|---|---|---|---|---|
| column | [R, D], whole, local rows | [O_tp, rank] | sp: all-gather | reduce-scatter (sp) or all-reduce |
| row | [rank, F_tp] | [D, rank], whole, local rows | reduce-scatter (sp) or all-reduce | sp: all-gather |

So a frozen base costs neither its weight gradients nor, under sequence parallelism, the gather of x in backward.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from torch import nn
from torch.autograd.function import once_differentiable

from unimega.config.lora import has_factors
from unimega.config.schema import Lora
from unimega.parallel import rows
from unimega.parallel.factors import Fused, Pair
from unimega.parallel.rows import Layout, Spans
from unimega.parallel.weight_gradients import weight_gradients

CUT, EXPERTS = "model-parallel-rng", get_expert_parallel_rng_tracker_name()
"""Random states of megatron-core: of what tp cuts, and of the rows of experts."""


@dataclass(frozen=True)
class Factors:
    """The pairs beside the weights of one product (see ``linear.Product``)."""

    pairs: tuple[Pair, ...]
    dropout: float

    @property
    def columns(self) -> int:
        """R."""
        return self.pairs[0].a.shape[-2]


class Adapted(nn.Module):
    """A linear that may have factors beside its weights. They are parameters of its own (see ``linear.Weights``)."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self.fused = fused
        self.lora: Lora | None = None
        self.merged = False

    @abstractmethod
    def adapt(self, lora: Lora) -> None:
        """Make the factors; uninitialised."""

    @abstractmethod
    def pairs(self) -> Iterator[tuple[torch.Tensor, Pair]]:
        """Every weight that has factors, with them."""

    def register(self, suffix: str, a: nn.Parameter, b: nn.Parameter, *, outputs: int) -> None:
        """Add the factors of a weight, of which this rank has so many outputs."""
        self.register_parameter(f"lora_a{suffix}", a)
        self.register_parameter(f"lora_b{suffix}", b)
        if self.fused.number > 1:
            self.register_buffer(f"owners{suffix}", self.fused.owners(outputs), persistent=False)

    def pair(self, suffix: str) -> Pair:
        """The factors of a weight."""
        assert self.lora is not None
        owners = getattr(self, f"owners{suffix}") if self.fused.number > 1 else None
        scale = self.lora.alpha / self.lora.rank
        return Pair(getattr(self, f"lora_a{suffix}"), getattr(self, f"lora_b{suffix}"), owners, scale)

    @property
    def dropout(self) -> float:
        """That of this forward."""
        return self.lora.dropout if self.lora is not None and self.training else 0.0

    @property
    def is_added(self) -> bool:
        """Whether a forward adds what the factors make."""
        return self.lora is not None and not self.merged


def adapt(stage: nn.Module, lora: Lora | None) -> None:
    """Give the linears whose names match factors, before the stage is filled and wrapped."""
    if lora is None:
        return
    for name, module in stage.named_modules():
        if isinstance(module, Adapted) and has_factors(lora, name):
            module.lora = lora
            module.adapt(lora)


def is_factor(name: str) -> bool:
    """Whether a parameter or key of a checkpoint is a factor."""
    return ".lora_a" in name or ".lora_b" in name


def merge(stages: Sequence[nn.Module]) -> None:
    """Add what the factors make to the weights, and leave them out of forwards. Sums are fp32 and rounded once.

    For evaluation and export; a merged model is not trained: an optimizer has weights of its own (fp32 masters), and
    checkpoints would hold the sum beside the factors. No collectives.
    """
    _move(stages, 1.0)


def unmerge(stages: Sequence[nn.Module]) -> None:
    """Take it off again. A weight comes back to about one rounding of the merged one: bf16 loses digits for good."""
    _move(stages, -1.0)


def _move(stages: Sequence[nn.Module], sign: float) -> None:
    with torch.no_grad():
        for stage in stages:
            for module in stage.modules():
                if not isinstance(module, Adapted) or module.lora is None or module.merged == (sign > 0):
                    continue
                module.merged = sign > 0
                for weight, pair in module.pairs():
                    weight.copy_(weight.float() + sign * pair.delta())


def drop(x: torch.Tensor, share: float, *, apart: str = "") -> torch.Tensor:
    """Dropout; all random states are restored where a layer is run again in backward.

    Args:
        apart: name of the random state, ``CUT`` or ``EXPERTS``, where tp ranks hold other values or other numbers of
            them; empty: the one that is equal on tp ranks.
    """
    if not share:
        return x
    if not apart:
        return F.dropout(x, share)
    with get_cuda_rng_tracker().fork(apart):
        return F.dropout(x, share)


def summed_gradient(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The values themselves; backward: one all-reduce of their gradient, a partial sum on each rank of the group."""
    return values if group.size() == 1 else _SummedGradient.apply(values, group)


def add_to_columns(
    outputs: list[torch.Tensor],
    x_tD: torch.Tensor,
    spans: Sequence[Spans],
    factors: Sequence[Factors | None],
    layout: Layout,
    gemms: Any,
) -> None:
    """Add to the outputs of column linears, in place; arguments as in ``linear.column_linear``."""
    adapted = [(number, own) for number, own in enumerate(factors) if own is not None]
    if not adapted:
        return
    t = x_tD.shape[0]
    lows = []
    for number, own in adapted:
        seen = drop(x_tD, own.dropout, apart=CUT if layout.size > 1 and layout.sequence_parallel else "")
        lows.append(_Shrink.apply(seen, rows.local(spans[number], t, layout), gemms, *[pair.a for pair in own.pairs]))
    low = torch.cat(lows, dim=1)
    if layout.size > 1:
        low = _ToColumns.apply(low, layout)
    for (number, own), part in zip(adapted, low.split([own.columns for _, own in adapted], dim=1), strict=True):
        start, stop = spans[number][0][0], spans[number][-1][1]
        wide = [pair.wide() for pair in own.pairs]
        outputs[number] = _Expand.apply(outputs[number], part[start:stop], rows.shifted(spans[number]), gemms, *wide)


def add_to_rows(
    y_tD: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    spans: Sequence[Spans],
    factors: Sequence[Factors | None],
    total: int,
    layout: Layout,
    gemms: Any,
) -> torch.Tensor:
    """Add to the sum of row linears, in place; arguments as in ``linear.row_linear``."""
    adapted = [(number, own) for number, own in enumerate(factors) if own is not None]
    if not adapted:
        return y_tD
    lows = []
    for number, own in adapted:
        start, stop = spans[number][0][0], spans[number][-1][1]
        seen = drop(inputs[number], own.dropout, apart=CUT if layout.size > 1 else "")
        low = _Shrink.apply(seen, rows.shifted(spans[number]), gemms, *[pair.a for pair in own.pairs])
        lows.append(F.pad(low, (0, 0, start, total - stop)))
    low = torch.cat(lows, dim=1)
    if layout.size > 1:
        low = _FromRows.apply(low, layout)
    t = y_tD.shape[0]
    for (number, own), part in zip(adapted, low.split([own.columns for _, own in adapted], dim=1), strict=True):
        wide = [pair.wide() for pair in own.pairs]
        y_tD = _Expand.apply(y_tD, part, rows.local(spans[number], t, layout), gemms, *wide)
    return y_tD


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Shrink(torch.autograd.Function):
    """``low[span] = x[span] @ A^T``, 0 in rows of no span."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spans: Spans, gemms: Any, *factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.spans, ctx.gemms = spans, gemms
        low = x.new_zeros(x.shape[0], factors[0].shape[0])
        return gemms.forward(x, spans, factors, [None] * len(factors), out=low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlow: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        dlow = dlow.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            covers = ctx.spans[0][0] == 0 and ctx.spans[-1][1] == len(x)
            dx = torch.empty_like(x) if covers else torch.zeros_like(x)
            ctx.gemms.grad_input(dlow, ctx.spans, factors, out=dx)
        return dx, None, None, *weight_gradients(ctx.gemms, dlow, x, ctx.spans, factors, ctx.needs_input_grad[3:])


class _Expand(torch.autograd.Function):
    """``y[span] += low[span] @ B^T`` in place."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, low: torch.Tensor, spans: Spans, gemms: Any, *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(low, *factors)
        ctx.spans, ctx.gemms = spans, gemms
        transposed = [b.t() for b in factors]  # grad_input multiplies by W, a forward by its transpose
        gemms.grad_input(low, spans, transposed, out=y, accumulate=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, *factors = ctx.saved_tensors
        dy = dy.contiguous()
        dlow = None
        if ctx.needs_input_grad[1]:
            dlow = torch.zeros_like(low, memory_format=torch.contiguous_format)
            ctx.gemms.grad_input(dy, ctx.spans, factors, out=dlow)
        return dy, dlow, None, None, *ctx.gemms.grad_weight(dy, low, ctx.spans, ctx.needs_input_grad[4:])


class _ToColumns(torch.autograd.Function):
    """All rows for factors that are cut by outputs; the gradient, a partial sum on each rank, goes back summed."""

    @staticmethod
    def forward(ctx: Any, low: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return rows.gathered(low, layout) if layout.sequence_parallel else low.view_as(low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlow: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return rows.summed(dlow.clone(memory_format=torch.contiguous_format), ctx.layout), None


class _FromRows(torch.autograd.Function):
    """The sum over ranks that each have a share of the inputs; the gradient goes back to all of them."""

    @staticmethod
    def forward(ctx: Any, low: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return rows.summed(low.clone(memory_format=torch.contiguous_format), layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlow: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return rows.gathered(dlow, ctx.layout) if ctx.layout.sequence_parallel else dlow, None
