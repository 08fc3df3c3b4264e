"""Gradients of the weights of a linear, added to main grads by the GEMM itself where an implementation can."""

from collections.abc import Sequence
from typing import Any

import torch

from unimega.parallel.rows import Spans


def weight_gradients(
    gemms: Any,
    dy: torch.Tensor,
    x: torch.Tensor,
    spans: Spans,
    weights: Sequence[torch.Tensor],
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of a product's weights; where an implementation adds to fp32 main grads itself, buffers of no meaning.

    megatron-core's hook adds a parameter's gradient to ``main_grad`` unless ``grad_added_to_main_grad`` says that it is
    there, but wants to see one in both cases.
    """
    mains = [getattr(weight, "main_grad", None) for weight in weights]
    fused = gemms.accumulate_weight is not None and dy.dtype in (torch.bfloat16, torch.float16)
    wanted = [main for main, needed in zip(mains, needs, strict=True) if needed]
    if not fused or any(main is None or main.dtype != torch.float32 for main in wanted):
        return gemms.grad_weight(dy, x, spans, needs)
    gradients: list[torch.Tensor | None] = []
    for (start, stop), weight, main, needed in zip(spans, weights, mains, needs, strict=True):
        if needed and stop > start:
            gemms.accumulate_weight(dy[start:stop], x[start:stop], main)
        if needed:
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        gradients.append(torch.empty_like(weight) if needed else None)
    return gradients
