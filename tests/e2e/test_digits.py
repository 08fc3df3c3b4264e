"""Training on real scans through the commands a user types: torchrun, .bin/.idx, metrics.jsonl, a checkpoint.

The digits recipe has a measured curve (examples/digits/demo.py): an engine that is wrong somewhere leaves it.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits"


def load(name: str) -> ModuleType:
    """A script of examples/digits as a module."""
    if name not in sys.modules:
        sys.path.insert(0, str(DIGITS))
        spec = importlib.util.spec_from_file_location(name, DIGITS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits corpus")
    load("corpus").build(folder, split=10)
    return folder


def run(corpus: Path, logs: Path, *overrides: str, ranks: int = 2, expect: int = 0) -> str:
    """Start a training as torchrun; returns what it wrote to stderr."""
    output = corpus / logs.name
    output.mkdir(parents=True, exist_ok=True)
    config = load("demo").run_file(corpus)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "examples" / "pretrain_unix.py"), "--config", str(config)]
    command += ["--logging.directory", str(logs), "--checkpoint.directory", str(logs / "checkpoints"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr


def metrics(logs: Path) -> dict[int, dict[str, Any]]:
    return load("demo").read_metrics(logs / "metrics.jsonl")


def assert_in_range(logs: Path, last: int) -> None:
    points = load("demo").compare(metrics(logs))
    assert [point.step for point in points] == [step for step in load("demo").MEASURED if step <= last]
    outside = [point for point in points if not (point.vision_in_range and point.text_in_range)]
    assert not outside


def test_the_first_100_steps_follow_the_measured_curve(corpus: Path, tmp_path: Path) -> None:
    """The rate of the 1500-step schedule has barely fallen by step 100: a constant one stands for it."""
    run(corpus, tmp_path, "--training.steps", "100", "--optimizer.schedule", "constant")
    assert_in_range(tmp_path, 100)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100"
    last = metrics(tmp_path)[100]
    assert last.keys() >= {"step", "loss", "loss_text", "loss_vision", "grad_norm", "lr", "tokens_per_s", "mfu"}


def test_two_ranks_overfit_64_documents(corpus: Path, tmp_path: Path) -> None:
    """64 held pairs from .bin/.idx, two data-parallel ranks, the distributed optimizer: learnt by heart."""
    rows = (corpus / "digits.jsonl").read_text().splitlines()[:64]
    (tmp_path / "few.jsonl").write_text("\n".join(rows) + "\n")
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(tmp_path / "few.jsonl")]
    command += ["--output", str(tmp_path / "few"), "--tokenizer", str(corpus / "tokenizer"), "--codebook", "32"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    source = json.dumps([{"path": str(tmp_path / "few"), "direction": "t2i"}])
    run(
        corpus,
        tmp_path / "logs",
        *("--data.train", source, "--data.evaluation", "[]", "--data.unconditional_ratio", "0"),
        *("--training.steps", "150", "--optimizer.weight_decay", "0", "--data.window_tokens", "4096"),
    )
    found = metrics(tmp_path / "logs")
    first, last = found[1]["loss_vision"], found[150]["loss_vision"]
    assert first > 3.4  # uniform over the codes is 3.47
    assert last < 0.75, "64 drawings of the same few digits were not learnt by heart"


def test_a_checkpoint_starts_another_run_on_another_layout(corpus: Path, tmp_path: Path) -> None:
    """Trained on dp 2, continued on tp 2 + sp: the loss goes on where it stood."""
    few = ("--training.steps", "30", "--data.evaluation", "[]", "--optimizer.warmup_steps", "10")
    run(corpus, tmp_path / "a", *few)
    start = ("--checkpoint.initial", str(tmp_path / "a" / "checkpoints"), "--optimizer.warmup_steps", "0")
    run(corpus, tmp_path / "b", *few, *start, "--parallel.tp", "2", "--parallel.sequence_parallel", "true")
    before, after = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert after[1]["loss"] < before[1]["loss"] / 2
    refused = run(corpus, tmp_path / "a", *few, expect=1)
    assert refused.count("unimega: checkpoint.directory=") == 1


def test_an_error_in_the_middle_is_one_line(corpus: Path, tmp_path: Path) -> None:
    """Also a modality of weight 0, and vision ids from the tokenizer."""
    few = ("--training.steps", "20", "--training.evaluate_every_steps", "0", "--model.vision_ids", "none")
    few += ("--training.loss_weights", '{"text": 0}', "--optimizer.warmup_steps", "0", "--optimizer.min_lr", "0")
    told = run(corpus, tmp_path, *few, "--optimizer.lr", "1e30", expect=1)
    assert told.count("unimega: step ") == 1 and "Lower optimizer.lr." in told
    assert metrics(tmp_path)[1]["loss_text"] is None and metrics(tmp_path)[1]["loss_vision"] > 3
    stored = json.loads((tmp_path / "checkpoints" / "run.json").read_text())
    assert stored["model"]["vision_ids"] == [21]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["dp 2", "tp 2"])
def test_the_whole_run_follows_the_measured_curve(layout: str, corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, *(("--parallel.tp", "2") if layout == "tp 2" else ()))
    assert_in_range(tmp_path, 1500)
