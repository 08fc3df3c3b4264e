"""SwiGLU: ``y = silu(gate) * up``.

``swiglu(gate_up) -> y``

gate_up: [t, 2F], the columns [gate | up], any float dtype. y: [t, F], same dtype.
Gradients, with s = sigmoid(gate): ``dup = dy gate s``, ``dgate = dy up s (1 + gate (1 - s))``.

The math is in fp32 (fp64 for fp64), one rounding at the end. Saved for backward: gate_up alone.
Bytes, forward: 3 t F itemsize; backward: 5 t F itemsize.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from unimega.kernels import registry
from unimega.kernels.precision import widen


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    """See the module: the definition in plain torch."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(widen(gate)).mul_(up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = (widen(half) for half in gate_up.chunk(2, dim=-1))
        wide_dy = widen(dy)
        grad = torch.empty_like(gate_up, dtype=gate.dtype, memory_format=torch.contiguous_format)
        d_gate, d_up = grad.chunk(2, dim=-1)
        torch.mul(F.silu(gate), wide_dy, out=d_up)
        torch.ops.aten.silu_backward.grad_input(wide_dy * up, gate, grad_input=d_gate)
        return grad.to(gate_up.dtype)


registry.declare(
    "swiglu",
    registry.triton("swiglu:swiglu"),
    registry.Impl("cpu", "unimega.kernels.swiglu_cpu:swiglu", frozenset({"cpu"})),
    registry.npu("elementwise:swiglu", "npu_swiglu"),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
