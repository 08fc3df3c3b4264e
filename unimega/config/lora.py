"""The linears of a stack by name: what the patterns of ``[model.lora]`` are held to, without building a model."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from unimega.config.layer import LayerSpec
from unimega.config.schema import Lora


def linears(layers: Sequence[LayerSpec]) -> tuple[str, ...]:
    """Names of all linears of the layers, e.g. ``layers.0.attention.qkv``; one name for all modalities of a split one.

    Embedding, head and routers are none.
    """
    return tuple(f"layers.{index}.{name}" for index, layer in enumerate(layers) for name in linears_of(layer))


def kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The names with ``*`` for the number of the layer, each once."""
    return tuple(dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in names))


def has_factors(lora: Lora | None, linear: str) -> bool:
    """Whether a linear, by name, has factors beside its weight."""
    return lora is not None and any(fnmatchcase(linear, pattern) for pattern in lora.match)


def linears_of(layer: LayerSpec) -> list[str]:
    """Names of a layer's linears, e.g. ``attention.qkv``."""
    places = ["ffn"]
    if layer.experts is not None:
        places = ["ffn.experts", *(["ffn.shared"] if layer.experts.shared_width else [])]
    elif layer.ffn and layer.shared_ffn:
        places = ["ffn", "ffn.shared"]
    return ["attention.qkv", "attention.output", *(f"{at}.{part}" for at in places for part in ("gate_up", "down"))]
