"""The extensions of csrc/*.cpp, for the rows called ``cpp``; setup.py builds them where there is a compiler."""

import importlib
from typing import Any

import torch


def _load(name: str, *functions: str) -> Any:
    try:
        found = importlib.import_module(name)
    except ImportError:
        return None
    return found if all(hasattr(found, function) for function in functions) else None  # an older checkout may be there


module = _load("unimega._data_index", "expert_order", "topk")
"""Takes addresses of tensors on a CPU; None: it is not there."""
softmax = _load("unimega._softmax")
"""As ``module``, built apart with OpenMP."""


def why_not(device: torch.device) -> str | None:
    """Why the functions of ``module`` cannot run."""
    return None if module is not None else "unimega._data_index is not compiled"


def why_no_softmax(device: torch.device) -> str | None:
    """Why those of ``softmax`` cannot."""
    return None if softmax is not None else "unimega._softmax is not compiled"
