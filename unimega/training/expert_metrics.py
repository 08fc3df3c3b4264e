"""What a record says of layers with routed experts: lists by layer, and a few numbers over all of them."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from unimega.config.experts import ExpertSpec
from unimega.config.model import ModelSpec
from unimega.moe.statistics import Statistics

DIGITS = 4


def expert_record(spec: ModelSpec, seen: Mapping[int, Statistics]) -> dict[str, Any]:
    """Keys of docs/training.md from the sums since the last record; none without such layers.

    Args:
        seen: sums over ranks and steps, on the host, by number of the layer.
    """
    if not seen:
        return {}
    layers = sorted(seen)
    record: dict[str, Any] = {"moe_layers": layers}
    for m, name in enumerate(spec.modalities):
        record[f"moe_load_{name}"] = [_loads(seen[i].slots[m], _experts(spec, i).open_to(m)) for i in layers]
    for m, name in enumerate(spec.modalities):
        record[f"moe_entropy_{name}"] = [_share(seen[i].entropy[m], seen[i].tokens[m]) for i in layers]
        record[f"moe_dropped_{name}"] = [_share(seen[i].dropped[m], int(seen[i].slots[m].sum())) for i in layers]
    tokens = {i: sum(seen[i].tokens) for i in layers}
    slots = sum(int(seen[i].slots.sum()) for i in layers)
    loads = [_loads(seen[i].slots.sum(dim=0), _experts(spec, i).number) for i in layers]
    return record | {
        "moe_load_max": max((max(shares) for shares in loads if shares), default=None),
        "moe_dropped": _share(sum(int(seen[i].dropped.sum()) for i in layers), slots),
        "moe_entropy": _mean([_share(seen[i].entropy.sum(), tokens[i]) for i in layers]),
        "moe_balance_loss": _mean([_share(seen[i].balance, tokens[i]) for i in layers]),
        "moe_z_loss": _mean([_share(seen[i].z_loss, tokens[i]) for i in layers]),
    }


def _experts(spec: ModelSpec, index: int) -> ExpertSpec:
    experts = spec.layers[index].experts
    assert experts is not None
    return experts


def _loads(slots: torch.Tensor, open_experts: int) -> list[float] | None:
    """Each expert's slots over its fair share; None if there were none at all."""
    total = int(slots.sum())
    return [_rounded(value * open_experts / total) for value in slots.tolist()] if total else None


def _share(part: torch.Tensor | float, whole: int) -> float | None:
    """``part / whole``; None if that is no number."""
    value = float(part) / whole if whole else math.nan
    return _rounded(value) if math.isfinite(value) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(sum(known) / len(known)) if known else None


def _rounded(value: float) -> float:
    """Few digits: a record of many layers and experts is long enough."""
    return float(f"{value:.{DIGITS}g}")
