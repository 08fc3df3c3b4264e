"""Run a piece of the forward again in backward, in place of keeping what it made."""

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel


def recompute(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``function(x)``, of whose insides only x is kept; random states are restored for the second run.

    Host data (counts, orders) and parameters ride in the closure of ``function``. Without gradients it just runs.
    """
    if not torch.is_grad_enabled():
        return function(x)
    if not x.requires_grad:  # megatron-core would then cut the graph: no parameter in the closure had a gradient
        x = x.detach().requires_grad_()
    return tensor_parallel.checkpoint(function, False, x)
