"""From a Hugging Face config.json to the model that it describes and the spelling of its tensors.

``architectures`` decides: nothing else in the file tells the original Uni-X variants from each other, or from a Qwen3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimega.config import hf_config, model_rules
from unimega.config.model import ModelSpec
from unimega.config.presets import model_spec
from unimega.config.schema import ModelConfig
from unimega.config.strict import construct, partial
from unimega.errors import CheckpointError, ConfigError, optional
from unimega.hf import export_experts, read_unimoe
from unimega.hf.folder import in_its_words, tensor_names
from unimega.hf.layout import Layout

_FAMILIES = {
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "LlamaForCausalLM": "qwen",
    "Qwen3MoeForCausalLM": "qwen",
    "MixtralForCausalLM": "mixtral",
    "UniQwen3ForCausalLM": "x",
    "UniQwen3ForCausalLMInference": "x",
    "HardMoeQwen3CausalLM": "moe",
    "MoTQwen3ForCausalLM": "mot",
    "UniXForCausalLM": "uni_x",
}


_PLAIN = ("qwen", "mixtral")
"""Families without copies for vision."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a folder holds."""

    model: ModelConfig
    """The ``[model]`` of a run that trains it."""
    spec: ModelSpec
    layout: Layout
    architecture: str


def describe(config: Mapping[str, Any], *, folder: Path, separator_ids: Sequence[int] | None = None) -> Source:
    """Read a config.json.

    Args:
        config: the parsed file.
        folder: where it lies; its tokenizer turns separator strings into ids.
        separator_ids: ids of the separators that count as vision, instead of the tokenizer's.

    Raises:
        CheckpointError: an architecture that is not known, or a value that the original code would not run with.
        ConfigError: sizes that are missing or impossible, rope scaling, sliding windows.
    """
    where = str(folder / "config.json")
    if read_unimoe.is_unimoe(config):
        keys = read_unimoe.model_keys(config, tensor_names(folder), where=where)
        return _source(keys | {"codebook": 0}, Layout(family="unimoe"), "Uni-MoE", config=config, where=where)
    architecture = _architecture(config, where=where)
    family = _FAMILIES[architecture]
    if family in (*_PLAIN, "uni_x") and separator_ids is not None:
        what = "has no vision tokens" if family in _PLAIN else "says which ids are vision"
        raise CheckpointError(f"--separator-ids: {architecture} {what}. Leave the option out.")
    keys = hf_config.model_keys(config, where=where) if family != "uni_x" else _chosen(config, where=where)
    layout = Layout(family="qwen")
    if family in _PLAIN:
        keys |= {"preset": "moe" if "experts" in keys else "dense"} | _codes(config, where=where)
        layout = Layout(family=family)  # type: ignore[arg-type]
    elif family == "uni_x" and config["variant"] == "routed":
        keys |= _codes(config, where=where)
        names = ("text", "vision") if keys["codebook"] else ("text",)
        keys |= export_experts.model_keys(config, names, where=where) if "experts" in keys else {"preset": "dense"}
    elif family == "uni_x":
        family = config["variant"]
        keys |= _codes(config, where=where) | _VARIANTS[family](config, where=where)
        if family == "mot":
            keys |= _vision_output(config["vision_o_proj"])
        layout = Layout(family=config["variant"], encode=keys.get("encode_layers", 0))
    else:
        keys |= _vocabulary(config, where=where)
        keys["vision_ids"] = _vision_ids(config, keys, folder=folder, where=where, separator_ids=separator_ids)
        keys |= _VARIANTS[family](config, where=where)
        layout = Layout(family=family, encode=keys.get("encode_layers", 0))  # type: ignore[arg-type]
    return _source(keys, layout, architecture, config=config, where=where)


def _source(
    keys: Mapping[str, Any], layout: Layout, architecture: str, *, config: Mapping[str, Any], where: str
) -> Source:
    try:
        known = partial(ModelConfig, keys, prefix="model.", where=where)
        model = construct(ModelConfig, known, prefix="model.", where=where)
        model_rules.check(model)
    except ConfigError as error:
        line = in_its_words(str(error), config).removeprefix(f"{where}: ")
        raise ConfigError(f"{where}: {line}") from error
    return Source(model=model, spec=model_spec(model), layout=layout, architecture=architecture)


def _architecture(config: Mapping[str, Any], *, where: str) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in _FAMILIES:
        raise CheckpointError(f"{where}: architectures={names!r} is not known. Known: {', '.join(_FAMILIES)}.")
    return name


