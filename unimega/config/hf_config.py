"""The ``[model]`` keys that a Hugging Face config.json of a dense Qwen2 or Qwen3 implies."""

from collections.abc import Mapping
from typing import Any

from unimega.errors import ConfigError

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
"""What ``model_keys`` returns."""


def model_keys(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Translate a config.json.

    Args:
        values: the parsed file.
        where: its name, for errors.

    Raises:
        ConfigError: a field is missing, or asks for something that the engine does not do.
    """
    kind = values.get("model_type")
    if kind not in ("qwen2", "qwen3"):
        raise ConfigError(f"{where}: model_type={kind!r} is unknown. Model types: qwen2, qwen3.")
    if (act := values.get("hidden_act", "silu")) != "silu":
        raise ConfigError(
            f"{where}: hidden_act={act!r} is not supported. The FFN is SwiGLU: hidden_act must be 'silu'."
        )
    layers = _need(values, "num_hidden_layers", where=where)
    _refuse_sliding_windows(values, layers, where=where)
    width, heads = _need(values, "hidden_size", where=where), _need(values, "num_attention_heads", where=where)
    head_width = values.get("head_dim")
    if head_width is None and kind == "qwen2" and width % heads == 0:
        head_width = width // heads
    elif head_width is None:
        head_width = _need(values, "head_dim", where=where)
    bias = bool(values.get("attention_bias", False))
    return {
        "num_layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": _need(values, "num_key_value_heads", where=where),
        "head_width": head_width,
        "ffn_width": _need(values, "intermediate_size", where=where),
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2" or bias,
        "output_bias": kind == "qwen3" and bias,
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope_theta": _rope_theta(values, where=where),
        "tied": values.get("tie_word_embeddings", False),
        "vision_offset": _need(values, "vocab_size", where=where),
    }


def _need(values: Mapping[str, Any], name: str, *, where: str) -> int:
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{where}: {name!r} wants a positive int, found {value!r}. Is this a Qwen2 or Qwen3 config.json?"
        )
    return value


def _refuse_sliding_windows(values: Mapping[str, Any], layers: int, *, where: str) -> None:
    """``layer_types`` decides where it is present, else the two older switches; both are written by some versions."""
    kinds = values.get("layer_types")
    if kinds is not None:
        sliding = any(kind != "full_attention" for kind in kinds) if isinstance(kinds, list) else True
    else:
        on = values.get("use_sliding_window", False) and values.get("sliding_window") is not None
        sliding = bool(on) and values.get("max_window_layers", 28) < layers
    if sliding:
        raise ConfigError(f"{where}: sliding-window attention is not supported. Every layer must use full attention.")


def _rope_theta(values: Mapping[str, Any], *, where: str) -> float:
    """transformers 4 writes ``rope_theta`` and ``rope_scaling``, 5 writes ``rope_parameters``; a file may have both."""
    parameters, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    for table in (parameters, scaling):
        is_table = isinstance(table, Mapping)
        kind = table.get("rope_type", table.get("type", "default")) if is_table else table
        if kind != "default":
            raise ConfigError(f"{where}: rope scaling {kind!r} is not supported. Only rope_type 'default' is.")
    given = [theta for theta in (parameters.get("rope_theta"), values.get("rope_theta")) if theta is not None]
    if not given or any(not isinstance(theta, int | float) or theta != given[0] for theta in given):
        what = " and ".join(repr(theta) for theta in given) or "no value"
        raise ConfigError(f"{where}: rope_theta has {what}. Give one number, equal in rope_parameters and rope_theta.")
    return float(given[0])
