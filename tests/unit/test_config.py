"""A run: precedence, every kind of value, round trip, presets, Hugging Face sizes, help and page."""

import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tests.unit.config_cases import BASE, DENSE, MOE_HARD, MOT, QWEN2, QWEN3, ROOT, SHARE, base, enter_empty_folder, run
from unimega.config import loader, presets, reference, rules, strict
from unimega.config.hf_config import KEYS, model_keys
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import ParallelConfig, RunConfig, Source
from unimega.errors import ConfigError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    enter_empty_folder(tmp_path, monkeypatch)


def test_precedence():
    Path("b.toml").write_text("[optimizer]\nlr = 2\n[model.init]\nlinear = 0.5\n[kernels]\nswiglu = 'x'\n")
    values = base(optimizer={"lr": 1, "eps": 1e-3}, model={"init": {"head": 0.1}}, kernels={"attention": "y"})
    config = run(values, "b.toml", "--optimizer.lr", "3", "--optimizer.lr=4")
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip) == (4.0, 1e-3, 1.0)
    assert dataclasses.astuple(config.model.init) == (0.02, 0.5, 0.1)
    assert config.kernels == {"attention": "y", "swiglu": "x"}


def test_every_kind_of_value_on_a_command_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = shlex.split(
        "--parallel.tp 2 --parallel.sequence_parallel true --parallel.pp 2 --parallel.layout 8 0 "
        "--model.cross_document True "
        "--model.init.embedding 1 --model.vision_ids [90,91] --kernels.swiglu reference --optimizer.schedule wsd "
        "--training.trainable *_vision embedding.* --optimizer.betas 0.5 0.6 --model.skip_from -1 --data.tokenizer ''"
    )
    config = run(base(), *words, "--data.train", '[{path = "x", weight = 2}, {path = "y"}]')
    assert config.parallel == ParallelConfig(tp=2, sequence_parallel=True, pp=2, layout=(8, 0))
    assert (config.model.cross_document, config.model.init.embedding, config.model.vision_ids) == (True, 1.0, (90, 91))
    assert config.kernels == {"swiglu": "reference"}
    assert (config.optimizer.schedule, config.optimizer.betas) == ("wsd", (0.5, 0.6))
    assert config.training.trainable == ("*_vision", "embedding.*")
    assert config.data.train == (Source(path="x", weight=2.0), Source(path="y"))
    assert run(base(model={"vision_ids": [90]}), "--model.vision_ids", "none").model.vision_ids is None
    assert run(base(), "--optimizer.rates", '[{"match": "*", "factor": 2}]').optimizer.rates[0].factor == 2.0


VARIANTS = [
    {},
    {"codebook": 0},
    {"skip_from": 0, "vision_ids": [], "vocabulary_rows": 168},
    DENSE,
    {**SHARE, "vision_ffn_width": 0},
    MOE_HARD,
    {**MOT, "output_projection": "shared", "unused_output": True, "vision_ffn_width": 40},
]


@pytest.mark.parametrize("model", VARIANTS)
def test_a_resolved_run_reloads_equal(model):
    config = run(base(model=model, kernels={"swiglu": "reference"}, training={"loss_weights": {"text": 4}}))
    stored = json.loads(json.dumps(loader.dump(config)))
    assert loader.from_dict(stored) == config
    assert sorted(stored["model"]) == sorted(field.name for field in dataclasses.fields(config.model))
    Path("stored.json").write_text(json.dumps(stored))
    assert loader.load_run(["--config", "stored.json"]) == config
    spec = presets.model_spec(config.model)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_stored_run_is_read_strictly():
    stored = loader.dump(run(base()))
    stored["parallel"]["tpp"] = 2
    with pytest.raises(
        ConfigError, match=re.escape("run.json: unknown key 'parallel.tpp'. Did you mean 'parallel.tp'?")
    ):
        loader.from_dict(stored, where="run.json")


def spec_of(**model: object) -> ModelSpec:
    return presets.model_spec(run(base(model=model)).model)


def test_layers_of_every_preset():
    end = LayerSpec(attention="split", output_projection="split", scope="own", ffn=(96, 96), norms="split")
    plain = LayerSpec(shared_ffn=96)
    assert spec_of(**DENSE).layers == (plain,) * 8
    assert spec_of().layers == (end,) * 2 + (plain,) * 5 + (end,)
    middle = LayerSpec(ffn=(96, 40), shared_ffn=48)
    assert spec_of(**SHARE, vision_ffn_width=40).layers == (end,) * 2 + (middle,) * 5 + (end,)
    assert spec_of(**MOE_HARD).layers == (plain, LayerSpec(ffn=(96, 96))) * 4
    assert spec_of(**MOT).layers == (LayerSpec(attention="split", output_projection="split", ffn=(96, 96)),) * 8
    original = spec_of(**MOT, output_projection="shared", unused_output=True).layers[0]
    assert (original.output_projection, original.unused_output) == ("shared", True)


def test_skip_and_vocabulary_of_a_spec():
    spec = spec_of(skip_from=1, encode_layers=2, decode_layers=3, vocabulary_rows=168, vision_ids=[90])
    assert spec.skip == (1, 6)
    assert spec.vocabulary.codes == (96, 64)
    ids = np.array([0, 90, 91, 95, 96, 159, 167])
    assert spec.vocabulary.modality_of(ids).tolist() == [0, 1, 0, 0, 1, 1, 1]
    text = spec_of(codebook=0, vocabulary_rows=100).vocabulary
    assert (text.names, text.codes, text.rows) == (("text",), (96,), 100)


