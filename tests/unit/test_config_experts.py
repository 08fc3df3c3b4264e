"""Keys of presets with routed experts: what they make, and the exact line for what they cannot be."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.config_cases import DENSE, MODEL, MOE, QWEN3, base, enter_empty_folder, line_of, run
from unimega.config import expert_keys, loader, model_rules, presets
from unimega.config.experts import ExpertSpec
from unimega.config.hf_config import EXPERT_KEYS, KEYS, model_keys
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import ModelConfig
from unimega.config.strict import construct, partial
from unimega.errors import ConfigError

QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
}
MIXTRAL = {**QWEN3, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None}
EVERY_KEY = {
    **MOE,
    "expert_width": 24,
    "router_score": "sigmoid",
    "normalize_weights": False,
    "routed_scale": 2.5,
    "groups": 2,
    "group_topk": 1,
    "capacity": {"text": 1.25, "vision": 2.0},
    "bias_rate": 0.001,
    "balance_weight": 0.02,
    "balance_over": "document",
    "balance_counts": "first",
    "z_weight": 0.003,
    "shared_expert_width": 16,
    "shared_expert_gate": True,
}
RULES = [
    ({**MOE, "experts": None}, "model.experts is missing. Preset 'moe' needs it: set it in [model]."),
    ({"experts": 8}, "model.experts=8 is not a key of preset 'unix', only of moe and unimoe. Remove it."),
    ({**MOE, "experts": 0}, "model.experts=0 is too small. It is at least 1."),
    ({**MOE, "z_weight": -1}, "model.z_weight=-1.0 is too small. It is at least 0."),
    ({**MOE, "routed_scale": 0}, "model.routed_scale=0.0 is too small. It is above 0."),
    ({**MOE, "groups": 3}, "model.groups=3 does not divide model.experts=8. Groups have equally many experts."),
    (
        {**MOE, "groups": 2, "group_topk": 3},
        "model.group_topk=3 is more than model.groups=2. A token's experts come from so many groups.",
    ),
    ({**MOE, "top_k": 9}, "model.top_k=9 is more than model.experts=8. Lower it."),
    ({**DENSE, "preset": "unimoe", "experts": 1}, "model.top_k=2 is more than model.experts=1. Lower it."),
    (
        {**MOE, "groups": 4, "group_topk": 1, "top_k": 3},
        "model.top_k=3 is more than the 2 experts in model.group_topk=1 of model.groups=4 groups. Lower it.",
    ),
    (
        {**MOE, "expert_sets": {"audio": [0, 1]}},
        "model.expert_sets.audio: the model has no such modality. Modalities: text, vision.",
    ),
    (
        {**MOE, "expert_sets": {"text": [0, 8]}},
        "model.expert_sets.text has 8, which is no expert. They are numbered from 0 to 7.",
    ),
    ({**MOE, "expert_sets": {"text": [3, 3]}}, "model.expert_sets.text has 3 twice. Name each expert once."),
    (
        {**MOE, "expert_sets": {"vision": [3]}},
        "model.expert_sets.vision has 1 expert(s), fewer than model.top_k=2. Add some or lower top_k.",
    ),
    (
        {**MOE, "groups": 2, "group_topk": 2, "expert_sets": {"text": [0, 1]}},
        "model.expert_sets with model.groups=2: a token might find fewer than top_k experts open to it. "
        "Remove one of the two.",
    ),
    (
        {**MOE, "capacity": {"text": 1, "audio": 1}},
        "model.capacity.audio: the model has no such modality. Modalities: text, vision.",
    ),
    ({**MOE, "capacity": {"text": 0}}, "model.capacity.text=0.0 leaves no slots. It is above 0, e.g. 1.25."),
    (
        {**MOE, "capacity": {"text": 1}},
        "model.capacity.vision is missing. Give every modality its own, or remove capacity.",
    ),
    (
        {**MOE, "router_noise": True, "normalize_weights": False},
        "model.router_noise=true with model.normalize_weights=false: it is Uni-MoE's, which has normalize_weights = "
        "true. Change one of the two.",
    ),
    (
        {**MOE, "shared_expert_gate": True},
        "model.shared_expert_gate=true has no shared expert to gate. Set model.shared_expert_width above 0.",
    ),
    (
        {**MOE, "dense_layers": [8]},
        "model.dense_layers has 8, which is no layer. They are numbered from 0 to 7.",
    ),
    (
        {**MOE, "sparse_every": 8, "dense_layers": [7]},
        "model.dense_layers=[7], sparse_every=8 leave no layer of model.num_layers=8 with experts. "
        "Change them, or use preset dense.",
    ),
]


ON_RANKS = [
    ({"tp": 2, "etp": 4}, {}, "parallel.etp=4 is neither 1 nor parallel.tp=2. Set it to one of the two."),
    (
        {"ep": 3},
        {},
        "parallel.ep=3 * etp=1 = 3 does not divide the 8 rank(s) of a pipeline stage (dp=8 * tp=1). Start a multiple "
        "of 3 processes, or pick an ep that divides 8.",
    ),
    (
        {"ep": 4, "tp": 2, "etp": 2, "pp": 2},
        {},
        "parallel.ep=4 * etp=2 = 8 does not divide the 4 rank(s) of a pipeline stage (dp=2 * tp=2). Start a multiple "
        "of 16 processes, or pick an ep that divides 2.",
    ),
    ({"ep": 8}, {"experts": 12}, "parallel.ep=8 does not divide the 12 experts of layer 0. Pick a divisor."),
    (
        {"tp": 2, "etp": 2},
        {"expert_width": 9},
        "FFN width 9 of the experts of layer 0 is not divisible by parallel.etp=2. Pick a divisor.",
    ),
    (
        {"tp": 2},
        {"shared_expert_width": 9},
        "shared FFN width 9 of the experts of layer 0 is not divisible by parallel.tp=2. Pick a divisor.",
    ),
]
LORA = [
    ({"rank": -1}, "model.lora.rank=-1 is negative. It is at least 1, or 0 for no factors."),
    ({"alpha": 8}, "model.lora.alpha=8.0 without factors: model.lora.rank is 0. Set a rank."),
    ({"rank": 4, "alpha": 0}, "model.lora.alpha=0.0 is too small. It is above 0."),
    ({"rank": 4, "dropout": 1}, "model.lora.dropout=1.0 is no share. It is at least 0 and below 1."),
    (
        {"rank": 4, "match": []},
        "model.lora.match is empty: no linear would have factors. Name some, or set rank to 0.",
    ),
    (
        {"rank": 4, "match": ["*.router*"]},
        "model.lora.match='*.router*' matches no linear. Linears: layers.*.attention.qkv, layers.*.attention.output, "
        "layers.*.ffn.experts.gate_up, layers.*.ffn.experts.down.",
    ),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    enter_empty_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize(("model", "line"), RULES)
def test_what_experts_cannot_be(model, line):
    assert line_of(base(model=model)) == line


@pytest.mark.parametrize(("parallel", "model", "line"), ON_RANKS)
def test_ranks_that_cannot_share_experts(parallel, model, line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert line_of(base(model={**MOE, **model}, parallel=parallel)) == line


@pytest.mark.parametrize(("lora", "line"), LORA)
def test_what_factors_cannot_be(lora, line):
    assert line_of(base(model={**MOE, "lora": lora})) == line


def experts_of(**keys: object) -> ExpertSpec:
    return presets.layers(run(base(model={**MOE, **keys})).model)[0].experts


def test_every_key_reaches_the_experts():
    made, other = experts_of(**EVERY_KEY), experts_of(experts=12, top_k=3, groups=3, group_topk=2)
    for key, field in expert_keys.FIELDS.items():
        if key != "router_noise":
            assert getattr(made, field) == EVERY_KEY[key] != getattr(other, field), key
    assert made.capacity == (1.25, 2.0)
    assert (made.noise, experts_of(router_noise=True).noise) == (False, True)


def test_layers():
    plain = LayerSpec(shared_ffn=96)
    experts = LayerSpec(experts=ExpertSpec(number=8, width=96, top_k=2))
    assert presets.layers(run(base(model=MOE)).model) == (experts,) * 8
    some = {**MOE, "sparse_every": 2, "dense_layers": [3]}
    assert presets.layers(run(base(model=some)).model) == (plain, experts, plain, plain, *(plain, experts) * 2)
    original = ExpertSpec(number=8, width=96, top_k=2, balance=0.01, balance_counts="first")
    assert presets.layers(run(base(model={**DENSE, "preset": "unimoe"})).model) == (LayerSpec(experts=original),) * 8
    sets = {**MOE, "expert_sets": {"vision": [6, 1]}}
    assert presets.layers(run(base(model=sets)).model)[0].experts.sets == (tuple(range(8)), (6, 1))


@pytest.mark.parametrize("model", [EVERY_KEY, {**MOE, "expert_sets": {"text": [1, 2]}, "dense_layers": [0, 1]}])
def test_a_run_reloads_equal(model):
    config = run(base(model=model))
    assert loader.from_dict(json.loads(json.dumps(loader.dump(config)))) == config
    spec = presets.model_spec(config.model)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


NUMBERS = st.integers(1, 9)
KEYS_DRAWN = st.fixed_dictionaries(
    {"preset": st.sampled_from(["moe", "unimoe"]), "experts": NUMBERS, "top_k": NUMBERS},
    optional={
        "groups": NUMBERS,
        "group_topk": NUMBERS,
        "router_noise": st.booleans(),
        "router_score": st.sampled_from(["softmax", "sigmoid"]),
        "normalize_weights": st.booleans(),
        "routed_scale": st.sampled_from([1.0, 2.5]),
        "bias_rate": st.sampled_from([0.0, 0.1]),
        "shared_expert_gate": st.booleans(),
        "shared_expert_width": st.sampled_from([0, 8]),
        "expert_sets": st.dictionaries(st.sampled_from(["text", "vision"]), st.lists(st.integers(-1, 9), max_size=5)),
        "capacity": st.dictionaries(st.sampled_from(["text", "vision"]), st.sampled_from([0.0, 1.0])),
        "dense_layers": st.lists(st.integers(-1, 8), max_size=8),
        "sparse_every": NUMBERS,
    },
)


@settings(max_examples=50)
@given(KEYS_DRAWN)
def test_whatever_the_keys_are_they_make_layers_or_one_line(keys):
    given_keys = {key: value for key, value in {**MODEL, **DENSE, **keys}.items() if value is not None}
    model = construct(ModelConfig, partial(ModelConfig, given_keys, where="run"), where="run")
    try:
        model_rules.check(model)
    except ConfigError as error:
        assert str(error).startswith("model.") and "\n" not in str(error)
        return
    assert any(layer.experts for layer in presets.layers(model))


def test_keys_of_a_hugging_face_config():
    keys = model_keys(QWEN3_MOE, where="c")
    assert keys.keys() == KEYS | EXPERT_KEYS
    assert {key: keys[key] for key in EXPERT_KEYS} == {
        "experts": 6,
        "expert_width": 32,
        "top_k": 2,
        "normalize_weights": True,
        "dense_layers": (1,),
        "sparse_every": 2,
    }
    assert (keys["qk_norm"], keys["qkv_bias"], keys["output_bias"], keys["head_width"]) == (True, True, True, 24)
    plain = {name: value for name, value in QWEN3_MOE.items() if name not in ("norm_topk_prob", "head_dim")}
    assert (model_keys(plain, where="c")["normalize_weights"], model_keys(plain, where="c")["head_width"]) == (
        False,
        16,
    )
    keys = model_keys(MIXTRAL, where="c")
    assert (keys["experts"], keys["expert_width"], keys["normalize_weights"]) == (4, 96, True)
    assert (keys["qk_norm"], keys["qkv_bias"], keys["output_bias"], keys["head_width"]) == (False, False, False, 16)


def test_a_hugging_face_config_is_for_the_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE))
    model = {"hf_config": "config.json", "codebook": 0}
    values = {**base(), "model": {**model, "preset": "moe"}}
    config = run(values)
    layers = presets.layers(config.model)
    assert [layer.experts is not None for layer in layers] == [False, False, False, True]
    assert line_of({**base(), "model": {**model, "preset": "dense"}}) == (
        "model.preset='dense' has no routed experts, but model.hf_config='config.json' describes 6 of them. "
        "Use preset moe."
    )


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {**QWEN3_MOE, "num_experts": -1},
            "c: 'num_experts' wants a positive int, found -1. Is this the config.json of a qwen3_moe?",
        ),
        ({**QWEN3_MOE, "mlp_only_layers": 1}, "c: 'mlp_only_layers' wants a list of int, found 1."),
        ({**QWEN3_MOE, "norm_topk_prob": "false"}, "c: 'norm_topk_prob' wants true or false, found 'false'."),
        ({**QWEN3_MOE, "mlp_bias": True}, "c: mlp_bias=true is not supported. The FFN has no biases."),
        (
            {**MIXTRAL, "sliding_window": 4096},
            "c: sliding-window attention is not supported. Every layer must use full attention.",
        ),
        (
            {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 99},
            "c: sliding-window attention is not supported. Every layer must use full attention.",
        ),
    ],
)
def test_hugging_face_configs_that_are_refused(config, line):
    with pytest.raises(ConfigError) as caught:
        model_keys(config, where="c")
    assert str(caught.value) == line
