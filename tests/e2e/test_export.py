"""The folder of an export: bitwise there and back, whole or not there, one line for what cannot be."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import exports, models, oracle
from tests.distributed.faults import seal_again
from tests.distributed.harness import run_dist
from tests.exports import SPECS
from unimega.config.layer import LayerSpec
from unimega.config.schema import ParallelConfig
from unimega.errors import CheckpointError, DataError, run_cli

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tool(*words: str | Path) -> None:
    """``python tools/export_hf.py WORDS`` in this process."""
    found = importlib.util.spec_from_file_location("export_hf", ROOT / "tools" / "export_hf.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    run_cli(module.main, [str(word) for word in words])


# --- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", (*oracle.UNIX, *oracle.DENSE))
def test_an_imported_folder_comes_back(export_folder: Path, out: Path, case: str) -> None:
    """Every tensor bit for bit, what the original never uses too; every field but those that name the code."""
    want, got = oracle.tensors_of(case), load_file(out / case / "model.safetensors")
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
    before, after = config_of(export_folder / "checkpoints" / "hf" / case), config_of(out / case)
    changed = {name for name, value in before.items() if after.get(name) != value}
    names = {"architectures", "model_type", "max_window_layers", "transformers_version"}
    unread = {"num_vision_encode_layers", "num_vision_decode_layers", "skip_connection_loc"}  # by moe and mot
    assert changed <= names | (set() if "_x" in case else unread)
    assert after["rope_theta"] == after["rope_parameters"]["rope_theta"] == 1e6 and after["dtype"] == "float32"
    if case in oracle.UNIX:
        assert after["vision_token_ids"] == [90] and after["model_type"] == "uni_x"
    modes = {path.name: path.stat().st_mode for path in (out / case).iterdir()}
    assert set(modes.values()) == {modes["config.json"]}
    with safe_open(out / case / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def import_again(folder: str) -> dict[str, Any]:
    from unimega.hf.stored import StoredWeights
    from unimega.parallel.step_folder import resolve_step

    specs = {}
    for name in AGAIN:
        again = Path(folder) / "again" / name
        specs[name] = oracle.import_folder(Path(folder) / "out" / name, again).spec
        want, got = (StoredWeights(resolve_step(one)) for one in (Path(folder) / "checkpoints" / name, again))
        assert got.shapes == want.shapes, name
        a, b = want.read([*want.shapes]), got.read([*want.shapes])
        assert all(torch.equal(a[key], b[key]) for key in a), name
    return specs


AGAIN = (
    "dense",
    "dense, no stock one",
    "skip",
    "unix, all split",
    "share, no vision FFN",
    "moe_hard, every layer",
    "mot",
    "mot, original output",
    "qwen3_moe",
    "mixtral",
    "routed, sets",
    "routed, as DeepSeek-V3",
)
"""One of each kind: the rest differs in sizes."""


def test_an_export_is_imported_again(export_folder: Path, out: Path) -> None:
    """The same model, the same weights bit for bit, whatever it was."""
    for name, got in run_dist(import_again, world=1, args=(str(export_folder),))[0].items():
        want = SPECS[name]
        assert exported(replace(got, init_linear=want.init_linear)) == exported(want), name


def exported(spec: Any) -> dict[str, Any]:
    """What an export says of a model: of experts only what is not of training."""
    layers = tuple(replace(one, experts=one.experts.of_inference()) if one.experts else one for one in spec.layers)
    return asdict(replace(spec, layers=layers))


# --- files ---------------------------------------------------------------------------------------------------------


def test_shards_and_dtype(export_folder: Path, out: Path, tmp_path: Path) -> None:
    from unimega.hf.export import export_checkpoint

    source = export_folder / "checkpoints" / "unix_x_tied"
    done = export_checkpoint(source, tmp_path / "out", dtype="bf16", max_shard_bytes=150_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(done.files) and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    parts = [load_file(tmp_path / "out" / file) for file in files]
    assert index["weight_map"] == {name: file for file, part in zip(files, parts, strict=True) for name in part}
    sizes = [sum(one.nbytes for one in part.values()) for part in parts]
    assert index["metadata"]["total_size"] == sum(sizes) == done.bytes and max(sizes) <= 150_000
    whole = load_file(out / "unix_x_tied" / "model.safetensors")
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    assert set(joined) == set(whole) and "lm_head.weight" not in whole
    assert all(torch.equal(joined[name], whole[name].bfloat16()) for name in whole)
    config = config_of(tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert exports.load(tmp_path / "out").dtype == torch.bfloat16


def test_the_bias_of_a_router_is_fp32_in_a_bf16_model(export_folder: Path, out: Path, tmp_path: Path) -> None:
    """By its own type: transformers 4.57 loads no model whose class names a buffer to be kept in fp32."""
    from unimega.hf.export import export_checkpoint

    export_checkpoint(export_folder / "checkpoints" / "routed, as DeepSeek-V3", tmp_path / "out", dtype="bf16")
    model = exports.load(tmp_path / "out")
    gate = model.model.layers[1].mlp.gate
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)
    assert not model._keep_in_fp32_modules_strict


def write_tokenizer(folder: Path) -> Path:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers import models as kinds

    words = [f"w{number}" for number in range(89)]
    tokenizer = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    special = ["<|vision_pad|>", "<|vision_start|>", "<|vision_end|>", "<unconditional>", "<|endoftext|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_the_tokenizer_of_the_run(export_folder: Path, out: Path, tmp_path: Path) -> None:
    """Found through the run's resolved configuration beside the steps; its eos and pad win."""
    from transformers import AutoTokenizer

    from unimega.hf.export import export_checkpoint

    source = shutil.copytree(export_folder / "checkpoints" / "unix_x", tmp_path / "run")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (source / "run.json").write_text(json.dumps({"data": {"tokenizer": str(tokenizer), "train": []}}))
    assert export_checkpoint(source, tmp_path / "out").tokenizer == tokenizer
    ids = {"eos_token_id": 93, "pad_token_id": 94}
    config = config_of(tmp_path / "out")
    assert ids.items() <= config.items()
    assert config["vision_start_id"] == 90 and config["unconditional_token_ids"] == [92]
    assert ids.items() <= json.loads((tmp_path / "out" / "generation_config.json").read_text()).items()
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["model_input_names"] == ["input_ids", "attention_mask"]  # version 4 would add token_type_ids
    assert loaded("<|vision_start|>").input_ids == [90] and loaded.eos_token_id == 93 and loaded.pad_token_id == 94
    with pytest.raises(DataError, match=r"tokenizer=.* is wrong"):
        export_checkpoint(source, tmp_path / "other", tokenizer=tmp_path)
    assert not (tmp_path / "other").exists() and not (tmp_path / ".other.partial").exists()


