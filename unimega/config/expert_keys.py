"""The ``[model]`` keys of presets with routed experts: what they mean, and what they cannot be together."""

from collections.abc import Callable
from typing import Any

from unimega.config.experts import ExpertSpec
from unimega.config.schema import ModelConfig
from unimega.errors import ConfigError

PRESETS = ("moe", "unimoe")
FIELDS = {
    "experts": "number",
    "expert_width": "width",
    "top_k": "top_k",
    "router_score": "score",
    "normalize_weights": "normalize",
    "routed_scale": "scale",
    "groups": "groups",
    "group_topk": "group_topk",
    "router_noise": "noise",
    "bias_rate": "bias_rate",
    "balance_weight": "balance",
    "balance_over": "balance_over",
    "balance_counts": "balance_counts",
    "z_weight": "z_loss",
    "shared_expert_width": "shared_width",
    "shared_expert_gate": "shared_gate",
}
"""Key -> field of ``ExpertSpec`` that takes its value as it is."""
OWN_KEYS = (*FIELDS, "expert_sets", "capacity", "dense_layers", "sparse_every")
REQUIRED = {"moe": ("experts", "top_k")}
DEFAULTS: dict[str, dict[str, Any]] = {
    "moe": {},
    "unimoe": {"experts": 8, "top_k": 2, "balance_weight": 0.01, "balance_counts": "first"},
}
"""What holds where a key is absent and ``ExpertSpec`` is not to decide."""
_OF_NOISE = (
    ("top_k", 2),
    ("router_score", "softmax"),
    ("normalize_weights", True),
    ("routed_scale", 1.0),
    ("groups", 1),
    ("bias_rate", 0.0),
)
_NEUTRAL = {"router_score": "softmax", "normalize_weights": True, "routed_scale": 1.0, "groups": 1, "group_topk": 1}
"""Defaults of ``ExpertSpec`` that the rules need."""


def expert_spec(model: ModelConfig, modalities: tuple[str, ...]) -> ExpertSpec:
    """The routed FFN of a sparse layer; ``model`` has passed ``check``."""
    fields: dict[str, Any] = {field: _value(model, key) for key, field in FIELDS.items()}
    fields["width"] = fields["width"] or model.ffn_width
    everyone = tuple(range(fields["number"]))
    if model.expert_sets:
        fields["sets"] = tuple(model.expert_sets.get(name, everyone) for name in modalities)
    if model.capacity:
        fields["capacity"] = tuple(model.capacity[name] for name in modalities)
    return ExpertSpec(**{field: value for field, value in fields.items() if value is not None})


def sparse_layers(model: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer has routed experts: every ``sparse_every``-th, without ``dense_layers``."""
    every, dense = model.sparse_every or 1, model.dense_layers or ()
    return tuple((i + 1) % every == 0 and i not in dense for i in range(model.num_layers))


def check(model: ModelConfig, modalities: tuple[str, ...]) -> None:
    """Refuse experts that cannot be built; sizes are at least their least already.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for rule in RULES:
        rule(model, modalities)


def _value(model: ModelConfig, key: str) -> Any:
    """The key, or the default of the preset; None: ``ExpertSpec``'s."""
    given = getattr(model, key)
    return DEFAULTS[model.preset].get(key) if given is None else given


def _known(model: ModelConfig, key: str) -> Any:
    """The value that holds, also where ``ExpertSpec`` decides."""
    value = _value(model, key)
    return _NEUTRAL.get(key) if value is None else value


def _groups(model: ModelConfig, modalities: tuple[str, ...]) -> None:
    experts, groups, open_ = (_known(model, key) for key in ("experts", "groups", "group_topk"))
    if experts % groups:
        raise ConfigError(
            f"model.groups={groups} does not divide model.experts={experts}. Groups have equally many experts."
        )
    if open_ > groups:
        raise ConfigError(
            f"model.group_topk={open_} is more than model.groups={groups}. A token's experts come from so many groups."
        )
    reach = experts // groups * open_
    if (top_k := _known(model, "top_k")) > reach:
        within = f"model.experts={experts}"
        if groups > 1:
            within = f"the {reach} experts in model.group_topk={open_} of model.groups={groups} groups"
        raise ConfigError(f"model.top_k={top_k} is more than {within}. Lower it.")


def _expert_sets(model: ModelConfig, modalities: tuple[str, ...]) -> None:
    experts, top_k = _known(model, "experts"), _known(model, "top_k")
    for name, chosen in (model.expert_sets or {}).items():
        key = f"model.expert_sets.{name}"
        if name not in modalities:
            raise ConfigError(f"{key}: the model has no such modality. Modalities: {', '.join(modalities)}.")
        for one in chosen:
            if not 0 <= one < experts:
                raise ConfigError(f"{key} has {one}, which is no expert. They are numbered from 0 to {experts - 1}.")
            if chosen.count(one) > 1:
                raise ConfigError(f"{key} has {one} twice. Name each expert once.")
        if len(chosen) < top_k:
            raise ConfigError(
                f"{key} has {len(chosen)} expert(s), fewer than model.top_k={top_k}. Add some or lower top_k."
            )
    if model.expert_sets and (groups := _known(model, "groups")) > 1:
        raise ConfigError(
            f"model.expert_sets with model.groups={groups}: a token might find fewer than top_k experts open to it. "
            "Remove one of the two."
        )


def _capacity(model: ModelConfig, modalities: tuple[str, ...]) -> None:
    if model.capacity is None:
        return
    for name, factor in model.capacity.items():
        if name not in modalities:
            raise ConfigError(
                f"model.capacity.{name}: the model has no such modality. Modalities: {', '.join(modalities)}."
            )
        if factor <= 0:
            raise ConfigError(f"model.capacity.{name}={factor} leaves no slots. It is above 0, e.g. 1.25.")
    for name in modalities:
        if name not in model.capacity:
            raise ConfigError(f"model.capacity.{name} is missing. Give every modality its own, or remove capacity.")


def _noise(model: ModelConfig, modalities: tuple[str, ...]) -> None:
    if not model.router_noise:
        return
    for key, want in _OF_NOISE:
        value = _known(model, key)
        if value is not None and value != want:
            spelled, wanted = str(value).lower(), str(want).lower()
            raise ConfigError(
                f"model.router_noise=true with model.{key}={spelled}: it is Uni-MoE's, which has {key} = {wanted}. "
                "Change one of the two."
            )


def _shared_gate(model: ModelConfig, modalities: tuple[str, ...]) -> None:
    if model.shared_expert_gate and not model.shared_expert_width:
        raise ConfigError(
            "model.shared_expert_gate=true has no shared expert to gate. Set model.shared_expert_width above 0."
        )


def _sparse_layers(model: ModelConfig, modalities: tuple[str, ...]) -> None:
    for one in model.dense_layers or ():
        if not 0 <= one < model.num_layers:
            raise ConfigError(
                f"model.dense_layers has {one}, which is no layer. They are numbered from 0 to {model.num_layers - 1}."
            )
    if not any(sparse_layers(model)):
        what = f"dense_layers={list(model.dense_layers or ())}, sparse_every={model.sparse_every or 1}"
        raise ConfigError(
            f"model.{what} leave no layer of model.num_layers={model.num_layers} with experts. "
            "Change them, or use preset dense."
        )


RULES: tuple[Callable[[ModelConfig, tuple[str, ...]], None], ...] = (
    _groups,
    _expert_sets,
    _capacity,
    _noise,
    _shared_gate,
    _sparse_layers,
)
