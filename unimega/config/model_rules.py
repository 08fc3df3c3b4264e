"""Rules between the keys of ``[model]``."""

from collections.abc import Callable
from fnmatch import fnmatchcase

from unimega.config import expert_keys, lora, presets
from unimega.config.schema import Lora, ModelConfig
from unimega.errors import ConfigError

OWN_KEYS = {
    "vision_ffn_width": ("share", "mot"),
    "shared_ffn_width": ("share",),
    "split_every": ("moe_hard",),
    "output_projection": ("mot",),
    "encode_layers": ("unix", "share"),
    "decode_layers": ("unix", "share"),
    **dict.fromkeys(expert_keys.OWN_KEYS, expert_keys.PRESETS),
}
"""Keys that only some presets read."""
REQUIRED = {
    "unix": ("encode_layers", "decode_layers"),
    "share": ("encode_layers", "decode_layers", "shared_ffn_width"),
    "moe_hard": ("split_every",),
    **expert_keys.REQUIRED,
}
AT_LEAST = (
    ("num_layers", 1),
    ("width", 1),
    ("heads", 1),
    ("kv_heads", 1),
    ("head_width", 2),
    ("ffn_width", 1),
    ("vision_offset", 1),
    ("codebook", 0),
    ("vision_ffn_width", 0),
    ("shared_ffn_width", 0),
    ("split_every", 1),
    ("experts", 1),
    ("expert_width", 1),
    ("top_k", 1),
    ("groups", 1),
    ("group_topk", 1),
    ("sparse_every", 1),
    ("shared_expert_width", 0),
    ("bias_rate", 0),
    ("balance_weight", 0),
    ("z_weight", 0),
    ("encode_layers", 0),
    ("decode_layers", 0),
    ("skip_from", -1),
)


