"""A linear map with a weight for each modality on runs of rows: ``y[span_m] = x[span_m] @ weight_m.T + bias_m``.

Not one function but four, without autograd: the autograd functions of ``unimega.parallel`` call them, because their
collectives go in between (gather, then forward; input gradient, then scatter behind the weight gradients).

``forward(x, spans, weights, biases, out=None) -> y``
``grad_input(dy, spans, weights, out=None, accumulate=False) -> dx``, ``dx[span_m] (+)= dy[span_m] @ weight_m``
``grad_weight(dy, x, spans, needs) -> [dweight_m | None]``, ``dy[span_m].T @ x[span_m]``
``grad_bias(dy, spans, needs) -> [dbias_m | None]``, ``sum of dy[span_m]``

x, dx: [T, D]. y, dy: [T, O]. weights: M tensors [O, D], O the same for all; biases: M tensors [O] or None; one dtype.
spans: M pairs (start, stop) of host ints, ascending (a shared weight: one span of all rows); rows of no span stay what
they were in ``out`` and are undefined without it. needs: M host bools. A span without rows gives zeros, never None.

``accumulate_weight(dy, x, main_grad)``, which an implementation may lack: ``main_grad += dy.T @ x`` for one span with
rows, main_grad fp32 [O, D], dy and x in 16 bits. One GEMM: the product is not rounded in between, and the fp32 sum is
not read and written apart.

GEMMs accumulate in fp32 (a device may use less for fp32, torch's setting decides) and round once, to the dtype of x;
``accumulate`` rounds the sum once more. Operations: 2 T D O each. No copies: GEMMs read and write slices in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from unimega.kernels import availability, registry

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class SplitLinear:
    """The functions of one implementation; see the module for what each does."""

    forward: Callable[..., torch.Tensor]
    grad_input: Callable[..., torch.Tensor]
    grad_weight: Callable[..., list[torch.Tensor | None]]
    grad_bias: Callable[..., list[torch.Tensor | None]]
    accumulate_weight: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


def _forward(
    x: torch.Tensor,
    spans: Spans,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    y = x.new_empty(x.shape[0], weights[0].shape[0]) if out is None else out
    with torch.no_grad():
        for (start, stop), weight, bias in zip(spans, weights, biases, strict=True):
            if bias is None:
                torch.mm(x[start:stop], weight.t(), out=y[start:stop])
            else:
                torch.addmm(bias, x[start:stop], weight.t(), out=y[start:stop])
    return y


def _grad_input(
    dy: torch.Tensor,
    spans: Spans,
    weights: Sequence[torch.Tensor],
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    dx = dy.new_empty(dy.shape[0], weights[0].shape[1]) if out is None else out
    with torch.no_grad():
        for (start, stop), weight in zip(spans, weights, strict=True):
            if accumulate:
                dx[start:stop].addmm_(dy[start:stop], weight)
            else:
                torch.mm(dy[start:stop], weight, out=dx[start:stop])
    return dx


def _grad_weight(dy: torch.Tensor, x: torch.Tensor, spans: Spans, needs: Sequence[bool]) -> list[torch.Tensor | None]:
    with torch.no_grad():
        return [
            dy[start:stop].t() @ x[start:stop] if needed else None
            for (start, stop), needed in zip(spans, needs, strict=True)
        ]


def _grad_bias(dy: torch.Tensor, spans: Spans, needs: Sequence[bool]) -> list[torch.Tensor | None]:
    with torch.no_grad():
        return [dy[start:stop].sum(0) if needed else None for (start, stop), needed in zip(spans, needs, strict=True)]


reference = SplitLinear(_forward, _grad_input, _grad_weight, _grad_bias)
"""The definition in plain torch."""


def accumulating(accumulate_weight: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> SplitLinear:
    """The definition, with weight gradients that an implementation adds to main grads by itself."""
    return replace(reference, accumulate_weight=accumulate_weight)


def _add_in_gemm(dy: torch.Tensor, x: torch.Tensor, main_grad: torch.Tensor) -> None:
    torch.addmm(main_grad, dy.t(), x, out_dtype=main_grad.dtype, out=main_grad)


addmm = accumulating(_add_in_gemm)
"""With cuBLAS writing fp32 (``out_dtype``, torch 2.8 or later, CUDA alone)."""


registry.declare(
    "split_linear",
    registry.Impl(
        "apex",
        "unimega.kernels.apex:split_linear",
        frozenset({"cuda"}),
        availability.packages("fused_weight_gradient_mlp_cuda"),
        note="never run on hardware",
    ),
    registry.Impl(
        "addmm",
        f"{__name__}:addmm",
        frozenset({"cuda"}),
        only_named=frozenset({"cuda"}),
        note="never run on hardware",
    ),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
