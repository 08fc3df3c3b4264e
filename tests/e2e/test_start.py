"""Stock Qwen2 and Qwen3 of the installed transformers: imported, started, trained, exported; text keeps its logits."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers import models as kinds

from tests import exports
from tests.distributed.harness import run_dist
from tests.unit import data_corpora
from unimega.config.schema import ParallelConfig
from unimega.errors import run_cli

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
ROWS, USED, CODES, LAYERS = 76, 68, data_corpora.CODEBOOK, 5
"""Of the stock models: rows, ids of the tokenizer, VQ codes to come, layers."""
START = 40
"""<|vision_start|>."""
LOGITS = 3e-5
ENDS = ("--encode-layers", "2", "--decode-layers", "1")
STARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unix": ("qwen2", ("--preset", "unix", *ENDS, "--init-vision", "text")),
    "unix, tied, skip": ("qwen3", ("--preset", "unix", *ENDS, "--init-vision", "text", "--skip-from", "0")),
    "unix, random": ("qwen2", ("--preset", "unix", *ENDS)),
    "share": ("qwen2", ("--preset", "share", *ENDS, "--vision-ffn-width", "20", "--shared-ffn-width", "16")),
    "moe_hard": ("qwen3", ("--preset", "moe_hard", "--split-every", "2", "--init-vision", "text")),
    "mot": ("qwen2", ("--preset", "mot", "--output-projection", "shared", "--init-vision", "text")),
    "dense": ("qwen3", ("--preset", "dense", "--vision-offset", str(USED))),
}
USUAL = ("qwen2", "qwen3", "unix", "unix, tied, skip")
"""What `make test` holds to more than one rank."""
LAYOUTS = {"tp 2": ParallelConfig(tp=2, sequence_parallel=True), "pp 2": ParallelConfig(pp=2)}


def tool(name: str, *words: str | Path) -> None:
    """``python tools/NAME.py WORDS`` in this process."""
    found = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    run_cli(module.main, [str(word) for word in words])


def stock(folder: Path) -> None:
    """A Qwen2 with an untied head and a tied Qwen3, all tensors random."""
    import transformers

    sizes = {"vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 1e4}}
    sizes["rope_parameters"]["rope_type"] = "default"
    for name, kind, more in (
        ("qwen2", transformers.Qwen2ForCausalLM, {"tie_word_embeddings": False}),
        ("qwen3", transformers.Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 20}),
    ):
        model = kind(kind.config_class(**sizes, **more))
        generator = torch.Generator().manual_seed(7)
        for key, values in model.named_parameters():
            values.data.normal_(generator=generator).mul_(0.2).add_(1.0 if "norm" in key else 0.0)
        model.save_pretrained(folder / name)
        tokenizer = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(START)}, unk_token="w0"))
        special = [
            "<|vision_start|>",
            "<|vision_end|>",
            "<|endoftext|>",
            *(f"<|{i}|>" for i in range(USED - START - 3)),
        ]
        tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
        tokenizer.save(str(folder / name / "tokenizer.json"))


def text_ids() -> np.ndarray:
    ids = np.random.default_rng(2).integers(0, USED - 1, (2, 23))
    return ids + (ids >= START)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf/NAME``; ``starts/NAME`` and what import_hf.py printed beside; ``plain/NAME``."""
    place = tmp_path_factory.mktemp("start")
    torch.set_num_threads(1)
    stock(place / "hf")
    for name, (base, words) in STARTS.items():
        tool("import_hf", place / "hf" / base, place / "starts" / name, "--codebook", CODES, *words)
    for base in ("qwen2", "qwen3"):
        tool("import_hf", place / "hf" / base, place / "plain" / base)
    return place


@pytest.fixture(scope="module")
def text_logits(place: Path) -> dict[str, np.ndarray]:
    """What transformers computes, by stock folder."""
    found = {}
    with torch.no_grad():
        for base in ("qwen2", "qwen3"):
            model = exports.load(place / "hf" / base, needs_code=False)
            found[base] = model(torch.from_numpy(text_ids())).logits.numpy()
    return found