def test_vision_ids_come_from_the_tokenizer_when_absent():
    config = run(base()).model
    assert config.vision_ids is None
    assert presets.model_spec(config, vision_ids=(7,)).vocabulary.ids == ((), (7,))
    given = dataclasses.replace(config, vision_ids=(90,))
    assert presets.model_spec(given, vision_ids=(7,)).vocabulary.ids == ((), (90,))


@pytest.mark.parametrize(
    ("stages", "layers", "expected"),
    [
        ((1, 1), 5, (5,)),
        ((4, 1), 8, (2, 2, 2, 2)),
        ((4, 1), 10, (2, 3, 3, 2)),
        ((2, 2), 9, (2, 3, 2, 2)),
        ((3, 1), 5, (2, 2, 1)),
    ],
)
def test_automatic_layout(stages, layers, expected):
    got = rules.layout(ParallelConfig(pp=stages[0], vpp=stages[1]), layers)
    assert got == expected and sum(got) == layers


def test_sizes_that_follow():
    config = run(base(), "--training.micro_batch_packs", "2")
    parallel = ParallelConfig(tp=2, pp=2)
    assert rules.data_parallel_size(parallel, world_size=8) == 2
    assert rules.microbatches_per_step(config.training, parallel, world_size=8) == 2


def test_hugging_face_sizes_lie_below_the_keys_of_the_run():
    Path("qwen").mkdir()
    Path("qwen/config.json").write_text(json.dumps(QWEN3))
    model = {"preset": "dense", "codebook": 0, "hf_config": "qwen", "num_layers": 3}
    config = run({**BASE, "model": model})
    assert (config.model.num_layers, config.model.width, config.model.head_width) == (3, 64, 24)
    assert (config.model.qk_norm, config.model.qkv_bias, config.model.output_bias) == (True, True, True)
    assert (config.model.norm_eps, config.model.tied, config.model.vision_offset) == (1e-5, False, 160)
    Path("stored.json").write_text(json.dumps(loader.dump(config)))
    Path("qwen/config.json").unlink()
    assert loader.load_run(["--config", "stored.json"]) == config  # every size is in it


def test_keys_of_a_hugging_face_config():
    keys = model_keys(QWEN2, where="c")
    assert keys.keys() == KEYS
    assert (keys["head_width"], keys["qk_norm"], keys["qkv_bias"], keys["output_bias"]) == (16, False, True, False)
    assert model_keys({**QWEN3, "attention_bias": False}, where="c")["qkv_bias"] is False
    new = {**QWEN3, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert model_keys(new, where="c")["rope_theta"] == 5e5
    old = {**QWEN3, "rope_scaling": None, "layer_types": ["full_attention"] * 4}
    assert model_keys(old, where="c")["rope_theta"] == 1e6


def test_help_teaches_every_key(capsys):
    with pytest.raises(SystemExit) as leave:
        loader.load_run(["--help"])
    assert leave.value.code == 0
    shown = capsys.readouterr().out
    for key in strict.dotted(RunConfig):
        if not any(other.startswith(key + ".") for other in strict.dotted(RunConfig)):
            assert f"--{key} " in shown, key
    assert "ranks that share each layer's" in shown


def test_every_key_has_a_docstring_and_the_page_is_up_to_date():
    for cls in (RunConfig, *strict.types_of(RunConfig).values()):
        if dataclasses.is_dataclass(cls) and cls is not RunConfig:
            missing = {field.name for field in dataclasses.fields(cls)} - reference.docstrings(cls).keys()
            assert not missing, f"{cls.__name__}: {missing}"
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference.markdown(), "run python tools/write_configuration_doc.py"


def test_the_run_of_the_design_loads(monkeypatch):
    """The names and values that other pages rely on."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = """
    [model]
    preset = "unix"
    num_layers = 36
    width = 2048
    heads = 16
    kv_heads = 2
    head_width = 128
    ffn_width = 11008
    qkv_bias = true
    rope_theta = 1e6
    encode_layers = 12
    decode_layers = 6
    skip_from = -1
    vision_offset = 151936
    codebook = 8192
    vocabulary_rows = 160128
    vision_ids = [151652]
    init = { embedding = 0.02, linear = 0.02, head = 0.02 }
    [data]
    train = [{ path = "corpus/cc12m", weight = 0.7, direction = "both" }, { path = "corpus/text", weight = 0.3 }]
    evaluation = ["corpus/held_out"]
    tokenizer = "qwen"
    pack_length = 10240
    [parallel]
    tp = 2
    sequence_parallel = true
    [optimizer]
    schedule = "cosine"
    warmup_steps = 500
    rates = [{ match = "*_vision", factor = 2.0 }]
    [training]
    steps = 20000
    global_batch_packs = 64
    loss_weights = { text = 1.0, vision = 1.0 }
    [checkpoint]
    directory = "runs/a/checkpoints"
    [logging]
    directory = "runs/a/logs"
    """
    Path("run.toml").write_text(text)
    assert tomllib.loads(text)["model"]["width"] == loader.load_run(["--config", "run.toml"]).model.width
