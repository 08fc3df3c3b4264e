"""``kill -9`` of one rank, at a random step or in the middle of a save, and the same command again: the same weights.

Runs are started as a user starts them: torchrun, a run file, ``checkpoint.directory`` as it was left.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit.data_corpora import CODEBOOK, TEXT, random_documents, write

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 3
RUN = """
[model]
preset = "unix"
num_layers = 4
encode_layers = 1
decode_layers = 1
width = 64
heads = 4
kv_heads = 2
head_width = 16
ffn_width = 128
vision_offset = {text}
codebook = {codebook}
tied = false
[data]
train = [{{ path = "{corpus}" }}]
pack_length = 128
overlong = "drop"
templates = "none"
window_tokens = 4096
[optimizer]
lr = 1e-2
schedule = "cosine"
warmup_steps = 4
[training]
steps = {steps}
global_batch_packs = 4
evaluate_every_steps = 0
precision = "bf16"
[checkpoint]
directory = "{folder}/checkpoints"
every_steps = {every}
keep = 2
[logging]
directory = "{folder}/logs"
every_steps = 1
[parallel]
"""


class Run:
    """One torchrun of two ranks on a folder, in a session of its own; output goes to a file, as pipes outlive kills."""

    def __init__(self, corpus: str, folder: Path, options: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        file = folder / "run.toml"
        text = RUN.format(text=TEXT, codebook=CODEBOOK, corpus=corpus, folder=folder, steps=STEPS, every=EVERY)
        file.write_text(text)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(ROOT / "examples" / "pretrain_unix.py"), "--config", str(file), *options]
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def ranks(self) -> list[psutil.Process]:
        """The two processes that train, in order."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            for child in psutil.Process(self.process.pid).children():
                if any(argument.endswith("pretrain_unix.py") for argument in child.cmdline()):
                    found[child.environ().get("RANK", "")] = child
        return [found[rank] for rank in sorted(found)] if set(found) == {"0", "1"} else []

    def steps(self) -> int:
        """The last step that was logged."""
        file = self.folder / "logs" / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        with contextlib.suppress(json.JSONDecodeError, IndexError):
            return int(json.loads(lines[-1])["step"])
        return 0

    def is_saving(self) -> bool:
        """Whether a step is being written just now."""
        folder = self.checkpoints
        return folder.is_dir() and any(name.endswith(".tmp") for name in os.listdir(folder))

    def wait(self, timeout: float = 100) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.text()[-3000:]}") from None

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def close(self) -> None:
        """End what is left of this session of processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def interrupt(run: Run, event: str, draw: random.Random) -> None:
    """Wait for the moment that ``event`` names, then act on one rank."""
    first = run.steps()
    target = draw.randint(first + 1, STEPS - EVERY)
    deadline = time.monotonic() + 90
    while run.process.poll() is None and time.monotonic() < deadline:
        ranks = run.ranks() if run.steps() >= min(first + 1, target) else []
        if not ranks:
            time.sleep(0.01)
            continue
        if event == "kill at a step":
            while run.steps() < target:
                time.sleep(0.001)
        elif not caught_saving(run, ranks):
            continue
        victim = draw.choice(ranks)
        victim.send_signal(signal.SIGTERM if event == "end in a save" else signal.SIGKILL)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()
        return
    raise AssertionError(f"{event}: the moment did not come: {run.text()[-3000:]}")


def caught_saving(run: Run, ranks: list[psutil.Process]) -> bool:
    """Stop both ranks while a step has no name yet; False if it was finished meanwhile."""
    while not run.is_saving():
        if run.process.poll() is not None:
            return False
    for rank in ranks:
        rank.suspend()
    if run.is_saving():
        return True
    for rank in ranks:
        rank.resume()
    return False


def tensors(step: Path) -> dict[str, torch.Tensor]:
    """Weights and states of a step; generators have no say in the result."""
    metadata = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    made = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if not key.startswith("optimizer.rng")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(made, storage_reader=dcp.FileSystemReader(step), no_dist=True)
    return made


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("corpus") / "corpus", random_documents(400, seed=3))


@pytest.fixture(scope="module")
def runs() -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        run.close()


KILLS = ["kill at a step", "kill in a save"]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("options", "events", "seed"),
    [
        ([], KILLS, 1),
        pytest.param(["--parallel.pp", "2"], ["kill in a save", "kill at a step"], 2, marks=pytest.mark.slow),
        pytest.param(["--parallel.tp", "2"], ["end in a save", "kill at a step"], 3, marks=pytest.mark.slow),
        pytest.param(["--checkpoint.asynchronous", "True"], [*KILLS, "end in a save"], 4, marks=pytest.mark.slow),
        pytest.param(["--checkpoint.optimizer", "fast"], KILLS, 5, marks=pytest.mark.slow),
    ],
    ids=["dp 2", "pp 2", "tp 2", "asynchronous", "fast"],
)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    options: list[str], events: list[str], seed: int, corpus: str, runs: list[Run], tmp_path: Path
) -> None:
    whole = Run(corpus, tmp_path / "whole", options)
    runs.append(whole)
    assert whole.wait() == 0, whole.text()[-3000:]
    draw = random.Random(seed)
    for event in events:
        run = Run(corpus, tmp_path / "killed", options)
        runs.append(run)
        interrupt(run, event, draw)
        status = run.wait()  # a signal that asks makes all ranks stop and end well
        assert (status == 0) == (event == "end in a save"), run.text()[-3000:]
        run.close()
    run = Run(corpus, tmp_path / "killed", options)
    runs.append(run)
    assert run.wait() == 0, run.text()[-3000:]
    assert "going on after step" in run.text()
    last = f"checkpoints/step-{STEPS:08d}"
    want, got = tensors(whole.folder / last), tensors(run.folder / last)
    assert want.keys() == got.keys() and len(want) > 50
    assert [key for key in want if not torch.equal(want[key], got[key])] == []
    assert losses(run.folder) == losses(whole.folder)
    left = sorted(entry.name for entry in run.checkpoints.iterdir() if entry.name != "run.json")
    assert left == ["latest", f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]
