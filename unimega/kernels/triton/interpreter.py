"""Make Triton's interpreter (3.6 to 3.9) compute bf16 as a GPU does.

As it comes it multiplies the raw bits of bf16 in ``tl.dot``, truncates where fp32 is cast down, and has no arithmetic.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def install() -> None:
    """Replace what is wrong in the interpreter, for this process."""
    builder = interpreter.InterpreterBuilder
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def right_cast(self: Any, source: Any, to: Any) -> Any:
        pair = source.dtype.scalar, to.scalar
        if pair == (tl.float32, tl.bfloat16):
            return Handle(_narrow(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return Handle(_widen(source.data), tl.float32)
        return cast(self, source, to)

    def right_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, total, *rest)
        return Handle(np.matmul(_values(a), _values(b), dtype=np.float32) + total.data, total.dtype.scalar)

    def right_binary(self: Any, a: Any, b: Any, op: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16 and op not in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            raise TypeError("arithmetic on bf16: widen to fp32 after the load")
        return binary(self, a, b, op)

    builder.cast_impl, builder.create_dot, builder.binary_op = right_cast, right_dot, right_binary
    builder.create_fp_ext = builder.create_fp_trunc = lambda self, source, to: self.cast_impl(source, to)


def _values(handle: Any) -> np.ndarray:
    return _widen(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; bf16 as its bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