@pytest.mark.parametrize(("case", "drawn"), [("one modality", {"temperature": 0.6}), ("unix_x", {})])
def test_generation_settings_come_back(out: Path, tmp_path: Path, case: str, drawn: dict[str, float]) -> None:
    """All ends of text; how to draw for a stock model alone."""
    from unimega.hf.export import export_checkpoint

    folder = shutil.copytree(out / case, tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"eos_token_id": 93}))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    settings = {"eos_token_id": [7, 93], "temperature": 0.6, "do_sample": True, "transformers_version": "4.1"}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    oracle.import_folder(folder, tmp_path / "steps")
    export_checkpoint(tmp_path / "steps", tmp_path / "again", tokenizer=tokenizer)
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    written.pop("bos_token_id", None)  # of config.json
    assert written == {"eos_token_id": [7, 93], "pad_token_id": 94} | ({"do_sample": True} | drawn if drawn else {})
    assert config_of(tmp_path / "again")["eos_token_id"] == 93
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json' holds a list, not an object"):
        oracle.import_folder(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_stock_models_know_what_is_never_drawn(out: Path) -> None:
    """Rows behind the codes; their config.json notes which ids are codes."""
    config = config_of(out / "dense, codes, qwen3")
    noted = {"real_text_vocab_size": 24, "vision_vocab_size": 16, "vision_token_ids": [5], "vision_start_id": 5}
    assert noted.items() <= config.items() and "auto_map" not in config
    model = exports.load(out / "dense, codes, qwen3", needs_code=False)
    assert model.generation_config.suppress_tokens == [40, 41, 42]
    assert not (out / "dense, codes, qwen3" / "modeling_unix.py").exists()


# --- whole or not there --------------------------------------------------------------------------------------------


def killed(source: str, target: str, function: str) -> None:
    """An export whose process dies when it calls a function of its module for the second time."""
    from unimega.hf import export

    calls, real = [], getattr(export, function)

    def die(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 or function == "put":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(export, function, die)
    export.export_checkpoint(Path(source), Path(target), max_shard_bytes=400_000)


@pytest.mark.parametrize("function", ["ShardFile", "_write_json", "put"])
def test_killed(export_folder: Path, out: Path, tmp_path: Path, function: str) -> None:
    """Nothing under the name; what is left loads nowhere unless all of it was written, and the next export is whole."""
    from unimega.hf.export import export_checkpoint

    source, target = export_folder / "checkpoints" / "unix_moe", tmp_path / "out"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    process = context.Process(target=killed, args=(str(source), str(target), function))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert (tmp_path / ".out.partial" / "config.json").exists() == (function == "put")
    export_checkpoint(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = [load_file(path / "model.safetensors") for path in (target, out / "unix_moe")]
    assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[1])


def test_failures_leave_nothing(
    export_folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimega.hf import export

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "ShardFile", full)
    with pytest.raises(CheckpointError, match=r"out' cannot be written: .* No space left on device"):
        export.export_checkpoint(export_folder / "checkpoints" / "unix_x", tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_overwrite(export_folder: Path, out: Path, tmp_path: Path) -> None:
    from unimega.hf.export import export_checkpoint

    source, target = export_folder / "checkpoints" / "dense", tmp_path / "out"
    target.mkdir()
    export_checkpoint(source, target)  # an empty folder is fine
    (target / "mine").touch()
    with pytest.raises(CheckpointError, match=r"holds an export already\. .*--overwrite"):
        export_checkpoint(source, target)
    assert (target / "mine").exists()
    with pytest.raises(CheckpointError, match=r"out' holds 'mine', which is no part of an export and would be lost"):
        export_checkpoint(source, target, overwrite=True)
    assert (target / "mine").exists()
    (target / "mine").unlink()
    (target / "unimega.json").write_text("old")
    (tmp_path / "link").symlink_to("out")
    export_checkpoint(source, tmp_path / "link", overwrite=True)  # the folder is replaced, the link stays
    assert (target / "unimega.json").read_text() != "old" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").touch()
    with pytest.raises(CheckpointError, match="exists and is not an export"):
        export_checkpoint(source, tmp_path / "other", overwrite=True)
    (tmp_path / ".third.partial").mkdir()
    (tmp_path / ".third.partial" / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"\.third\.partial' is in the way"):
        export_checkpoint(source, tmp_path / "third")


# --- one line ------------------------------------------------------------------------------------------------------


def damaged(folder: Path, name: str) -> None:
    step = folder / "step-00000000"
    if name == "shard":
        file = next(step.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:1000])
    elif name == "no shard":
        next(step.glob("*.distcp")).unlink()
    elif name == "metadata":
        (step / ".metadata").write_bytes(b"no pickle")
    elif name == "model":
        (step / "model.json").write_text("{")
    elif name == "key":
        model = json.loads((step / "model.json").read_text())
        model["spec"]["qkv_bias"] = True
        (step / "model.json").write_text(json.dumps(model))
        seal_again(step, "model.json")


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("shard", r"step-00000000: damaged .*__0_0.distcp has 1000 bytes, \d+ were written"),
        ("no shard", "step-00000000: damaged .*__0_0.distcp is missing"),
        ("metadata", "step-00000000: damaged .*.metadata has 9 bytes"),
        ("model", "step-00000000: damaged .*model.json has 1 bytes"),
        ("key", "key 'layers.0.attention.qkv.bias_text' .*is missing"),
    ],
)
def test_damaged_checkpoints(export_folder: Path, out: Path, tmp_path: Path, what: str, line: str) -> None:
    from unimega.hf.export import export_checkpoint

    source = shutil.copytree(export_folder / "checkpoints" / "unix_x", tmp_path / "checkpoint")
    damaged(source, what)
    with pytest.raises(CheckpointError, match=line):
        export_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_models_without_an_export() -> None:
    from unimega.hf.export_config import describe

    def said(spec: Any, format: str = "auto") -> str:
        with pytest.raises(CheckpointError) as caught:
            describe(spec, format=format, dtype="float32", stored={}, special=None)
        return str(caught.value)

    assert "has 3 modalities, text, vision, audio" in said(models.PRESETS["three modalities"])
    odd = (LayerSpec(ffn=(24, 24)), LayerSpec(shared_ffn=24), LayerSpec(shared_ffn=24), LayerSpec(ffn=(24, 24)))
    assert "layers.1 of the model is LayerSpec(" in said(models.spec(odd))
    assert "--format='qwen3' cannot hold this model: modalities have weights" in said(SPECS["unix"], "qwen3")
    assert "qkv_bias=true, output_bias=false. Use --format qwen2" in said(SPECS["dense"], "llama")
    assert "--format='gguf' is unknown. Formats: auto, uni_x, unimoe, qwen2, qwen3, llama, qwen3_moe" in said(
        SPECS["dense"], "gguf"
    )

    routed = SPECS["routed, as DeepSeek-V3"]
    assert "--format='qwen3' cannot hold this model: it has routed experts. Use --format mixtral" in said(
        SPECS["mixtral"], "qwen3"
    )
    assert "--format='mixtral' cannot hold this model: it has no routed experts. Use --format qwen3" in said(
        SPECS["one modality"], "mixtral"
    )
    assert "cannot hold this model: sigmoid scores and a scale and groups of experts and a bias of" in said(
        routed, "qwen3_moe"
    )
    assert "--format='unimoe' cannot hold this model: qk_norm=true, " in said(SPECS["qwen3_moe"], "unimoe")
    others = replace(routed.layers[1], experts=replace(routed.layers[1].experts, top_k=1))
    differ = replace(routed, layers=(*routed.layers, others))
    assert "layers.2 of the model is LayerSpec(" in said(differ)
    assert "has 3 modalities, text, vision, audio. One with sets of experts" in said(
        replace(routed, vocabulary=models.THREE)
    )


