"""Triton rows of the table, imported when one is chosen.

What holds for every kernel here:
- fp32 from the load on, one rounding in the store; no atomics, so that a call repeats bit for bit.
- No run-time tuning: tile sizes are a table, ``LAUNCHES`` in each module, and what the tests compile ahead of time is
  what runs. Every ``@triton.jit`` entry has a ``Launch`` for each architecture class it differs on.
- Offsets of rows are int64: tokens x width passes 2^31.
- All of it runs in Triton's interpreter on a CPU (``TRITON_INTERPRET=1``): how numbers are tested without a GPU.
"""

import os

from unimega.kernels import availability

if os.environ.get(availability.INTERPRET) == "1":
    from unimega.kernels.triton import interpreter

    interpreter.install()  # before any kernel runs in it
