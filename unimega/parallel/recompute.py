"""Run a piece of the forward again in backward, in place of keeping what it made."""

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel


def recompute(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``function(x)``, of whose insides only x is kept; random states are restored for the second run.

    Host data (counts, orders) rides in the closure of ``function``.
    """
    return tensor_parallel.checkpoint(function, False, x)
