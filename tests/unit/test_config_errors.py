"""What a user can get wrong in files and on a command line: the exact lines, fast and without torch."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.config_cases import QWEN3, ROOT, base, enter_empty_folder, line_of
from tests.unit.test_config_experts import LORA, ON_RANKS
from tests.unit.test_config_experts import RULES as OF_EXPERTS
from tests.unit.test_config_rules import RULES
from unimega.config import loader
from unimega.config.hf_config import model_keys
from unimega.errors import ConfigError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    enter_empty_folder(tmp_path, monkeypatch)


IN_FILE = [
    ({"parallel": {"tpp": 2}}, "run.toml: unknown key 'parallel.tpp'. Did you mean 'parallel.tp'?"),
    ({"paralel": {"tp": 2}}, "run.toml: unknown key 'paralel'. Did you mean 'parallel'?"),
    ({"training": {"lr": 1e-3}}, "run.toml: unknown key 'training.lr'. Did you mean 'optimizer.lr'?"),
    (
        {"logging": {"colour": 1}},
        "run.toml: unknown key 'logging.colour'. Keys of [logging]: directory, every_steps, wandb, profile.",
    ),
    (
        {"model": {"init": {"linaer": 0.1}}},
        "run.toml: unknown key 'model.init.linaer'. Did you mean 'model.init.linear'?",
    ),
    (
        {"data": {"train": [{"path": "a", "wieght": 1}]}},
        "run.toml: unknown key 'data.train[0].wieght'. Did you mean 'data.train[0].weight'?",
    ),
    (
        {"data": {"train": [{"weight": 1}]}},
        "run.toml: 'data.train[0].path' is missing. Every table of the list needs it.",
    ),
    ({"training": {"steps": "fifty"}}, "run.toml: 'training.steps' wants int, found 'fifty' (str)."),
    ({"training": {"steps": True}}, "run.toml: 'training.steps' wants int, found True (bool)."),
    ({"training": {"steps": 1.5}}, "run.toml: 'training.steps' wants int, found 1.5 (float)."),
    ({"optimizer": {"lr": "1e-3"}}, "run.toml: 'optimizer.lr' wants float, found '1e-3' (str)."),
    ({"optimizer": {"lr": False}}, "run.toml: 'optimizer.lr' wants float, found False (bool)."),
    ({"model": {"tied": 1}}, "run.toml: 'model.tied' wants true or false, found 1 (int)."),
    ({"data": {"tokenizer": 3}}, "run.toml: 'data.tokenizer' wants str, found 3 (int)."),
    ({"model": {"init": 0.5}}, "run.toml: 'model.init' wants a table, found 0.5 (float)."),
    ({"model": {"capacity": {"text": "a"}}}, "run.toml: 'model.capacity.text' wants float, found 'a' (str)."),
    ({"model": {"expert_sets": {"text": 1}}}, "run.toml: 'model.expert_sets.text' wants a list of int, found 1 (int)."),
    ({"model": {"vision_ids": 90}}, "run.toml: 'model.vision_ids' wants a list of int, found 90 (int)."),
    ({"data": {"train": "corpus"}}, "run.toml: 'data.train' wants a list of tables, found 'corpus' (str)."),
    ({"data": {"train": ["corpus"]}}, "run.toml: 'data.train[0]' wants a table, found 'corpus' (str)."),
    ({"optimizer": {"betas": [0.9]}}, "run.toml: 'optimizer.betas' wants a list of 2 float, found [0.9] (list)."),
    (
        {"parallel": {"layout": "even"}},
        "run.toml: 'parallel.layout' wants 'auto' or a list of int, found 'even' (str).",
    ),
    (
        {"optimizer": {"schedule": "cosin"}},
        "run.toml: 'optimizer.schedule' wants one of 'constant', 'linear', 'cosine', 'wsd', found 'cosin' (str).",
    ),
    ({"optimizer": {"kind": "lion"}}, "run.toml: 'optimizer.kind' wants 'adamw', found 'lion' (str)."),
    (
        {"training": {"precision": "fp16"}},
        "run.toml: 'training.precision' wants one of 'bf16', 'fp32', found 'fp16' (str).",
    ),
    (
        {"training": {"recompute": True}},
        "run.toml: 'training.recompute' wants one of 'none', 'selective', 'moe', 'full', found True (bool).",
    ),
    (
        {"checkpoint": {"optimizer": "slow"}},
        "run.toml: 'checkpoint.optimizer' wants one of 'reshardable', 'fast', found 'slow' (str).",
    ),
    (
        {"data": {"overlong": "cut"}},
        "run.toml: 'data.overlong' wants one of 'error', 'drop', 'split_text', found 'cut' (str).",
    ),
    ({"kernels": {"swiglu": 1}}, "run.toml: 'kernels.swiglu' wants str, found 1 (int)."),
    (
        {"training": {"loss_weights": {"text": "x"}}},
        "run.toml: 'training.loss_weights.text' wants float, found 'x' (str).",
    ),
    (
        {"training": {"steps": None}},
        "run.toml: 'training.steps' is missing. Set it in [training] of a --config file, or with --training.steps.",
    ),
    (
        {"model": {"width": None}},
        "run.toml: 'model.width' is missing. Set it in [model], or name a Hugging Face config.json in model.hf_config "
        "(--model.width works too).",
    ),
    (
        {"model": {"preset": None}},
        "run.toml: 'model.preset' is missing. Set it in [model] of a --config file, or with --model.preset.",
    ),
    (
        {"model": {"hf_config": "nowhere"}},
        "nowhere: cannot be read (No such file or directory). model.hf_config wants a file.",
    ),
]


@pytest.mark.parametrize(("sections", "line"), IN_FILE)
def test_what_a_file_can_get_wrong(sections, line):
    assert line_of(base(**sections)) == line


ON_COMMAND_LINE = [
    (["--parallel.tpp", "2"], "command line: unknown key 'parallel.tpp'. Did you mean 'parallel.tp'?"),
    (["--tp", "2"], "command line: unknown key 'tp'. Did you mean 'parallel.tp'?"),
    (
        ["--optimizer.warmup", "2"],
        "command line: unknown key 'optimizer.warmup'. Did you mean 'optimizer.warmup_steps'?",
    ),
    (
        ["--checkpoint.resume", "x"],
        "command line: unknown key 'checkpoint.resume'. Keys of [checkpoint]: "
        "directory, every_steps, every_minutes, keep, optimizer, asynchronous, initial.",
    ),
    (["--training.steps", "fifty"], "command line: 'training.steps' wants int, found 'fifty' (str)."),
    (["--training.steps", "1e3"], "command line: 'training.steps' wants int, found '1e3' (str)."),
    (["--training.steps", "1", "2"], "command line: 'training.steps' wants int, found ['1', '2'] (list)."),
    (["--trainnig"], "command line: unknown key 'trainnig'. Did you mean 'training'?"),
    (["--training.steps"], "command line: --training.steps wants a value: int."),
    (["--optimizer.lr", "nan"], "command line: 'optimizer.lr' wants float, found nan (float)."),
    (["--model.tied", "yes"], "command line: 'model.tied' wants true or false, found 'yes' (str)."),
    (["--parallel.layout", "a"], "command line: 'parallel.layout' wants 'auto' or a list of int, found ['a'] (list)."),
    (["--kernels", "swiglu"], "command line: 'kernels' wants a table, found 'swiglu' (str)."),
    (["--config", "gone.toml"], "gone.toml: cannot be read (No such file or directory). --config wants a file."),
]


@pytest.mark.parametrize(("argv", "line"), ON_COMMAND_LINE)
def test_what_a_command_line_can_get_wrong(argv, line):
    assert line_of(base(), *argv) == line


NO_FILE = [
    ([], "no configuration. Give --config RUN.toml, then --section.key value; --help lists every key."),
    (
        ["run.toml"],
        "command line: unexpected 'run.toml'. Give --config RUN.toml, then --section.key value; "
        "--help lists every key.",
    ),
    (["--config"], "command line: --config wants at least one file."),
]


@pytest.mark.parametrize(("argv", "line"), NO_FILE)
def test_no_file(argv, line):
    with pytest.raises(ConfigError) as caught:
        loader.load_run(argv)
    assert str(caught.value) == line


UNREADABLE = [
    ("bad.toml", b"[model]\npreset = \n", "bad.toml: not valid TOML: Invalid value (at line 2, column 10)."),
    ("bad.toml", b"\xff", "bad.toml: not UTF-8 text (byte 0). --config wants a text file."),
    ("bad.json", b"[1]", "bad.json: wants a table of sections, found list."),
    ("bad.json", b"{", "bad.json: not valid JSON: Expecting property name"),
]


@pytest.mark.parametrize(("name", "content", "start"), UNREADABLE)
def test_files_that_do_not_parse(name, content, start):
    Path(name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        loader.load_run(["--config", name])
    assert str(caught.value).startswith(start)


HUGGING_FACE = [
    ({"model_type": "gpt2"}, "c: model_type='gpt2' is unknown. Model types: qwen2, qwen3, llama, qwen3_moe, mixtral."),
    ({"mlp_bias": True}, "c: mlp_bias=true is not supported. The FFN has no biases."),
    (
        {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": 1},
        "c: 'mlp_only_layers' wants a list of int, found 1.",
    ),
    (
        {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, "norm_topk_prob": "false"},
        "c: 'norm_topk_prob' wants true or false, found 'false'.",
    ),
    ({"hidden_act": "gelu"}, "c: hidden_act='gelu' is not supported. The FFN is SwiGLU: hidden_act must be 'silu'."),
    ({"head_dim": None}, "c: 'head_dim' wants a positive int, found None. Is this the config.json of a qwen3?"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        "c: rope scaling 'yarn' is not supported. Only rope_type 'default' is.",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
        "c: rope scaling 'linear' is not supported. Only rope_type 'default' is.",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e4}},
        "c: rope_theta has 10000.0 and 1000000.0. Give one number above 0, equal in rope_parameters and rope_theta.",
    ),
    (
        {"rope_theta": None},
        "c: rope_theta has no value. Give one number above 0, equal in rope_parameters and rope_theta.",
    ),
    (
        {"rope_theta": -1},
        "c: rope_theta has -1. Give one number above 0, equal in rope_parameters and rope_theta.",
    ),
    ({"rms_norm_eps": "1e-6"}, "c: 'rms_norm_eps' wants a number above 0, found '1e-6'."),
    ({"tie_word_embeddings": 1}, "c: 'tie_word_embeddings' wants true or false, found 1."),
    (
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
        "c: sliding-window attention is not supported. Every layer must use full attention.",
    ),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "c: sliding-window attention is not supported. Every layer must use full attention.",
    ),
]


@pytest.mark.parametrize(("changes", "line"), HUGGING_FACE)
def test_hugging_face_configs_that_are_refused(changes, line):
    with pytest.raises(ConfigError) as caught:
        model_keys({**QWEN3, **changes}, where="c")
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["strict", "loader", "hf_config", "rules", "model_rules", "expert_keys"])
def test_every_error_text_is_in_a_table_above(name):
    of_hf_config = [
        "model.preset='dense' has no routed experts, but model.hf_config='a' describes 6 of them. Use preset moe."
    ]
    tables = (
        IN_FILE,
        RULES,
        OF_EXPERTS,
        ON_RANKS,
        LORA,
        [of_hf_config],
        ON_COMMAND_LINE,
        NO_FILE,
        UNREADABLE,
        HUGGING_FACE,
    )
    lines = [row[-1] for table in tables for row in table]
    tree = ast.parse((ROOT / "unimega" / "config" / f"{name}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "ConfigError"]
    assert calls
    for call in calls:
        parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
        pattern = "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts)
        assert any(re.match(pattern, line) for line in lines), f"no test shows: {ast.unparse(call)}"


def test_an_error_is_one_line_fast_and_without_torch():
    Path("bad.toml").write_text("[parallel]\ntpp = 2\n")
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['pretrain_unix.py', '--config', 'bad.toml']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'examples' / 'pretrain_unix.py')!r}, run_name='__main__')\n"
        "except SystemExit as leave:\n"
        "    print(leave.code, sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    after = os.times()
    assert done.stderr == "unimega: bad.toml: unknown key 'parallel.tpp'. Did you mean 'parallel.tp'?\n"
    assert done.stdout == "2 []\n"
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.0, f"{spent:.2f} s of CPU before an error line"


def test_status_of_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_unix.py"])
    with pytest.raises(SystemExit) as leave:
        runpy.run_path(str(ROOT / "examples" / "pretrain_unix.py"), run_name="__main__")
    assert leave.value.code == 2
