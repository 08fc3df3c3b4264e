"""Training on real scans through the commands a user types: torchrun, .bin/.idx, metrics.jsonl, a checkpoint.

The digits recipe has a measured curve (examples/digits/curve.py): an engine that is wrong somewhere leaves it.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.examples import DIGITS, example

ROOT = Path(__file__).resolve().parents[2]
curve = example("curve")
pytestmark = pytest.mark.timeout(600)  # 50 s on two free cores: a demo that is killed and started again


def start_demo(output: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(DIGITS / "demo.py"), "--output", str(output), "--split", "30", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


# The rate of the 1500-step schedule has barely fallen by step 100: a constant one stands for it.
SHORT = ("--training.steps", "100", "--optimizer.schedule", "constant", "--optimizer.warmup_steps", "75")
SHORT += ("--checkpoint.every_steps", "20")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A demo of 100 steps that was killed in its training and started again: its folder, stdout and stderr."""
    output = tmp_path_factory.mktemp("a folder") / "demo"
    first = start_demo(output, *SHORT)
    try:
        deadline = time.monotonic() + 200
        while not any((output / "checkpoints").glob("step-*/manifest.json")):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()
            time.sleep(0.1)
    finally:
        first.kill()  # torchrun and its ranks have sessions of their own and go on
        first.communicate()
    assert len(json.loads((output / "stages" / "processes.json").read_text())) >= 3
    second = start_demo(output, *SHORT)
    told = second.communicate(timeout=400)
    assert second.returncode == 1, told  # 100 steps do not reach 90 %
    return output, *told


@pytest.fixture(scope="module")
def corpus(finished: tuple[Path, str, str]) -> Path:
    return finished[0]


