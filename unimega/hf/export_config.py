"""From the description of a model to the config.json, the spelling and the generation settings of its export."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unimega.config import layer as stacks
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.data.tokenize import SpecialIds
from unimega.errors import CheckpointError
from unimega.hf import export_experts
from unimega.hf.layout import Layout

DENSE = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
STOCK = DENSE | export_experts.STOCK
"""Model types of transformers that a model can be, with their architectures."""
UNI_X, CODE_FILE = "uni_x", "modeling_unix.py"
UNIMOE = "unimoe"
FORMATS = ("auto", UNI_X, UNIMOE, *STOCK)
_CARRIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "vision_start_id",
    "add_sep_for_vis",
    "vis_sep_tokens",
    "vis_sep_lens",
    "all_modal_visible",
    "use_share_attn",
    "use_share_ffn",
    "attn_v_q_heads",
    "add_share_ffn",
    "ffn_share_size",
    "ffn_vision_size",
    "decoder_sparse_step",
)
"""Fields of the imported config.json that come back; what the model says is written over them."""
_NOT_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
"""Of the imported generation_config.json."""
_DEFAULT_POSITIONS = 32768
Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an export will be."""

    model_type: str
    layout: Layout
    config: Fields
    """config.json."""
    generation: Fields
    """generation_config.json."""

    @property
    def needs_code(self) -> bool:
        """Whether it loads with ``trust_remote_code`` only."""
        return self.model_type == UNI_X


def describe(
    spec: ModelSpec, *, format: str, dtype: str, stored: Mapping[str, Any], special: SpecialIds | None
) -> Target:
    """Choose a model type of transformers and write its configuration.

    Args:
        format: one of ``FORMATS``; ``auto`` is a stock model type where one computes the same.
        dtype: of the weights, as config.json spells it (``bfloat16``).
        stored: what the checkpoint keeps beside its weights; an imported one knows its old config.json.
        special: the tokenizer's special ids, if it is known.

    Raises:
        CheckpointError: the model is not of that format, or of none.
    """
    model_type = _model_type(spec, format)
    source = stored.get("source") or {}
    old = source.get("config") or {}
    fields = {name: old[name] for name in _CARRIED if name in old} | _common(spec, dtype)
    fields.setdefault("max_position_embeddings", _DEFAULT_POSITIONS)
    fields.setdefault("initializer_range", spec.init_linear)
    experts = export_experts.experts_of(spec)
    if model_type in STOCK:
        layout = Layout(family="mixtral" if model_type == "mixtral" else "qwen")
        fields |= {"architectures": [STOCK[model_type]], "model_type": model_type}
        fields["attention_bias"] = spec.output_bias
        if experts:
            fields |= export_experts.stock_fields(spec, experts, model_type, old)
    elif experts and model_type == UNIMOE:
        layout = Layout(family="unimoe")
        fields = export_experts.unimoe_fields(spec, experts, fields, old)
    elif experts:
        layout = Layout(family="qwen")
        fields |= _code_fields(spec) | export_experts.code_fields(spec, experts, old)
    else:
        layout, variant = _variant(spec, Layout(**source["layout"]) if source else None)
        fields |= variant | _code_fields(spec)
    if model_type == UNI_X or len(spec.modalities) > 1:
        fields |= _modalities(spec, special, old)
    ids = _special_ids(special, fields)
    generation = _generation(ids, source.get("generation") or {}, stock=model_type in STOCK)
    never = _never_sampled(spec)
    return Target(
        model_type=model_type,
        layout=layout,
        config=fields | ids,
        generation=generation | ({"suppress_tokens": never} if never and model_type in STOCK else {}),
    )


def _model_type(spec: ModelSpec, format: str) -> str:
    if format not in FORMATS:
        raise CheckpointError(f"--format={format!r} is unknown. Formats: {', '.join(FORMATS)}.")
    stock, why = _stock(spec)
    if format in STOCK and format != stock:
        has, wants = export_experts.experts_of(spec) is not None, format in export_experts.STOCK
        if has != wants:
            why = "it has routed experts" if has else "it has no routed experts"
        raise CheckpointError(f"--format={format!r} cannot hold this model: {why}. Use --format {stock or UNI_X}.")
    if format == UNIMOE:
        _check_unimoe(spec, stock, why)
    return (stock or UNI_X) if format == "auto" else format


