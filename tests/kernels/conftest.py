"""Triton's interpreter, made right for bf16 before any kernel runs in it."""

import os

from unimega.kernels import availability

if os.environ.get(availability.INTERPRET) == "1" and availability.missing("triton") is None:
    from tests.kernels import interpreter

    interpreter.install()
