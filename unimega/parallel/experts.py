"""The ranks around a layer of routed experts."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

Dispatch = Literal["alltoall", "allgather"]


@dataclass(frozen=True)
class ExpertLayout:
    """How a layer's experts are cut: rank r of ``ep`` holds experts [r E/ep, (r + 1) E/ep), each cut over ``etp``."""

    ep: dist.ProcessGroup
    """Ranks that share a layer's experts."""
    etp: dist.ProcessGroup
    """Ranks that share each expert's width: those of tp, or this one alone."""
    dispatch: Dispatch = "alltoall"
    """How rows reach their experts' rank: each only the ranks it needs, or all rows all ranks."""
