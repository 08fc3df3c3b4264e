"""The extension of csrc/*.cpp, for the rows called ``cpp``; setup.py builds it where there is a compiler."""

import importlib
from typing import Any

import torch

FUNCTIONS = ("expert_order", "topk", "softmax_statistics_bfloat16")


def _load() -> Any:
    try:
        found = importlib.import_module("unimega._data_index")
    except ImportError:
        return None
    return found if all(hasattr(found, name) for name in FUNCTIONS) else None  # an older checkout may have left one


module = _load()
"""Takes addresses of tensors on a CPU; None: it is not there."""


def why_not(device: torch.device) -> str | None:
    """Why its functions cannot run."""
    return None if module is not None else "unimega._data_index is not compiled"