def test_a_stock_model_as_uni_x(export_folder: Path, out: Path, engine_logits: Any, tmp_path: Path) -> None:
    """For generation by modality; the same numbers."""
    from unimega.hf.export import export_checkpoint

    for name in ("dense", "one modality"):
        export_checkpoint(export_folder / "checkpoints" / name, tmp_path / name, format="uni_x")
        model, inputs = exports.load(tmp_path / name), exports.packed(SPECS[name])
        with torch.no_grad():
            got = model(torch.from_numpy(inputs.ids), attention_mask=torch.from_numpy(inputs.documents)).logits.numpy()
        real = inputs.documents > 0
        assert np.abs(got - engine_logits[name])[real].max() < 3e-5


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: not there. Name a folder of steps"),
        (["checkpoint", "--dtype", "int8"], "--dtype='int8' is unknown. Types: bf16, fp16, fp32."),
        (["checkpoint", "--max-shard-size", "big"], "--max-shard-size='big' is not a size. Write it as 5GB or 800MB."),
        (["checkpoint", "--format", "qwen2"], "--format='qwen2' cannot hold this model"),
    ],
)
def test_one_line_and_status_2(
    export_folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    places = {"checkpoint": export_folder / "checkpoints" / "unix_x", "nowhere": tmp_path / "nowhere"}
    with pytest.raises(SystemExit) as ended:
        tool(*(places.get(word, word) for word in (words[0], tmp_path / "out", *words[1:])))
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.startswith("unimega: ") and errors.count("\n") == 1 and line in errors
    assert not [*tmp_path.iterdir()]


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.split(".")[0] in ("unimega", "megatron") for name in sys.modules)
ids = torch.tensor([[83, 55, 60, 78, 50, 68, 73, 19, 4, 90]])
drawn = model.generate(ids, modality="vision", max_new_tokens=12, do_sample=False, guidance_scale=2.0,
                       negative_prompt_ids=torch.tensor([[3, 5, 90]]), pad_token_id=94)