def _check_unimoe(spec: ModelSpec, stock: str | None, why: str) -> None:
    """It computes what a Mixtral of two experts a token does."""
    experts = export_experts.experts_of(spec)
    if experts is None or stock != "mixtral" or experts.top_k != 2:
        why = "it has no routed experts" if experts is None else why
        raise CheckpointError(
            f"--format='unimoe' cannot hold this model: {why}. Uni-MoE is a Llama whose tokens have 2 experts in all "
            f"layers. Use --format {stock or UNI_X}."
        )


def _stock(spec: ModelSpec) -> tuple[str | None, str]:
    """The stock model type that computes the same, and why it is no other."""
    if experts := export_experts.experts_of(spec):
        return export_experts.stock(spec, experts)
    if any(not _is_plain(layer, len(spec.modalities)) for layer in spec.layers):
        return None, "modalities have weights of their own"
    if len({_text_width(layer) for layer in spec.layers}) > 1:
        return None, "its FFN widths differ"
    what = f"qk_norm={spec.qk_norm}, qkv_bias={spec.qkv_bias}, output_bias={spec.output_bias}".lower()
    if spec.qkv_bias == spec.output_bias:
        return ("qwen3" if spec.qk_norm else "llama"), what
    return ("qwen2" if spec.qkv_bias and not spec.qk_norm else None), what


def _is_plain(layer: LayerSpec, modalities: int) -> bool:
    """One weight for all, and one FFN. With one modality a split layer is that too."""
    if modalities == 1:
        return not (layer.ffn and layer.shared_ffn)
    return not layer.ffn and layer == LayerSpec(shared_ffn=layer.shared_ffn)


def _text_width(layer: LayerSpec) -> int:
    return layer.ffn[0] if layer.ffn else layer.shared_ffn


def _common(spec: ModelSpec, dtype: str) -> Fields:
    """What all model types have. Rope and dtype are spelled for transformers 4 and for 5."""
    return {
        "vocab_size": spec.vocabulary.rows,
        "hidden_size": spec.width,
        "intermediate_size": _text_width(spec.layers[0]),
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": spec.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * len(spec.layers),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _code_fields(spec: ModelSpec) -> Fields:
    module = CODE_FILE.removesuffix(".py")
    return {
        "architectures": ["UniXForCausalLM"],
        "model_type": UNI_X,
        "auto_map": {
            "AutoConfig": f"{module}.UniXConfig",
            "AutoModel": f"{module}.UniXModel",
            "AutoModelForCausalLM": f"{module}.UniXForCausalLM",
        },
        "attention_bias": spec.qkv_bias and spec.output_bias,
        "qk_norm": spec.qk_norm,
        "qkv_bias": spec.qkv_bias,
        "o_bias": spec.output_bias,
    }


def _modalities(spec: ModelSpec, special: SpecialIds | None, old: Mapping[str, Any]) -> Fields:
    """Which ids are vision, said outright; stock models get it as a note for those who prepare their inputs."""
    vocabulary = spec.vocabulary
    if len(vocabulary.names) == 1:
        return {"real_text_vocab_size": vocabulary.codes[0], "vision_vocab_size": 0}
    ids = list(vocabulary.ids[1])
    start = special.vision_start if special else old.get("vision_start_id", ids[0] if len(ids) == 1 else None)
    unconditional = {"unconditional_token_ids": list(special.unconditional)} if special else {}
    return {
        "real_text_vocab_size": vocabulary.starts[1],
        "vision_vocab_size": vocabulary.codes[1],
        "vision_start_id": start,
        "vision_token_ids": ids,
        **unconditional,
    }


def _special_ids(special: SpecialIds | None, fields: Fields) -> Fields:
    """The run's tokenizer wins over the imported config.json: it is what eos means in the training data."""
    ids: Fields = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in fields}
    return ids | ({"eos_token_id": special.eos, "pad_token_id": special.pad} if special else {})


