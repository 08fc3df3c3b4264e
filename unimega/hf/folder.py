"""The JSON files of a Hugging Face folder. No torch, so that mistakes are answered at once."""

import json
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from unimega.errors import CheckpointError

_FIELDS = {
    "num_layers": ("num_hidden_layers",),
    "width": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_width": ("head_dim",),
    "ffn_width": ("intermediate_size",),
    "output_bias": ("o_bias",),
    "vision_offset": ("real_text_vocab_size", "vocab_size"),
    "vision_ids": ("vision_token_ids", "vision_start_id"),
    "experts": ("num_experts", "num_local_experts"),
    "expert_width": ("moe_intermediate_size", "intermediate_size"),
    "top_k": ("num_experts_per_tok",),
    "dense_layers": ("mlp_only_layers",),
    "sparse_every": ("decoder_sparse_step",),
    "skip_from": ("skip_connection_loc",),
    "routed_scale": ("routed_scaling_factor",),
    "groups": ("n_group",),
    "group_topk": ("topk_group",),
    "shared_expert_width": ("shared_expert_intermediate_size",),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
}
"""Key of ``[model]`` -> fields of config.json that it is read from, the first there; others are called alike."""


def in_its_words(text: str, config: Mapping[str, Any], *, of: str = "") -> str:
    """A line about keys of ``[model]`` as one about the fields of a config.json.

    Args:
        of: what comes before a field where a line is about other things too; keys without a field then stay.
    """

    def field(found: re.Match[str]) -> str:
        key = found[1] or found[2]
        names = _FIELDS.get(key, (key,))
        there = next((name for name in names if name in config), None)
        return f"{of}{there}" if there else found[0] if of else names[0]

    bare = "|".join(key for key in _FIELDS if "_" in key and "." not in key)  # others are words, too
    return re.sub(rf"\bmodel\.(lora\.\w+|\w+)|\b({bare})\b", field, text)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is not a folder. Give one with config.json and safetensors.")
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        CheckpointError: it is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path.parent)!r} has no {path.name}. Give a Hugging Face folder.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(values).__name__}, not an object.")
    return values


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of all tensors, by the headers of the files alone; what cannot be read has none, and is refused later."""
    names = [_header(path) for path in folder.glob("*.safetensors")]
    return frozenset(chain.from_iterable(names)) - {"__metadata__"}


def _header(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return list(json.loads(file.read(min(size, path.stat().st_size))))
    except (OSError, ValueError):
        return []
