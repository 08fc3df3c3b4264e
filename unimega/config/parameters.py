"""The parameters of a model by name: what patterns of a run are held to, without building the model."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from unimega.config.layer import LayerSpec
from unimega.config.lora import has_factors, linears_of
from unimega.config.model import ModelSpec
from unimega.config.schema import Rate
from unimega.errors import ConfigError


def parameters(spec: ModelSpec) -> tuple[str, ...]:
    """Names of all parameters, e.g. ``layers.0.attention.qkv.weight_text``, sorted; a tied head is the embedding."""
    names = ["embedding.weight", "final_norm.weight", *([] if spec.tied else ["head.weight"])]
    for index, layer in enumerate(spec.layers):
        names += [f"layers.{index}.{name}" for name in _of(spec, layer, index)]
    return tuple(sorted(names))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter is one of those that the patterns name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(spec: ModelSpec, *, trainable: Sequence[str], rates: Sequence[Rate]) -> None:
    """Refuse a pattern that matches no parameter.

    Args:
        trainable: of ``training.trainable``.
        rates: of ``optimizer.rates``.

    Raises:
        ConfigError: names the key and the pattern.
    """
    names = parameters(spec)
    given = [("training.trainable", pattern) for pattern in trainable]
    given += [(f"optimizer.rates[{i}].match", rate.match) for i, rate in enumerate(rates)]
    for key, pattern in given:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}={pattern!r} matches no parameter, e.g. {names[0]!r} or {names[-1]!r}.")


def _of(spec: ModelSpec, layer: LayerSpec, index: int) -> Iterator[str]:
    split = [f"_{name}" for name in spec.modalities]
    copies = {"shared": [""], "split": split}
    for norm in ("attention_norm", "ffn_norm"):
        yield from (f"{norm}.weight{copy}" for copy in copies[layer.norms])
    for norm in ("q_layernorm", "k_layernorm") if spec.qk_norm else ():
        yield from (f"attention.{norm}.weight{copy}" for copy in copies[layer.attention])
    if layer.experts is not None:
        yield "ffn.router.weight"
        yield from ["ffn.shared_gate.weight"] if layer.experts.shared_gate else []
    own = {"attention.qkv": copies[layer.attention], "attention.output": copies[layer.output_projection]}
    if layer.ffn:
        own["ffn.gate_up"] = own["ffn.down"] = [copy for copy, width in zip(split, layer.ffn, strict=True) if width]
    biased = {"attention.qkv": spec.qkv_bias, "attention.output": spec.output_bias}
    for linear in linears_of(layer):
        kinds = ["weight", "bias"] if biased.get(linear) else ["weight"]
        if linear == "attention.output" and layer.unused_output:
            yield from (f"{linear}.{kind}{copy}" for kind in kinds for copy in split[1:])
        kinds += ["lora_a", "lora_b"] if has_factors(spec.lora, f"layers.{index}.{linear}") else []
        yield from (f"{linear}.{kind}{copy}" for kind in kinds for copy in own.get(linear, [""]))