def run(corpus: Path, logs: Path, *overrides: str, ranks: int = 2, expect: int = 0, toml: str = "") -> str:
    """Start a training as torchrun, of the demo or of the ``toml``; returns what it wrote to stderr."""
    output = logs / "run"
    output.mkdir(parents=True, exist_ok=True)
    config = output / "pretrain.toml"
    config.write_text(toml or (corpus / "pretrain.toml").read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "examples" / "pretrain_unix.py"), "--config", str(config)]
    command += ["--logging.directory", str(logs), "--checkpoint.directory", str(logs / "checkpoints"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr


def metrics(logs: Path) -> dict[int, dict[str, Any]]:
    return curve.read_metrics(logs / "metrics.jsonl")


def assert_in_range(logs: Path, last: int) -> None:
    points = curve.compare(metrics(logs))
    assert [point.step for point in points] == [step for step in curve.MEASURED if step <= last]
    outside = [point for point in points if not (point.vision_in_range and point.text_in_range)]
    assert not outside


def test_a_killed_demo_goes_on_where_it_was(finished: tuple[Path, str, str]) -> None:
    output, stdout, _ = finished
    lines = {line.split()[0]: line for line in stdout.splitlines() if line.strip()}
    assert "corpus   kept" in lines["corpus"]
    assert "goes on from its last checkpoint" in stdout
    log = (output / "logs" / "train.log").read_text()
    assert log.count("step 1/100 ") == 1, "the second training began at step 1"
    assert not (output / "stages" / "processes.json").exists()


def test_the_first_100_steps_follow_the_measured_curve(finished: tuple[Path, str, str]) -> None:
    output, stdout, _ = finished
    assert_in_range(output / "logs", 100)
    assert "every place lies in the measured range" in stdout
    assert (output / "checkpoints" / "latest").read_text().strip() == "step-00000100"
    last = metrics(output / "logs")[100]
    assert last.keys() >= {"step", "loss", "loss_text", "loss_vision", "grad_norm", "lr", "tokens_per_s", "mfu"}


def test_the_report_of_a_short_run(finished: tuple[Path, str, str]) -> None:
    output, _, stderr = finished
    assert stderr.splitlines()[-1].startswith("unimega: text to image ") and "below 90 %" in stderr
    for stage in ("train", "export", "draw", "caption", "history", "report"):
        assert f"{stage:8}:" in stderr  # its bar
    figures = json.loads((output / "report.json").read_text())
    for key in ("t2i_accuracy", "i2t_accuracy", "judge_accuracy", "exact_copy_share"):
        assert 0 <= figures[key] <= 1
    assert figures["judge_accuracy"] > 0.97 and not figures["passed"]
    assert figures["t2i_accuracy"] < 0.9 and figures["i2t_accuracy"] < 0.9
    assert set(figures["wall_s"]) == {"corpus", "train", "export", "draw", "caption", "history", "report"}
    assert (figures["split"], figures["steps"], figures["ranks"]) == (30, 100, 2)
    assert (output / "report.html").read_text().startswith("<!doctype html>")


def test_a_second_demo_keeps_every_stage(finished: tuple[Path, str, str]) -> None:
    output, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    third = start_demo(output, *SHORT)
    stdout, _ = third.communicate(timeout=400)
    assert third.returncode == 1 and stdout.count(" kept, made in ") == 7
    changed = [path.name for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert set(changed) <= {"pretrain.toml"}


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_starts_another_run_on_another_layout(corpus: Path, tmp_path: Path) -> None:
    """Trained on dp 2, continued on tp 2 + sp: the loss goes on where it stood."""
    few = ("--training.steps", "30", "--data.evaluation", "[]", "--optimizer.warmup_steps", "10")
    run(corpus, tmp_path / "a", *few)
    start = ("--checkpoint.initial", str(tmp_path / "a" / "checkpoints"), "--optimizer.warmup_steps", "0")
    run(corpus, tmp_path / "b", *few, *start, "--parallel.tp", "2", "--parallel.sequence_parallel", "true")
    before, after = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert after[1]["loss"] < before[1]["loss"] / 2


def test_an_error_in_the_middle_is_one_line(corpus: Path, tmp_path: Path) -> None:
    """Also a modality of weight 0, and vision ids from the tokenizer."""
    few = ("--training.steps", "20", "--training.evaluate_every_steps", "0", "--model.vision_ids", "none")
    few += ("--training.loss_weights", '{"text": 0}', "--optimizer.warmup_steps", "0", "--optimizer.min_lr", "0")
    told = run(corpus, tmp_path, *few, "--optimizer.lr", "1e30", expect=1)
    assert told.count("unimega: step ") == 1 and "Lower optimizer.lr, or look at these documents" in told
    assert metrics(tmp_path)[1]["loss_text"] is None and metrics(tmp_path)[1]["loss_vision"] > 3
    stored = json.loads((tmp_path / "checkpoints" / "run.json").read_text())
    assert stored["model"]["vision_ids"] == [21]


def test_routed_experts_shared_by_two_ranks(corpus: Path, tmp_path: Path) -> None:
    """The run file of examples/moe: the loss falls, the records tell of every sparse layer, the picture is drawn."""
    toml = (ROOT / "examples" / "moe" / "digits.toml").read_text().replace('"demo/', f'"{corpus}/')
    few = ("--training.steps", "24", "--optimizer.warmup_steps", "8", "--optimizer.schedule", "constant")
    run(corpus, tmp_path, *few, "--training.evaluate_every_steps", "0", "--logging.every_steps", "2", toml=toml)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records]
    assert len(losses) == 12 and losses[0] > 3.5 and max(losses[-3:]) < 2
    for record in records:
        assert record["moe_layers"] == [1, 2, 3] and record["moe_dropped"] == 0
        for name in ("text", "vision"):
            for loads, entropy in zip(record[f"moe_load_{name}"], record[f"moe_entropy_{name}"], strict=True):
                assert len(loads) == 8 and sum(loads) == pytest.approx(8, abs=0.01) and 1 < entropy < math.log(8)
    plot = [sys.executable, str(ROOT / "tools" / "plot_experts.py"), str(tmp_path)]
    done = subprocess.run(plot, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "3 layers, 12 records of steps 2 to 24" in done.stdout, done.stderr
    assert (tmp_path / "experts.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["dp 2", "tp 2"])
def test_the_whole_run_follows_the_measured_curve(layout: str, corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, *(("--parallel.tp", "2") if layout == "tp 2" else ()))
    assert_in_range(tmp_path, 1500)
