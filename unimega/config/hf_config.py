"""The ``[model]`` keys that a Hugging Face config.json implies."""

import math
from collections.abc import Mapping
from typing import Any

from unimega.errors import ConfigError

TYPES = ("qwen2", "qwen3", "llama", "qwen3_moe", "mixtral")
"""Model types of transformers."""
_HEAD_WIDTH_FOLLOWS = ("qwen2", "llama", "qwen3_moe", "mixtral")
"""An absent head_dim is hidden_size / num_attention_heads."""
_EPSILON = {"mixtral": 1e-5}
_THETA = {"llama": 1e4}
"""What transformers takes where a file has no value; 1e-6, and an error."""
KEYS = frozenset(
    {
        "num_layers",
        "width",
        "heads",
        "kv_heads",
        "head_width",
        "ffn_width",
        "vision_offset",
        "tied",
        "qk_norm",
        "qkv_bias",
        "output_bias",
        "norm_eps",
        "rope_theta",
    }
)
"""What ``model_keys`` returns of every model."""
EXPERT_KEYS = frozenset({"experts", "expert_width", "top_k", "normalize_weights", "dense_layers", "sparse_every"})
"""What it returns beside them of one with a layer of routed experts."""


def model_keys(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Translate a config.json.

    Args:
        values: the parsed file.
        where: its name, for errors.

    Raises:
        ConfigError: a field is missing, or asks for something that the engine does not do.
    """
    kind = values.get("model_type")
    if kind not in TYPES:
        raise ConfigError(f"{where}: model_type={kind!r} is unknown. Model types: {', '.join(TYPES)}.")
    if (act := values.get("hidden_act", "silu")) != "silu":
        raise ConfigError(
            f"{where}: hidden_act={act!r} is not supported. The FFN is SwiGLU: hidden_act must be 'silu'."
        )
    if values.get("mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias=true is not supported. The FFN has no biases.")
    layers = _need(values, "num_hidden_layers", where=where)
    _refuse_sliding_windows(values, layers, where=where)
    width, heads = _need(values, "hidden_size", where=where), _need(values, "num_attention_heads", where=where)
    head_width = values.get("head_dim")
    if head_width is None and kind in _HEAD_WIDTH_FOLLOWS and width % heads == 0:
        head_width = width // heads
    elif head_width is None:
        head_width = _need(values, "head_dim", where=where)
    bias = kind != "mixtral" and bool(values.get("attention_bias", False))
    keys = {
        "num_layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": _need(values, "num_key_value_heads", where=where, default=heads if kind == "llama" else None),
        "head_width": head_width,
        "ffn_width": _need(values, "intermediate_size", where=where),
        "qk_norm": kind in ("qwen3", "qwen3_moe"),
        "qkv_bias": kind == "qwen2" or bias,
        "output_bias": kind != "qwen2" and bias,
        "norm_eps": _epsilon(values, kind, where=where),
        "rope_theta": _rope_theta(values, _THETA.get(kind), where=where),
        "tied": _truth(values, "tie_word_embeddings", where=where),
        "vision_offset": _need(values, "vocab_size", where=where),
    }
    return keys | (_experts(values, kind, layers, where=where) if kind in ("qwen3_moe", "mixtral") else {})


def _experts(values: Mapping[str, Any], kind: str, layers: int, *, where: str) -> dict[str, Any]:
    """A Mixtral's layers all have experts, whose weights always sum to 1; both spell their number in two ways.

    A Qwen3-MoE may list layers that it does not have, and have no layer with experts: then there are no keys.
    """
    name = next((one for one in ("num_experts", "num_local_experts") if one in values), "num_experts")
    is_mixtral = kind == "mixtral"
    dense = (not is_mixtral and values.get("mlp_only_layers")) or []
    if not isinstance(dense, list) or not all(type(one) is int for one in dense):
        raise ConfigError(f"{where}: 'mlp_only_layers' wants a list of int, found {dense!r}.")
    normalized = _truth(values, "norm_topk_prob", where=where)
    every = 1 if is_mixtral else _need(values, "decoder_sparse_step", where=where, default=1)
    none = values.get(name) == 0 and not is_mixtral
    if none or all((i + 1) % every or i in dense for i in range(layers)):
        return {}
    return {
        "experts": _need(values, name, where=where),
        "expert_width": _need(values, "intermediate_size" if is_mixtral else "moe_intermediate_size", where=where),
        "top_k": _need(values, "num_experts_per_tok", where=where),
        "normalize_weights": is_mixtral or normalized,
        "dense_layers": tuple(one for one in dense if 0 <= one < layers),
        "sparse_every": every,
    }


def _need(values: Mapping[str, Any], name: str, *, where: str, default: int | None = None) -> int:
    value = values.get(name, default)
    if type(value) is not int or value < 1:
        kind = values.get("model_type")
        raise ConfigError(
            f"{where}: {name!r} wants a positive int, found {value!r}. Is this the config.json of a {kind}?"
        )
    return value


def _truth(values: Mapping[str, Any], name: str, *, where: str) -> bool:
    value = values.get(name, False)
    if type(value) is not bool:
        raise ConfigError(f"{where}: {name!r} wants true or false, found {value!r}.")
    return value


def _epsilon(values: Mapping[str, Any], kind: str, *, where: str) -> float:
    value = values.get("rms_norm_eps", _EPSILON.get(kind, 1e-6))
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: 'rms_norm_eps' wants a number above 0, found {value!r}.")
    return float(value)


def _refuse_sliding_windows(values: Mapping[str, Any], layers: int, *, where: str) -> None:
    """``layer_types`` decides where it is present, else the two older switches; both are written by some versions."""
    kinds = values.get("layer_types")
    if kinds is not None:
        sliding = any(kind != "full_attention" for kind in kinds) if isinstance(kinds, list) else True
    else:
        kind = values.get("model_type")
        switched_on = kind == "mixtral" or values.get("use_sliding_window", False)  # a Mixtral has no switch
        everywhere = kind in ("mixtral", "qwen3_moe")  # they do not look at max_window_layers
        some = everywhere or values.get("max_window_layers", 28) < layers
        sliding = bool(switched_on) and values.get("sliding_window") is not None and some
    if sliding:
        raise ConfigError(f"{where}: sliding-window attention is not supported. Every layer must use full attention.")


def _rope_theta(values: Mapping[str, Any], default: float | None, *, where: str) -> float:
    """transformers 4 writes ``rope_theta`` and ``rope_scaling``, 5 writes ``rope_parameters``; a file may have both."""
    parameters, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    for table in (parameters, scaling):
        is_table = isinstance(table, Mapping)
        kind = table.get("rope_type", table.get("type", "default")) if is_table else table
        if kind != "default":
            raise ConfigError(f"{where}: rope scaling {kind!r} is not supported. Only rope_type 'default' is.")
    given = [theta for theta in (parameters.get("rope_theta"), values.get("rope_theta")) if theta is not None]
    given = given or ([] if default is None else [default])
    if not given or any(
        type(theta) not in (int, float) or theta != given[0] or not 0 < theta < math.inf for theta in given
    ):
        what = " and ".join(repr(theta) for theta in given) or "no value"
        raise ConfigError(
            f"{where}: rope_theta has {what}. Give one number above 0, equal in rope_parameters and rope_theta."
        )
    return float(given[0])