def _chosen(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Sizes of an export with our modelling file, and what a Qwen3 leaves no choice in."""
    missing = [name for name in ("variant", "qk_norm", "qkv_bias", "o_bias") if name not in config]
    if missing or config["variant"] not in (*_VARIANTS, "routed"):
        what = f"{missing[0]!r} is missing" if missing else f"variant={config['variant']!r} is unknown"
        raise CheckpointError(f"{where}: {what}. Is it a config.json of export_hf.py?")
    like = "qwen3_moe" if config["variant"] == "routed" else "qwen3"
    keys = hf_config.model_keys({**config, "model_type": like}, where=where)
    return keys | {"qk_norm": config["qk_norm"], "qkv_bias": config["qkv_bias"], "output_bias": config["o_bias"]}


def _codes(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The vocabulary that export_hf.py notes; a folder from elsewhere has text alone."""
    if not config.get("vision_vocab_size"):
        return {"codebook": 0}
    return _vocabulary(config, where=where) | {"vision_ids": tuple(config.get("vision_token_ids") or ())}


def _vision_output(kind: str) -> dict[str, Any]:
    """mot: what becomes of the attention output of vision tokens."""
    return {"output_projection": "split" if kind == "used" else "shared", "unused_output": kind == "unused"}


def _vocabulary(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Text ids, then codes, then rows that are never sampled."""
    if config.get("all_modal_visible"):
        raise CheckpointError(f"{where}: all_modal_visible=1 was never built in the original. It must be 0.")
    offset, codes = (
        _integer(config, name, where=where, least=1) for name in ("real_text_vocab_size", "vision_vocab_size")
    )
    rows = _integer(config, "vocab_size", where=where, least=1)
    if offset + codes > rows:
        raise CheckpointError(
            f"{where}: real_text_vocab_size={offset} and vision_vocab_size={codes} need {offset + codes} rows, "
            f"vocab_size={rows} has fewer. Correct the one that is wrong."
        )
    return {"vision_offset": offset, "codebook": codes, "vocabulary_rows": rows}


def _vision_ids(
    config: Mapping[str, Any],
    keys: Mapping[str, Any],
    *,
    folder: Path,
    where: str,
    separator_ids: Sequence[int] | None,
) -> tuple[int, ...]:
    """Ids below the codes that are vision: begin of image and separators."""
    start = _integer(config, "vision_start_id", where=where, least=0)
    if separator_ids is not None:
        separators = tuple(separator_ids)
        outside = [one for one in separators if not 0 <= one < keys["vocabulary_rows"]]
        if outside:
            raise CheckpointError(
                f"--separator-ids: {outside[0]} is not an id: the vocabulary has {keys['vocabulary_rows']} rows."
            )
    elif config.get("add_sep_for_vis"):
        separators = _from_tokenizer(config, folder=folder, where=where)
    else:
        separators = ()
    return tuple(sorted({one for one in (start, *separators) if one < keys["vision_offset"]}))


def _from_tokenizer(config: Mapping[str, Any], *, folder: Path, where: str) -> tuple[int, ...]:
    """The first id of each of the comma-separated strings, as the original takes it."""
    strings = config.get("vis_sep_tokens")
    if not isinstance(strings, str) or not strings:
        raise CheckpointError(
            f"{where}: add_sep_for_vis=1, but vis_sep_tokens={strings!r}. Give the ids with --separator-ids."
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"{where}: vis_sep_tokens={strings!r} count as vision, and no tokenizer beside it tells their ids. "
            "Give them with --separator-ids (as in 89,90), or put the tokenizer's files into the folder."
        )
    transformers = optional("transformers", extra="hf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ids = [tokenizer(one, add_special_tokens=False).input_ids[0] for one in strings.split(",")]
    except Exception as error:  # transformers raises whatever its many tokenizer classes raise
        raise CheckpointError(
            f"the tokenizer of {str(folder)!r} cannot be used ({type(error).__name__}: {error}). "
            "Give the ids of the separators with --separator-ids."
        ) from error
    return tuple(ids)


def _x(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    layers = _integer(config, "num_hidden_layers", where=where, least=1)
    encode, decode = (
        _integer(config, name, where=where, least=0)
        for name in ("num_vision_encode_layers", "num_vision_decode_layers")
    )
    if encode + decode > layers:
        raise CheckpointError(
            f"{where}: num_vision_encode_layers={encode} and num_vision_decode_layers={decode} are more than "
            f"num_hidden_layers={layers}. The ends must not overlap."
        )
    keys = {
        "preset": "unix",
        "encode_layers": encode,
        "decode_layers": decode,
        "skip_from": _skip(config, encode, decode, where),
    }
    if config.get("add_share_ffn"):
        vision, shared = (
            _integer(config, name, where=where, least=0) for name in ("ffn_vision_size", "ffn_share_size")
        )
        if not vision and not shared:
            raise CheckpointError(
                f"{where}: add_share_ffn=1 with ffn_vision_size=0 and ffn_share_size=0 leaves vision no FFN."
            )
        keys |= {"preset": "share", "vision_ffn_width": vision, "shared_ffn_width": shared}
    return keys


def _skip(config: Mapping[str, Any], encode: int, decode: int, where: str) -> int:
    """The state after encode layer s is added before decode layer s; -1 where the original does nothing."""
    skip = config.get("skip_connection_loc", -1)
    if type(skip) is not int:
        raise CheckpointError(f"{where}: skip_connection_loc={skip!r} is not an int. -1 means none.")
    if encode <= skip < decode:
        raise CheckpointError(
            f"{where}: skip_connection_loc={skip} is not below num_vision_encode_layers={encode}: "
            "the skip connection would start nowhere. -1 means none."
        )
    return skip if 0 <= skip < decode else -1


def _moe(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    every = _integer(config, "decoder_sparse_step", where=where, least=1)
    if every > config["num_hidden_layers"]:  # legal there, and no layer is split
        return {"preset": "dense"}
    return {"preset": "moe_hard", "split_every": every}


def _mot(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    vision = _integer(config, "ffn_vision_size", where=where, least=0)
    if not vision:
        raise CheckpointError(f"{where}: ffn_vision_size=0 leaves the vision tokens of a MoT no FFN. Give its width.")
    return {"preset": "mot", "vision_ffn_width": vision, "output_projection": "shared", "unused_output": True}


_VARIANTS = {"x": _x, "moe": _moe, "mot": _mot}


def _integer(config: Mapping[str, Any], name: str, *, where: str, least: int) -> int:
    value = config.get(name)
    if type(value) is not int or value < least:
        raise CheckpointError(
            f"{where}: {name}={value!r} is not an int of at least {least}. The original always writes it."
        )
    return value