def stored(checkpoint: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from unimega.hf.stored import StoredWeights
    from unimega.parallel.step_folder import read_model, resolve_step

    weights = StoredWeights(resolve_step(checkpoint))
    return read_model(checkpoint), weights.read([*weights.shapes])


def engine_logits(
    place: str, layouts: dict[str, ParallelConfig], chosen: tuple[str, ...]
) -> dict[tuple[str, str], np.ndarray]:
    """On a rank: the chosen checkpoints on every layout."""
    from unimega.config.model import ModelSpec
    from unimega.hf.evaluate import outputs
    from unimega.hf.inputs import Inputs
    from unimega.parallel.checkpoint import read_model
    from unimega.training.engine import Engine

    torch.set_num_threads(1)
    ids, found = text_ids(), {}
    inputs = Inputs(ids=ids, documents=np.ones_like(ids), targets=None)
    for layout, parallel in layouts.items():
        for name in chosen:
            path = f"{place}/{'starts' if name in STARTS else 'plain'}/{name}"
            spec = ModelSpec.from_dict(read_model(path)["spec"])
            if spec.skip and parallel.pp > 1:
                continue
            engine = Engine(spec, parallel, optimizer_config=None, initial=path)
            out = outputs(engine, inputs, names=None)
            engine.close()
            found[name, layout] = out["logits"] if out else None
    return found


# --- weights -------------------------------------------------------------------------------------------------------


def check_text(logits: dict[tuple[str, str], np.ndarray], text_logits: dict[str, np.ndarray]) -> None:
    """Plain imports and starts have Qwen's logits."""
    for (name, layout), got in logits.items():
        want = text_logits[STARTS.get(name, (name,))[0]]
        kept = USED if name == "dense" else ROWS
        assert got.shape[-1] == (ROWS if name in text_logits else kept + CODES)
        worst = np.abs(got[..., :kept] - want[..., :kept]).max()
        assert worst < LOGITS, f"{name} on {layout}: off by {worst:.1e}"


def test_text_keeps_its_logits(place: Path, text_logits: Any) -> None:
    """Every preset on one rank, the usual ones with tp 2 and pp 2."""
    everyone = (*text_logits, *STARTS)
    logits = run_dist(engine_logits, world=1, args=(str(place), {"one rank": ParallelConfig()}, everyone))[0]
    logits |= run_dist(engine_logits, world=2, args=(str(place), LAYOUTS, USUAL))[0]
    assert len(logits) == len(everyone) + 2 * len(USUAL) - 1
    check_text(logits, text_logits)


@pytest.mark.slow
def test_text_keeps_its_logits_on_any_layout(place: Path, text_logits: Any) -> None:
    others = tuple(name for name in STARTS if name not in USUAL)
    logits = run_dist(engine_logits, world=2, args=(str(place), LAYOUTS, others))[0]
    assert len(logits) == 2 * len(others) == 10
    check_text(logits, text_logits)


@pytest.mark.parametrize("name", STARTS)
def test_new_rows_are_the_mean_of_those_in_use(place: Path, name: str) -> None:
    """In the head too where it is not tied; rows that stay are what they were, bit for bit."""
    base, _ = STARTS[name]
    _, old = stored(place / "plain" / base)
    _, new = stored(place / "starts" / name)
    kept = USED if name == "dense" else ROWS
    tables = ["embedding.weight"] + ["head.weight"] * (base == "qwen2")
    assert ("head.weight" in new) == (base == "qwen2")
    for key in tables:
        assert new[key].shape == (kept + CODES, 48) and torch.equal(new[key][:kept], old[key][:kept])
        mean = old[key][:USED].double().mean(0).float()
        assert torch.equal(new[key][kept:], mean.expand(CODES, -1)), key


def test_vision_starts_as_text_or_drawn(place: Path) -> None:
    _, old = stored(place / "plain" / "qwen2")
    model, new = stored(place / "starts" / "unix")
    assert model["spec"]["vocabulary"]["ids"] == [[], [START]]
    split = [key for key in new if key.endswith("_vision")]
    assert len(split) == 3 * (2 + 2 + 1 + 3)  # three layers: norms, qkv with bias, output, FFN
    for key in split:
        shared = key.removesuffix("_vision")
        assert torch.equal(new[key], old[shared]) and torch.equal(new[f"{shared}_text"], old[shared]), key
    _, drawn = stored(place / "starts" / "unix, random")
    for key in split:
        assert torch.equal(drawn[key.replace("_vision", "_text")], old[key.removesuffix("_vision")])
        if "norm" in key or ".bias" in key:
            assert torch.equal(drawn[key], torch.full_like(drawn[key], 1.0 if "norm" in key else 0.0))
        else:
            want = 0.02 / (2 * LAYERS) ** 0.5 if ".output." in key or ".down." in key else 0.02
            assert abs(drawn[key].std() / want - 1) < 0.1 and abs(drawn[key].mean()) < want / 10, key
    _, share = stored(place / "starts" / "share")
    assert not share["layers.2.ffn.shared.down.weight"].any() and share["layers.2.ffn.shared.gate.weight"].any()
    assert share["layers.3.ffn.down.weight_vision"].shape == (48, 20)


def test_the_seed_decides(place: Path, tmp_path: Path) -> None:
    base, words = STARTS["unix, random"]
    for name, seed in (("same", 1), ("other", 2)):
        tool("import_hf", place / "hf" / base, tmp_path / name, "--codebook", CODES, *words, "--seed", seed)
    _, want = stored(place / "starts" / "unix, random")
    same, other = (stored(tmp_path / name)[1] for name in ("same", "other"))
    assert all(torch.equal(same[key], want[key]) for key in want)
    key = "layers.0.ffn.gate.weight_vision"
    assert not torch.equal(other[key], want[key]) and torch.equal(other["embedding.weight"], want["embedding.weight"])


def test_types_stay(place: Path, tmp_path: Path) -> None:
    """bf16 folders give bf16 checkpoints, what is drawn included, and the mean is not summed in bf16."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(place / "hf" / "qwen2"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    tool("import_hf", tmp_path / "hf", tmp_path / "out", "--codebook", CODES, *STARTS["unix, random"][1])
    _, got = stored(tmp_path / "out")
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    rows = got["embedding.weight"]
    assert torch.equal(rows[-1], rows[:ROWS].double().mean(0).bfloat16())  # no tokenizer: all rows are in use


# --- what is printed -----------------------------------------------------------------------------------------------


def test_every_tensor_is_accounted_for(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, words = STARTS["share"]
    tool("import_hf", place / "hf" / base, tmp_path / "out", "--codebook", CODES, *words)
    grouped = capsys.readouterr().out
    tool("import_hf", place / "hf" / base, tmp_path / "all", "--codebook", CODES, *words, "--verbose")
    each = capsys.readouterr().out
    _, tensors = stored(tmp_path / "out")
    for key in tensors:
        assert f" {key}\n" in each or f" {key}  (" in each, key
    assert "copied         5 x model.layers.{0-4}.mlp.up_proj.weight -> layers.{0-4}.ffn.up.weight_text\n" in grouped
    assert "copied         3 x model.layers.{0-1,4}.self_attn.{q,k,v}_proj.bias -> layers.{0-1,4}.attention" in grouped
    assert "initialised    2 x layers.{2-3}.ffn.shared.down.weight  (zeros)" in grouped
    assert (
        f"initialised    1 x head.weight  (rows {ROWS} to {ROWS + CODES - 1}: mean of rows 0 to {USED - 1})" in grouped
    )
    assert "normal, deviation 0.02)" in grouped and f"and {START}\n" in grouped
    assert f"{3 + LAYERS * 12} copied, 0 carried, " in grouped
    assert grouped.count("\n") < 45 < each.count("\n")


# --- on the way to a run -------------------------------------------------------------------------------------------


def run(*words: str | Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *map(str, words)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


RUN = """
[data]
train = [{{ path = "{folder}/corpus" }}]
pack_length = 128
overlong = "drop"
templates = "none"
window_tokens = 4096
[training]
steps = 2
global_batch_packs = 2
precision = "fp32"
[optimizer]
lr = 1e-3
[checkpoint]
directory = "{folder}/checkpoints"
[logging]
directory = "{folder}/logs"
every_steps = 1
"""


@pytest.mark.slow  # its parts are tests of their own, and test_digits.py trains and exports
def test_training_then_export(place: Path, tmp_path: Path) -> None:
    """A run takes [model] and weights from the checkpoint; all of it learns; its export has the tokenizer."""
    start, facts = place / "starts" / "unix", data_corpora.facts()
    facts["tokenizer"]["special"]["vision_start"], facts["vocabulary"]["text"] = START, ROWS
    data_corpora.write(tmp_path / "corpus", data_corpora.random_documents(40, 1), **facts)
    table = tomllib.loads((start / "model.toml").read_text())["model"]
    assert table["preset"] == "unix" and table["vision_offset"] == ROWS and table["qkv_bias"] is True
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path))
    configs = ("--config", start / "model.toml", tmp_path / "run.toml")
    run("examples/pretrain_unix.py", *configs, "--checkpoint.initial", start)
    _, trained = stored(tmp_path / "checkpoints")
    _, before = stored(start)
    moved = [key for key in before if not torch.equal(trained[key], before[key])]
    assert len(moved) == len(before) and (trained["embedding.weight"] - before["embedding.weight"]).abs().max() < 0.01
    tool("export_hf", tmp_path / "checkpoints", tmp_path / "out")
    exported = exports.load(tmp_path / "out")
    assert exported.config.model_type == "uni_x" and exported.config.num_vision_encode_layers == 2
    assert (tmp_path / "out" / "tokenizer.json").exists() and exported.config.vision_start_id == START


@pytest.mark.parametrize("base", ["qwen2", "qwen3"])
def test_stock_models_come_back(place: Path, text_logits: Any, tmp_path: Path, base: str) -> None:
    """Bit for bit, as stock models with their tokenizer; the export computes what the folder did."""
    from safetensors.torch import load_file

    tool("export_hf", place / "plain" / base, tmp_path / "out")
    want, got = (load_file(folder / "model.safetensors") for folder in (place / "hf" / base, tmp_path / "out"))
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
    model = exports.load(tmp_path / "out", needs_code=False)
    assert model.config.model_type == base and (tmp_path / "out" / "tokenizer.json").exists()
    with torch.no_grad():
        assert np.array_equal(model(torch.from_numpy(text_ids())).logits.numpy(), text_logits[base])


def killed(folder: str, target: str) -> None:
    """An import whose process dies in the middle of the weights."""
    from unimega.hf.convert import import_folder
    from unimega.hf.folder import read_config
    from unimega.hf.read import describe

    what = describe(read_config(Path(folder)), folder=Path(folder))
    half = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if 2 * done > total else None
    import_folder(Path(folder), Path(target), what=what, progress=half)


def test_killed(place: Path, tmp_path: Path) -> None:
    """Nothing under the name; the next import cleans up and is whole."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    process = context.Process(target=killed, args=(str(place / "hf" / "qwen2"), str(tmp_path / "out")))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    tool("import_hf", place / "hf" / "qwen2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    want, got = (stored(folder)[1] for folder in (place / "plain" / "qwen2", tmp_path / "out"))
    assert set(got) == set(want) and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--preset", "unix", *ENDS], "--codebook is missing. Give the number of VQ codes"),
        (["--preset", "unix", "--codebook", "8"], "--encode-layers is missing. Preset 'unix' needs it."),
        (
            ["--preset", "unix", "--codebook", "8", "--encode-layers", "4", "--decode-layers", "4"],
            "than config.json's num_hidden_",
        ),
        (["--preset", "onyx", "--codebook", "8"], "--preset='onyx' is unknown. Presets: dense, unix"),
        (["--preset", "dense", "--codebook", "8", *ENDS], "--encode-layers=2 is not a key of preset 'dense'"),
        (["--encode-layers", "2"], "--encode-layers is for the start of a model with images. Give --preset too."),
        (["--preset", "dense", "--codebook", "8", "--vision-offset", "60"], "the tokenizer has ids up to 67"),
        (["--preset", "dense", "--codebook", "8", "--vision-ids", "x"], "--vision-ids='x' is not a list of ids."),
        (["--preset", "dense", "--codebook", "8", "--vision-ids", "99"], "--vision-ids: 99 is not a text id."),
        (["--preset", "dense", "--codebook", "8", "--tokenizer", "nowhere"], "--tokenizer='nowhere' holds no"),
        (["--tokenizer", "nowhere"], "--tokenizer='nowhere' holds no tokenizer.json"),
        (["--preset", "unix", *ENDS, "--codebook", "0"], "--codebook=0 leaves nothing to learn"),
        (
            ["--preset", "mot", "--codebook", "8", "--init-vision", "text", "--vision-ffn-width", "8"],
            "--init-vision='text' copies text weights, but vision_ffn_width=8 is not ffn_width=40.",
        ),
        (["--preset", "dense", "--codebook", "many"], "invalid int value: 'many'. --help lists the options."),
    ],
)
def test_mistakes_are_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool("import_hf", place / "hf" / "qwen2", tmp_path / "out", *words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("unimega: ") and said.count("\n") == 1 and line in said
    assert not [*tmp_path.iterdir()]


def test_mistakes_are_answered_before_torch(place: Path) -> None:
    """The time of an answer is that of the imports."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['import_hf.py', {str(place / 'hf' / 'qwen2')!r}, 'out', '--preset', 'unix', '--codebook', '8']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'tools' / 'import_hf.py')!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n    assert ended.code == 2\n"
        f"sys.argv = ['export_hf.py', {str(place / 'nowhere')!r}, 'out']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'tools' / 'export_hf.py')!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n    assert ended.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    run("-c", code)