def check(model: ModelConfig) -> None:
    """Refuse a model that cannot be built.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for rule in RULES:
        rule(model)


def _preset(model: ModelConfig) -> None:
    if model.preset not in presets.PRESETS:
        raise ConfigError(f"model.preset={model.preset!r} is unknown. Presets: {', '.join(presets.PRESETS)}.")


def _own_keys(model: ModelConfig) -> None:
    for name, owners in OWN_KEYS.items():
        if (value := getattr(model, name)) is not None and model.preset not in owners:
            if model.hf_config and name == "experts":
                raise ConfigError(
                    f"model.preset={model.preset!r} has no routed experts, but model.hf_config={model.hf_config!r} "
                    f"describes {value} of them. Use preset moe."
                )
            raise ConfigError(
                f"model.{name}={value!r} is not a key of preset {model.preset!r}, only of {' and '.join(owners)}. "
                "Remove it."
            )
    if model.skip_from >= 0 and model.preset not in ("unix", "share"):
        raise ConfigError(
            f"model.skip_from={model.skip_from} is not a key of preset {model.preset!r}, only of unix and share. "
            "Remove it."
        )
    if model.unused_output and (model.preset != "mot" or model.output_projection != "shared"):
        raise ConfigError(
            'model.unused_output=true is only for preset mot with output_projection = "shared". Remove it.'
        )


def _required(model: ModelConfig) -> None:
    for name in REQUIRED.get(model.preset, ()):
        if getattr(model, name) is None:
            raise ConfigError(f"model.{name} is missing. Preset {model.preset!r} needs it: set it in [model].")


def _at_least(model: ModelConfig) -> None:
    for name, least in AT_LEAST:
        if (value := getattr(model, name)) is not None and value < least:
            raise ConfigError(f"model.{name}={value} is too small. It is at least {least}.")
    for name in ("norm_eps", "rope_theta", "routed_scale"):
        if (value := getattr(model, name)) is not None and value <= 0:
            raise ConfigError(f"model.{name}={value} is too small. It is above 0.")
    for name in ("embedding", "linear", "head"):
        if (value := getattr(model.init, name)) < 0:
            raise ConfigError(f"model.init.{name}={value} is negative. A standard deviation is at least 0.")


def _heads(model: ModelConfig) -> None:
    if model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads={model.heads} is not divisible by model.kv_heads={model.kv_heads}. "
            "Each KV head serves equally many query heads."
        )
    if model.head_width % 2:
        raise ConfigError(
            f"model.head_width={model.head_width} is odd. Rotary embeddings turn pairs: use an even width."
        )


def _split_layers(model: ModelConfig) -> None:
    encode, decode = model.encode_layers or 0, model.decode_layers or 0
    if encode + decode > model.num_layers:
        raise ConfigError(
            f"model.encode_layers={encode} + model.decode_layers={decode} is more than model.num_layers="
            f"{model.num_layers}. Lower one of them."
        )
    if model.split_every is not None and model.split_every > model.num_layers:
        raise ConfigError(
            f"model.split_every={model.split_every} is more than model.num_layers={model.num_layers}: "
            "no layer would be split. Lower it, or use preset dense."
        )


def _every_token_has_an_ffn(model: ModelConfig) -> None:
    if model.vision_ffn_width == 0 and not model.shared_ffn_width:
        raise ConfigError(
            "model.vision_ffn_width=0 leaves vision tokens without an FFN. Set it above 0, or use preset share with a "
            "shared_ffn_width above 0."
        )


def _experts(model: ModelConfig) -> None:
    if model.preset in expert_keys.PRESETS:
        expert_keys.check(model, presets.modalities(model))


def _skip(model: ModelConfig) -> None:
    matching = min(model.encode_layers or 0, model.decode_layers or 0)
    if model.skip_from >= matching:
        raise ConfigError(
            f"model.skip_from={model.skip_from} has no encode and decode layer of that number: encode_layers="
            f"{model.encode_layers}, decode_layers={model.decode_layers}. Use -1 (none) to {matching - 1}."
        )


def _vocabulary(model: ModelConfig) -> None:
    if model.vocabulary_rows is not None and model.vocabulary_rows < model.vision_offset + model.codebook:
        raise ConfigError(
            f"model.vocabulary_rows={model.vocabulary_rows} is less than vision_offset + codebook = "
            f"{model.vision_offset} + {model.codebook} = {model.vision_offset + model.codebook}. "
            "Raise it or leave it out."
        )
    ids = model.vision_ids or ()
    if ids and not model.codebook:
        raise ConfigError(f"model.vision_ids={list(ids)} in a model of text alone (codebook = 0). Remove them.")
    for one in ids:
        if not 0 <= one < model.vision_offset:
            raise ConfigError(
                f"model.vision_ids: {one} is not a text id. Ids from vision_offset={model.vision_offset} up "
                "are vision anyway: list only lower ones."
            )


def _init_vision(model: ModelConfig) -> None:
    """Copying text's weights needs them to have the same shape."""
    if model.init_vision == "text" and model.vision_ffn_width not in (None, model.ffn_width):
        raise ConfigError(
            f"model.init_vision='text' copies text weights, but vision_ffn_width={model.vision_ffn_width} is not "
            f"ffn_width={model.ffn_width}. Make them equal or use 'random'."
        )


def _lora(model: ModelConfig) -> None:
    """Signs first: the patterns are held to the linears of a model that can be built."""
    own, default = model.lora, Lora()
    if own.rank < 0:
        raise ConfigError(f"model.lora.rank={own.rank} is negative. It is at least 1, or 0 for no factors.")
    if not own.rank:
        for name in ("match", "alpha", "dropout"):
            if (value := getattr(own, name)) != getattr(default, name):
                raise ConfigError(f"model.lora.{name}={value!r} without factors: model.lora.rank is 0. Set a rank.")
        return
    if own.alpha <= 0:
        raise ConfigError(f"model.lora.alpha={own.alpha} is too small. It is above 0.")
    if not 0 <= own.dropout < 1:
        raise ConfigError(f"model.lora.dropout={own.dropout} is no share. It is at least 0 and below 1.")
    if not own.match:
        raise ConfigError("model.lora.match is empty: no linear would have factors. Name some, or set rank to 0.")
    names = lora.linears(presets.layers(model))
    for pattern in own.match:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"model.lora.match={pattern!r} matches no linear. Linears: {', '.join(lora.kinds(names))}."
            )


RULES: tuple[Callable[[ModelConfig], None], ...] = (
    _preset,
    _own_keys,
    _required,
    _at_least,
    _heads,
    _split_layers,
    _experts,
    _every_token_has_an_ffn,
    _skip,
    _vocabulary,
    _init_vision,
    _lora,
)
