"""The precision references compute in."""

import torch


def widen(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32; fp64 stays, so that a test can have exact numbers from the same code."""
    return x if x.dtype == torch.float64 else x.float()
