"""Routed experts in the config.json of an export: of a stock model type where one computes the same, else of ours."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unimega.config import layer as stacks
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.errors import CheckpointError

Fields = dict[str, Any]
CARRIED = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
"""Fields of an imported config.json that only training with transformers reads."""
STOCK = {"qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM"}


def experts_of(spec: ModelSpec) -> ExpertSpec | None:
    """The experts that the sparse layers have; None: no layer is sparse.

    Raises:
        CheckpointError: sparse layers differ, or something else than experts does.
    """
    sparse = [(i, one.experts.of_inference()) for i, one in enumerate(spec.layers) if one.experts]
    if not sparse:
        return None
    first = sparse[0][1]
    made = stacks.moe(tuple(one.experts is not None for one in spec.layers), experts=first, ffn=_dense_width(spec))
    for index, (want, got) in enumerate(zip(spec.layers, made, strict=True)):
        plain = replace(want, experts=first) if want.experts and want.experts.of_inference() == first else want
        if plain != got:
            raise CheckpointError(
                f"layers.{index} of the model is {want}, which no configuration of an export gives there. "
                "Only stacks that a preset makes are exported."
            )
    return first


def stock(spec: ModelSpec, experts: ExpertSpec) -> tuple[str | None, str]:
    """The stock model type that computes the same, and why it is no other."""
    extra = _beyond_stock(experts)
    if extra:
        return None, extra
    biases = f"qk_norm={spec.qk_norm}, qkv_bias={spec.qkv_bias}, output_bias={spec.output_bias}".lower()
    if spec.qk_norm:
        return ("qwen3_moe" if spec.qkv_bias == spec.output_bias else None), biases
    if spec.qkv_bias or spec.output_bias:
        return None, biases
    if not experts.normalize:
        return None, "qk_norm=false and weights of experts that are not normalised"
    if any(one.experts is None for one in spec.layers):
        return None, "qk_norm=false and layers without experts"
    return "mixtral", biases


def stock_fields(spec: ModelSpec, experts: ExpertSpec, model_type: str, old: Mapping[str, Any]) -> Fields:
    """What config.json says of them; ``old`` is the imported one."""
    carried = {name: old[name] for name in CARRIED if name in old}
    if model_type == "mixtral":
        sizes = {"num_local_experts": experts.number, "num_experts_per_tok": experts.top_k}
        return carried | sizes | {"intermediate_size": experts.width}
    return carried | _sizes(spec, experts, old)


def unimoe_fields(spec: ModelSpec, experts: ExpertSpec, common: Fields, old: Mapping[str, Any]) -> Fields:
    """Uni-MoE's own config.json; fields of encoders and connectors as they were imported.

    Args:
        common: what all model types have.
        old: the imported file.
    """
    sizes: Fields = {
        "model_type": old.get("model_type", "llama"),
        "moe": True,
        "moe_type": "dense",
        "num_experts": experts.number,
        "num_experts_per_tok": experts.top_k,
        "intermediate_size": experts.width,
        "use_fm_block": False,
    }
    if spec.lora is not None:
        sizes |= {"lora_r": spec.lora.rank, "lora_alpha": spec.lora.alpha, "lora_dropout": spec.lora.dropout}
    return (dict(old) if old.get("moe") else {}) | common | sizes


def code_fields(spec: ModelSpec, experts: ExpertSpec, old: Mapping[str, Any]) -> Fields:
    """The same for our modelling file."""
    if len(spec.modalities) > 2:
        raise CheckpointError(
            f"the model has {len(spec.modalities)} modalities, {', '.join(spec.modalities)}. One with sets of experts, "
            "groups or shared experts is exported with at most two, text and vision."
        )
    return _sizes(spec, experts, old) | {
        "variant": "routed",
        "router_score": experts.score,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.groups,
        "topk_group": experts.group_topk,
        "router_bias": experts.bias_rate > 0,
        "expert_sets": [list(one) for one in experts.sets],
        "shared_expert_intermediate_size": experts.shared_width,
        "shared_expert_gate": experts.shared_gate,
    }


def model_keys(config: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> Fields:
    """``[model]`` keys that ``code_fields`` was written from, beside those of a Qwen3-MoE.

    Args:
        config: of our export.
        names: of the modalities.
        where: the file, for errors.

    Raises:
        CheckpointError: a field is missing, or sets of experts are not those of the modalities.
    """
    missing = [name for name in _OWN if name not in config]
    if missing:
        raise CheckpointError(f"{where}: {missing[0]!r} is missing. Is it a config.json of export_hf.py?")
    sets = config["expert_sets"]
    if sets and not (isinstance(sets, list) and len(sets) == len(names) and all(isinstance(one, list) for one in sets)):
        raise CheckpointError(f"{where}: expert_sets={sets!r} is not a list of experts for each of {', '.join(names)}.")
    keys: Fields = {
        "preset": "moe",
        "router_score": config["router_score"],
        "routed_scale": config["routed_scaling_factor"],
        "groups": config["n_group"],
        "group_topk": config["topk_group"],
        "shared_expert_width": config["shared_expert_intermediate_size"],
        "shared_expert_gate": config["shared_expert_gate"],
    }
    if config["router_bias"]:
        keys["bias_rate"] = _BIAS_RATE
    if sets:
        keys["expert_sets"] = {name: tuple(one) for name, one in zip(names, sets, strict=True)}
    return keys


_OWN = (
    "router_score",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "router_bias",
    "expert_sets",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
)
_BIAS_RATE = 0.001
"""DeepSeek-V3's; an export does not say how fast its bias moved."""


def _sizes(spec: ModelSpec, experts: ExpertSpec, old: Mapping[str, Any]) -> Fields:
    """The layers without experts are listed, unless the imported file says the same in its own way."""
    dense = [i for i, one in enumerate(spec.layers) if one.experts is None]
    every, listed = old.get("decoder_sparse_step", 1), old.get("mlp_only_layers") or []
    same = old.get("model_type") == "qwen3_moe" and dense == [
        i for i in range(len(spec.layers)) if (i + 1) % every or i in listed
    ]
    return {
        "num_experts": experts.number,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": every if same else 1,
        "mlp_only_layers": listed if same else dense,
        "intermediate_size": _dense_width(spec) or old.get("intermediate_size", experts.width),
    }


def _dense_width(spec: ModelSpec) -> int:
    """FFN width of layers without experts; 0: there are none."""
    return next((_width(one) for one in spec.layers if one.experts is None), 0)


def _width(layer: LayerSpec) -> int:
    return layer.ffn[0] if layer.ffn else layer.shared_ffn


def _beyond_stock(experts: ExpertSpec) -> str:
    """What of the experts no stock model type has."""
    found = {
        "sigmoid scores": experts.score != "softmax",
        "a scale": experts.scale != 1.0,
        "groups of experts": experts.groups > 1,
        "sets of experts by modality": bool(experts.sets),
        "a bias of the router": experts.bias_rate > 0,
        "a shared expert": experts.shared_width > 0,
    }
    return " and ".join(what for what, is_there in found.items() if is_there)
