"""Presets: from the ``[model]`` keys of a run to the list of layers, and to the whole ``ModelSpec``."""

from collections.abc import Callable

from unimega.config import expert_keys, layer
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import ModelConfig
from unimega.config.vocabulary import Vocabulary

Layers = tuple[LayerSpec, ...]


def modalities(config: ModelConfig) -> tuple[str, ...]:
    """Names of the modalities, text first."""
    return ("text", "vision") if config.codebook else ("text",)


def vocabulary_rows(config: ModelConfig) -> int:
    """Rows of embedding and head in a file."""
    return config.vision_offset + config.codebook if config.vocabulary_rows is None else config.vocabulary_rows


def vocabulary(config: ModelConfig, *, vision_ids: tuple[int, ...] = ()) -> Vocabulary:
    """Which id is which modality.

    Args:
        vision_ids: ids below ``vision_offset`` that are vision, where ``model.vision_ids`` is absent: the tokenizer's.
    """
    rows = vocabulary_rows(config)
    if not config.codebook:
        return Vocabulary(names=("text",), starts=(0,), codes=(config.vision_offset,), rows=rows, ids=((),))
    return Vocabulary(
        names=modalities(config),
        starts=(0, config.vision_offset),
        codes=(config.vision_offset, config.codebook),
        rows=rows,
        ids=((), vision_ids if config.vision_ids is None else config.vision_ids),
    )


def layers(config: ModelConfig) -> Layers:
    """The stack that the preset makes of the sizes; ``config`` has passed ``model_rules.check``."""
    return PRESETS[config.preset](config)


def model_spec(config: ModelConfig, *, vision_ids: tuple[int, ...] = ()) -> ModelSpec:
    """The complete description of the model; ``vision_ids`` as in ``vocabulary``."""
    skip = None
    if config.skip_from >= 0:
        skip = (config.skip_from, config.num_layers - _or_zero(config.decode_layers) + config.skip_from)
    return ModelSpec(
        vocabulary=vocabulary(config, vision_ids=vision_ids),
        layers=layers(config),
        width=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        tied=config.tied,
        skip=skip,
        cross_document=config.cross_document,
        init_embedding=config.init.embedding,
        init_linear=config.init.linear,
        init_head=config.init.head,
        init_vision=config.init_vision,
        lora=config.lora if config.lora.rank else None,
    )


def _or_zero(value: int | None) -> int:
    return 0 if value is None else value


def _equal(config: ModelConfig) -> tuple[int, ...]:
    return (config.ffn_width,) * len(modalities(config))


def _own(config: ModelConfig) -> tuple[int, ...]:
    """FFN widths where vision has its own."""
    vision = config.ffn_width if config.vision_ffn_width is None else config.vision_ffn_width
    return (config.ffn_width, *(vision for _ in modalities(config)[1:]))


def _dense(config: ModelConfig) -> Layers:
    return layer.dense(config.num_layers, ffn=config.ffn_width)


def _unix(config: ModelConfig) -> Layers:
    encode, decode = _or_zero(config.encode_layers), _or_zero(config.decode_layers)
    return layer.unix(config.num_layers, ffn=_equal(config), encode=encode, decode=decode)


def _share(config: ModelConfig) -> Layers:
    return layer.share(
        config.num_layers,
        ffn=_equal(config),
        middle=_own(config),
        shared=_or_zero(config.shared_ffn_width),
        encode=_or_zero(config.encode_layers),
        decode=_or_zero(config.decode_layers),
    )


def _moe_hard(config: ModelConfig) -> Layers:
    return layer.moe_hard(config.num_layers, ffn=_equal(config), every=_or_zero(config.split_every))


def _mot(config: ModelConfig) -> Layers:
    return layer.mot(
        config.num_layers,
        ffn=_own(config),
        output_projection=config.output_projection or "split",
        unused_output=config.unused_output,
    )


def _moe(config: ModelConfig) -> Layers:
    experts = expert_keys.expert_spec(config, modalities(config))
    return layer.moe(expert_keys.sparse_layers(config), experts=experts, ffn=config.ffn_width)


PRESETS: dict[str, Callable[[ModelConfig], Layers]] = {
    "dense": _dense,
    "unix": _unix,
    "share": _share,
    "moe_hard": _moe_hard,
    "mot": _mot,
    "moe": _moe,
    "unimoe": _moe,
}
"""Preset name -> its layers."""