def _generation(ids: Fields, old: Fields, *, stock: bool) -> Fields:
    """What was imported comes back, with further ends of text than the one of config.json.

    How to draw does so for stock models alone: a penalty of repetition, say, is not meant for pictures.
    """
    carried = {name: value for name, value in old.items() if name not in _NOT_CARRIED} if stock else {}
    ends, end = old.get("eos_token_id"), ids.get("eos_token_id")
    more = end is None or (isinstance(ends, list) and end in ends)
    return carried | ids | ({"eos_token_id": ends} if ends is not None and more else {})


def _never_sampled(spec: ModelSpec) -> list[int]:
    vocabulary = spec.vocabulary
    stops = (*vocabulary.starts[1:], vocabulary.rows)
    ranges = zip(vocabulary.starts, vocabulary.codes, stops, strict=True)
    return [one for start, codes, stop in ranges for one in range(start + codes, stop)]


def _variant(spec: ModelSpec, hint: Layout | None) -> tuple[Layout, Fields]:
    """The spelling and the fields that make the modelling file build exactly these layers."""
    if len(spec.modalities) > 2:
        raise CheckpointError(
            f"the model has {len(spec.modalities)} modalities, {', '.join(spec.modalities)}. "
            "A model with weights per modality is exported with at most two, text and vision."
        )
    make = _mot if any(one.attention == "split" and one.norms == "shared" for one in spec.layers) else _x_or_moe
    layout, fields, rebuilt = make(spec, hint)
    if rebuilt != spec.layers:
        at = next(i for i, (want, got) in enumerate(zip(spec.layers, rebuilt, strict=True)) if want != got)
        raise CheckpointError(
            f"layers.{at} of the model is {spec.layers[at]}, which no configuration of {CODE_FILE} gives there. "
            "Only stacks that a preset makes are exported."
        )
    return layout, fields


def _mot(spec: ModelSpec, hint: Layout | None) -> tuple[Layout, Fields, tuple[LayerSpec, ...]]:
    first = spec.layers[0]
    rebuilt = stacks.mot(
        len(spec.layers),
        ffn=first.ffn,
        output_projection=first.output_projection,
        unused_output=first.unused_output,
    )
    output = "used" if first.output_projection == "split" else "unused" if first.unused_output else "absent"
    fields = {"variant": "mot", "ffn_vision_size": sum(first.ffn[1:]), "vision_o_proj": output}
    return Layout(family="mot"), fields, rebuilt


def _x_or_moe(spec: ModelSpec, hint: Layout | None) -> tuple[Layout, Fields, tuple[LayerSpec, ...]]:
    layers, total = spec.layers, len(spec.layers)
    ffn = (_text_width(layers[0]),) * len(spec.modalities)
    twice = [i for i, one in enumerate(layers) if one.norms == "split"]
    split = [i for i, one in enumerate(layers) if one.ffn]
    if split and not twice and (hint is None or hint.family != "x"):
        rebuilt = stacks.moe_hard(total, ffn=ffn, every=split[0] + 1)
        if rebuilt == layers:
            return Layout(family="moe"), {"variant": "moe", "decoder_sparse_step": split[0] + 1}, rebuilt
    encode = _encode(spec, twice, hint)
    decode = len(twice) - encode
    fields: Fields = {
        "variant": "x",
        "num_vision_encode_layers": encode,
        "num_vision_decode_layers": decode,
        "skip_connection_loc": spec.skip[0] if spec.skip else -1,
        "add_share_ffn": 0,
    }
    between = layers[encode : total - decode]
    if between and between[0].ffn:
        one = between[0]
        fields |= {"add_share_ffn": 1, "ffn_vision_size": sum(one.ffn[1:]), "ffn_share_size": one.shared_ffn}
        rebuilt = stacks.share(total, ffn=ffn, middle=one.ffn, shared=one.shared_ffn, encode=encode, decode=decode)
    else:
        rebuilt = stacks.unix(total, ffn=ffn, encode=encode, decode=decode)
    return Layout(family="x", encode=encode), fields, rebuilt


def _encode(spec: ModelSpec, twice: list[int], hint: Layout | None) -> int:
    """How many layers at the bottom exist twice. Where all do, the import or the skip connection tells."""
    total = len(spec.layers)
    if len(twice) < total:
        return next((i for i in range(total) if i not in twice), total)
    if spec.skip:
        return spec.skip[1] - spec.skip[0]
    return hint.encode if hint and hint.family == "x" else total
