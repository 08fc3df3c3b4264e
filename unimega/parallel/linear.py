"""Linears with one weight for all tokens or one per modality, cut over tp: one collective for any number of weights.

Letters as in docs/parallelism.md: T tokens, t tokens here, D width in, O width out (o here). Tokens are in modality
order, so the rows of a modality are one slice and a split linear is M plain GEMMs. Sequence parallelism shards that
same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unimega.config.schema import Lora
from unimega.kernels.registry import resolve
from unimega.parallel.factors import ONE, Fused, Pair
from unimega.parallel.lora import Adapted, Factors, add_to_columns, add_to_rows
from unimega.parallel.parameter import parameter
from unimega.parallel.rows import Layout, Spans, gathered, shifted, start_sum
from unimega.parallel.rows import spans as spans_of
from unimega.parallel.weight_gradients import weight_gradients

__all__ = ["Layout", "Product", "Weights", "column_linear", "row_linear", "split_linear_op"]


@dataclass(frozen=True)
class Product:
    """GEMMs of equal width on neighbouring spans of rows: they fill one buffer."""

    spans: Spans
    """Rows of each GEMM, host ints; each starts where the one before stops."""
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    factors: Factors | None = None
    """What LoRA adds; one pair for each weight."""


class Weights(Adapted):
    """The weights of one linear, as direct attributes of a module that is called.

    megatron-core waits for overlapped parameter gathers in a hook before ``forward`` and looks at direct parameters
    only: a module that is never called is never waited for. So ``forward`` hands the weights out, and the functions
    below do the arithmetic.

    Args:
        d_in, d_out: widths of the whole linear, one per modality for a split one (0: that modality has none).
        modalities: names for a split linear; None for a shared one.
        dim: 0 cuts the outputs over tp (column), 1 the inputs (row).
        bias: a bias on the outputs; a row linear's acts after the reduction, on local rows.
        unused: modalities beside a shared weight whose weight (and bias) is carried frozen and never used.
        fused: the projections that the outputs of this rank are made of.
    """

    def __init__(
        self,
        d_in: int | Sequence[int],
        d_out: int | Sequence[int],
        *,
        modalities: tuple[str, ...] | None,
        dim: int,
        layout: Layout,
        bias: bool = False,
        unused: tuple[str, ...] = (),
        fused: Fused = ONE,
    ) -> None:
        super().__init__(fused)
        number = len(modalities) if modalities else 1
        widths_in, widths_out = ([w] * number if isinstance(w, int) else list(w) for w in (d_in, d_out))
        self.suffixes = tuple(f"_{name}" for name in modalities) if modalities else ("",)
        self.widths = tuple(min(i, o) and (i, o)[1 - dim] for i, o in zip(widths_in, widths_out, strict=True))
        self.sizes = {s: (o, i) for s, i, o in zip(self.suffixes, widths_in, widths_out, strict=True) if min(i, o)}
        self.dim, self.layout, self.has_bias = dim, layout, bias
        for suffix, (o, i) in self.sizes.items():
            self._register(suffix, o, i)
        for name in unused:
            self._register(f"_{name}", widths_out[0], widths_in[0], trained=False)

    def _register(self, suffix: str, d_out: int, d_in: int, *, trained: bool = True) -> None:
        made: dict[str, nn.Parameter] = {"weight": parameter(d_out, d_in, dim=self.dim, tp=self.layout.size)}
        if self.has_bias:
            sharded = 0 if self.dim == 0 else None
            made["bias"] = parameter(d_out, dim=sharded, tp=self.layout.size, on_local_rows=self.dim == 1)
        for what, values in made.items():
            values.requires_grad_(trained)
            self.register_parameter(f"{what}{suffix}", values)

    def adapt(self, lora: Lora) -> None:
        """Make the factors of every modality that has a weight; what is not cut acts on local rows."""
        tp, column = self.layout.size, self.dim == 0
        for suffix, (o, i) in self.sizes.items():
            a = parameter(self.fused.number * lora.rank, i, dim=None if column else 1, tp=tp, on_local_rows=column)
            b = parameter(o, lora.rank, dim=0 if column else None, tp=tp, on_local_rows=not column)
            self.register(suffix, a, b, outputs=len(b))

    def pairs(self) -> Iterator[tuple[torch.Tensor, Pair]]:
        """Every weight that has factors, with them."""
        for suffix in self.sizes:
            yield getattr(self, f"weight{suffix}"), self.pair(suffix)

    def forward(self, counts: tuple[int, ...]) -> tuple[Product, ...]:
        """The GEMMs for T = sum(counts) rows: one product if widths are equal, else one per modality with a width."""
        spans = spans_of(counts if len(self.suffixes) > 1 else (sum(counts),))
        parts = [(span, suffix) for span, suffix in zip(spans, self.suffixes, strict=True) if suffix in self.sizes]
        if len(set(self.widths)) == 1:
            return (self._product(parts),)
        return tuple(self._product([part]) for part in parts)

    def _product(self, parts: list[tuple[tuple[int, int], str]]) -> Product:
        """Of the weights of some modalities, each with its rows."""
        return Product(
            spans=tuple(span for span, _ in parts),
            weights=tuple(getattr(self, f"weight{suffix}") for _, suffix in parts),
            biases=tuple(getattr(self, f"bias{suffix}") if self._column_bias else None for _, suffix in parts),
            factors=Factors(tuple(self.pair(suffix) for _, suffix in parts), self.dropout) if self.is_added else None,
        )

    @property
    def _column_bias(self) -> bool:
        return self.has_bias and self.dim == 0

    def add_bias(self, y_tD: torch.Tensor, local_counts: tuple[int, ...]) -> torch.Tensor:
        """A row linear's bias, after the reduction: each modality's to its rows of this rank."""
        if not self.has_bias:
            return y_tD
        counts = local_counts if len(self.suffixes) > 1 else (sum(local_counts),)
        biases = [getattr(self, f"bias{suffix}") for suffix in self.suffixes]
        return torch.cat([part + bias for part, bias in zip(y_tD.split(counts), biases, strict=True)])


def column_linear(x_tD: torch.Tensor, products: tuple[Product, ...], layout: Layout, gemms: Any) -> list[torch.Tensor]:
    """``y = x @ weight.T + bias`` for every product, outputs cut over tp: X[T_tp, D] W[D, O_tp] -> Y[T, O_tp].

    Args:
        x_tD: [T / tp, D] under sequence parallelism, else [T, D], in modality order.
        products: the GEMMs; those of several modules may share the one collective.
        gemms: the chosen implementation of the op ``split_linear``.

    Returns:
        One [rows of the product, o] per product. Forward: one all-gather of T*D*itemsize bytes under sequence
        parallelism. Backward: that all-gather again (only the local shard is kept), and one reduce-scatter (sp) or
        all-reduce of as many bytes, behind the weight gradients. A modality without tokens gets zeros, never None.
        Beside them the small collectives of LoRA (``parallel.lora``).
    """
    weights = [w for p in products for w in p.weights]
    biases = [b for p in products for b in p.biases]
    outputs = list(_Column.apply(x_tD, products, layout, gemms, *weights, *biases))
    add_to_columns(outputs, x_tD, [p.spans for p in products], [p.factors for p in products], layout, gemms)
    return outputs


def row_linear(
    inputs: Sequence[torch.Tensor], products: tuple[Product, ...], total: int, layout: Layout, gemms: Any
) -> torch.Tensor:
    """Sum of ``input @ weight.T`` over products and over tp: H[T, F_tp] W[F_tp, D] -> Y[T_tp, D].

    Args:
        inputs: [rows of the product, f] per product.
        total: T; every row is covered by a product (``LayerSpec`` gives each modality an FFN).

    Returns:
        [T / tp, D] under sequence parallelism, else [T, D]. Forward: one reduce-scatter or all-reduce of T*D*itemsize
        bytes; backward: one all-gather of as many under sequence parallelism, else none. LoRA as above.
    """
    weights = [w for p in products for w in p.weights]
    y_tD = _Row.apply(products, total, layout, gemms, len(inputs), *inputs, *weights)
    spans, factors = [p.spans for p in products], [p.factors for p in products]
    return add_to_rows(y_tD, inputs, spans, factors, total, layout, gemms)


def split_linear_op(device: torch.device, kernels: dict[str, str]) -> Any:
    """The implementation of ``split_linear`` that a run asks for."""
    return resolve("split_linear", device=device, impl=kernels.get("split_linear", "auto"))


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, products: tuple[Product, ...], layout: Layout, gemms: Any, *tensors: Any
    ) -> tuple[torch.Tensor, ...]:
        number = len(tensors) // 2
        ctx.save_for_backward(x, *tensors[:number])
        ctx.spans = tuple(p.spans for p in products)
        ctx.layout, ctx.gemms = layout, gemms
        x_full = gathered(x, layout) if layout.sequence_parallel else x
        outputs, at = [], 0
        for spans in ctx.spans:
            start, stop = spans[0][0], spans[-1][1]
            weights, biases = tensors[at : at + len(spans)], tensors[number + at : number + at + len(spans)]
            outputs.append(gemms.forward(x_full[start:stop], shifted(spans), weights, biases))
            at += len(spans)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        layout, gemms, number = ctx.layout, ctx.gemms, len(weights)
        needs = ctx.needs_input_grad
        douts = [dy.contiguous() for dy in grads]
        needs_weights = any(needs[4 : 4 + number])
        pending, x_full = None, x
        if layout.sequence_parallel and needs_weights:
            x_full = x.new_empty(x.shape[0] * layout.size, x.shape[1])
            pending = dist.all_gather_into_tensor(x_full, x.contiguous(), group=layout.tp, async_op=True)
        dx, reduction = None, None
        if needs[0]:
            rows = x.shape[0] * (layout.size if layout.sequence_parallel else 1)
            dx_full = _accumulate(gemms, douts, ctx.spans, weights, rows, x)
            dx, reduction = start_sum(dx_full, layout)
        if pending is not None:
            pending.wait()
        dweights: list[torch.Tensor | None] = []
        dbiases: list[torch.Tensor | None] = []
        for dy, spans in zip(douts, ctx.spans, strict=True):
            at = len(dweights)
            start, stop = spans[0][0], spans[-1][1]
            wanted = needs[4 + at : 4 + at + len(spans)]
            mine = weights[at : at + len(spans)]
            dweights += weight_gradients(gemms, dy, x_full[start:stop], shifted(spans), mine, wanted)
            dbiases += gemms.grad_bias(dy, shifted(spans), needs[4 + number + at : 4 + number + at + len(spans)])
        if reduction is not None:
            reduction.wait()
        return dx, None, None, None, *dweights, *dbiases


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: tuple[Product, ...],
        total: int,
        layout: Layout,
        gemms: Any,
        number: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        inputs, weights = tensors[:number], tensors[number:]
        ctx.save_for_backward(*tensors)
        ctx.spans = tuple(p.spans for p in products)
        ctx.layout, ctx.gemms, ctx.number = layout, gemms, number
        transposed = [w.t() for w in weights]  # grad_input multiplies by W, a forward by its transpose
        y = _accumulate(gemms, inputs, ctx.spans, transposed, total, inputs[0])
        y_local, reduction = start_sum(y, layout)
        if reduction is not None:
            reduction.wait()
        return y_local

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weights = ctx.saved_tensors[: ctx.number], ctx.saved_tensors[ctx.number :]
        layout, gemms, needs = ctx.layout, ctx.gemms, ctx.needs_input_grad[5:]
        dy = dy.contiguous()
        dy_full = gathered(dy, layout) if layout.sequence_parallel else dy
        dinputs: list[torch.Tensor | None] = []
        dweights: list[torch.Tensor | None] = []
        at = 0
        for place, (h, spans) in enumerate(zip(inputs, ctx.spans, strict=True)):
            rows, local = dy_full[spans[0][0] : spans[-1][1]], shifted(spans)
            mine = weights[at : at + len(spans)]
            dinputs.append(gemms.grad_input(rows, local, mine) if needs[place] else None)
            wanted = needs[ctx.number + at : ctx.number + at + len(spans)]
            dweights += weight_gradients(gemms, rows, h, local, mine, wanted)
            at += len(spans)
        return None, None, None, None, None, *dinputs, *dweights


def _accumulate(
    gemms: Any,
    ys: Sequence[torch.Tensor],
    all_spans: Sequence[Spans],
    weights: Sequence[torch.Tensor],
    total: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """``sum of y @ W`` over products into one [total, D] buffer.

    Products of all rows come first, the others add to them; without one, the others tile the rows (``LayerSpec``).
    """
    out = like.new_empty(total, weights[0].shape[1])
    at = 0
    jobs: list[tuple[int, int, torch.Tensor, Spans, Sequence[torch.Tensor]]] = []
    for y, spans in zip(ys, all_spans, strict=True):
        jobs.append((spans[0][0], spans[-1][1], y, spans, weights[at : at + len(spans)]))
        at += len(spans)
    jobs.sort(key=lambda job: job[1] - job[0] < total)
    filled = 0
    for start, stop, y, spans, mine in jobs:
        gemms.grad_input(y, shifted(spans), mine, out=out[start:stop], accumulate=filled >= total)
        filled += stop - start
    return out