print(drawn[0, 10:].tolist())
"""


def test_the_command_and_a_fresh_interpreter(export_folder: Path, out: Path, tmp_path: Path) -> None:
    """export_hf.py, then from_pretrained where unimega is not imported, and the original's guided ids."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    target = tmp_path / "a folder"
    said = run("tools/export_hf.py", export_folder / "checkpoints" / "unix_x", target, "--max-shard-size", "0.5MB")
    assert said.startswith("uni_x: 102 tensors, 1.2 MB in 3 file(s); no tokenizer") and "trust_remote_code=True" in said
    want = np.load(oracle.DATA / "unix_x" / "decode.npz")["cfg_generated"].tolist()
    assert run("-c", LOAD, target).strip() == str(want)


# --- checkpoints of real runs --------------------------------------------------------------------------------------


def save_under(folder: str, layouts: dict[str, Any]) -> None:
    """On two ranks: what one rank saved, loaded and saved again under other layouts."""
    from unimega.config.model import ModelSpec
    from unimega.parallel import checkpoint
    from unimega.training.engine import Engine

    torch.set_num_threads(1)
    for name in PARALLEL:
        source = Path(folder) / "checkpoints" / name
        stored = checkpoint.read_model(source)
        for layout, parallel in layouts.items():
            spec = ModelSpec.from_dict(stored["spec"])
            engine = Engine(spec, parallel, optimizer_config=None, initial=str(source))
            engine.save(Path(folder) / layout / name, 7, stored)
            engine.close()


PARALLEL = ("unix_x_tied", "unix", "share")
"""A tied head, which two stages hold; rows that do not divide by tp; FFN copies of several widths."""


def test_a_checkpoint_of_any_layout(export_folder: Path, out: Path) -> None:
    from unimega.hf.export import export_checkpoint

    layouts = {"tp 2": ParallelConfig(tp=2, sequence_parallel=True), "pp 2": ParallelConfig(pp=2)}
    run_dist(save_under, world=2, args=(str(export_folder), layouts))
    for layout in layouts:
        for name in PARALLEL:
            target = export_folder / "of layouts" / layout / name
            export_checkpoint(export_folder / layout / name, target)
            got, want = (load_file(folder / "model.safetensors") for folder in (target, out / name))
            assert set(got) == set(want) and all(torch.equal(got[key], want[key]) for key in want), (layout, name)
            assert config_of(target) == config_of(out / name)
