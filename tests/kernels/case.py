"""What a case of ``cases.py`` is, and the numbers it is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    name: str
    leaves: tuple[torch.Tensor, ...]
    """fp64; cast to the dtype of the test. What gradients are taken of."""
    call: Callable[[Any, Tensors], Sequence[torch.Tensor]]
    """Calls an implementation, or the definition, on the leaves; returns its outputs."""
    strided: bool = False
    """Leaves and incoming gradients are not contiguous."""


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
