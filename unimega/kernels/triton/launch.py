"""What the kernels' modules share: launch sizes, and how each kernel is compiled ahead of time in the tests."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

TILE = 1024
"""Elements that a program of a memory-bound kernel takes at a time: 8 a thread of 4 warps, 16 bytes in bf16."""


@dataclass(frozen=True)
class Launch:
    """One way a kernel is compiled: what its launcher gives the compiler at a usual size.

    Each module lists those of its kernels in ``LAUNCHES``; a test fails for a kernel that is in none.
    """

    name: str
    """Kernel and what is chosen, e.g. ``rms_norm_backward D 4096``."""
    kernel: Any
    """The ``@triton.jit`` function."""
    types: Mapping[str, str]
    """Argument -> type: ``*bf16``, ``*fp32``, ``*i32``, ``i32``, ``i64``, ``fp32``; those of ``constants`` left out."""
    constants: Mapping[str, Any]
    """constexpr arguments, and pointers that are None."""
    multiples: frozenset[str] = frozenset()
    """Integer arguments that are multiples of 16, as Triton finds at the call; pointers always are."""
    options: Mapping[str, int] = field(default_factory=dict)
    """num_warps, num_stages."""
    capabilities: tuple[int, ...] = (80, 90)
    """Compute capabilities (80: A100, 90: H100) on which it is launched so."""


def programs(device: torch.device) -> int:
    """Programs of a kernel that loops over rows: two a multiprocessor; two in the interpreter."""
    return 2 * _multiprocessors(device) if device.type == "cuda" else 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a device, e.g. 90; the interpreter takes the tiles of that."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile(width: int, elements: int = TILE) -> tuple[int, int]:
    """(rows, columns) of a tile of ``elements``, both powers of two; whole rows of ``width`` where they are short."""
    columns = min(power_of_2(width), elements)
    return elements // columns, columns


def power_of_2(n: int) -> int:
    """The smallest power of two >= n and >= 1."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
