"""SwiGLU in 16 bits on a CPU: the reference's passes over a few rows at a time, in buffers that stay in cache.

In fp32 there is nothing to widen, and the reference is as fast.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unimega.kernels.swiglu import reference

_BLOCK_ELEMENTS = 2**16
"""Of a half: its fp32 buffers, four at most, are a core's cache."""


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``unimega.kernels.swiglu``."""
    return _SwiGLU.apply(gate_up) if gate_up.dtype in (torch.bfloat16, torch.float16) else reference(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for part, (gate, up) in _blocks(y, 2):
            for wide, half in zip((gate, up), gate_up[part].chunk(2, dim=1), strict=True):
                wide.copy_(half)
            y[part] = torch.ops.aten.silu_(gate).mul_(up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        one = torch.ones((), dtype=torch.float32)
        for part, (gate, up, wide_dy, sigmoid) in _blocks(dy, 4):
            for wide, half in zip((gate, up, wide_dy), (*gate_up[part].chunk(2, dim=1), dy[part]), strict=True):
                wide.copy_(half)
            d_gate, d_up = grad[part].chunk(2, dim=1)
            silu = gate.mul_(torch.sigmoid(gate, out=sigmoid))
            up.mul_(wide_dy)
            d_up.copy_(wide_dy.mul_(silu))
            # s (1 + gate (1 - s)) = silu + s (1 - silu): one exponential for both
            d_gate.copy_(torch.lerp(silu, one, sigmoid, out=wide_dy).mul_(up))
        return grad


def _blocks(y: torch.Tensor, number: int) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """(rows, ``number`` fp32 buffers of their size), a few rows at a time."""
    rows, width = y.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    buffers = torch.empty(number, min(step, rows), width)
    for low in range(0, rows, step):
        part = slice(low, min(low + step, rows))
        yield part, buffers[:, : part.stop - low].unbind(0)
