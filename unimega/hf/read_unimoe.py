"""The config.json of Uni-MoE 8e: a LLaMA whose FFNs are all routed experts, which may have LoRA. No torch."""

from collections.abc import Mapping
from typing import Any

from unimega.config import hf_config
from unimega.errors import CheckpointError

OUTSIDE = ("model.mm_", "model.vision_tower.", "model.audio_tower.")
"""How tensors of encoders and connectors begin: no part of the language model."""
EXPERT_FACTOR = "_lora_A.weight"
_ATTENTION = (".self_attn.", ".lora_A.")


def is_unimoe(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is Uni-MoE's: its architectures are named as LLaVA's."""
    return bool(config.get("moe")) and "moe_type" in config


def model_keys(config: Mapping[str, Any], tensors: frozenset[str], *, where: str) -> dict[str, Any]:
    """Its ``[model]`` keys, but for the vocabulary.

    Args:
        config: the parsed file.
        tensors: names of those in the folder, which tell what has factors.
        where: the file's name, for errors.

    Raises:
        CheckpointError: layers that cannot be told, or a router that sees something else than the token's state.
        ConfigError: sizes that are missing.
    """
    if config["moe_type"] != "dense":
        raise CheckpointError(
            f"{where}: moe_type={config['moe_type']!r} is not supported: it does not say which layers have experts. "
            "It must be 'dense', all layers."
        )
    if config.get("use_fm_block"):
        raise CheckpointError(f"{where}: use_fm_block=true is not supported: the router must see the token as it is.")
    keys = hf_config.model_keys({**config, "model_type": "llama"}, where=where)
    keys["preset"] = "unimoe"
    for key, name in (("experts", "num_experts"), ("top_k", "num_experts_per_tok")):
        keys[key] = config.get(name)
        if type(keys[key]) is not int or keys[key] < 1:
            raise CheckpointError(f"{where}: {name}={keys[key]!r} is not a number of experts.")
    match = []
    if any(".deepspeed_experts." in name and name.endswith(EXPERT_FACTOR) for name in tensors):
        match.append("*.ffn.experts.*")
    if any(all(part in name for part in _ATTENTION) for name in tensors):
        match.append("*.attention.*")
    if match:
        rank = config.get("lora_r")
        if type(rank) is not int or rank < 1:
            raise CheckpointError(f"{where}: lora_r={rank!r} is not a rank, but the folder has factors of LoRA.")
        keys["lora"] = {
            "rank": rank,
            "alpha": float(config.get("lora_alpha", rank)),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "match": tuple(match),
        }
    return keys
