"""Signals and a rank that hangs, through torchrun and alone, as a user meets them: what is said, saved and returned."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed import runs
from tests.unit import config_cases
from unimega.config import loader

ROOT = Path(__file__).resolve().parents[2]
SLOWER = min(8, max(1, round(os.getloadavg()[0] / (os.cpu_count() or 1))))
"""A machine that others use too takes so many times longer to answer; a step that is slow is no rank that hangs."""
pytestmark = pytest.mark.timeout(180 * SLOWER)
LONG: dict[str, Any] = {"training": {"steps": 100000, "evaluate_every_steps": 0}}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "60"]


@contextmanager
def started(folder: Path, launcher: list[str], **sections: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A run that has made a few steps; whatever is left of it is killed at the end."""
    config = runs.make(folder, **config_cases.strict.merge(LONG, sections))
    (folder / "run.json").write_text(json.dumps(loader.dump(config)))
    command = [sys.executable, *launcher, str(ROOT / "examples" / "pretrain_unix.py"), "--config"]
    output = (folder / "output.txt").open("w")
    process = subprocess.Popen(
        [*command, str(folder / "run.json")],
        stdout=output,
        stderr=output,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        metrics = folder / "logs" / "metrics.jsonl"
        deadline = time.monotonic() + 90 * SLOWER
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline, text(folder)
            time.sleep(0.05)
        yield process  # type: ignore[misc]
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()
        output.close()


def text(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, in order."""
    found = {}
    for child in psutil.Process(process.pid).children():
        if any(argument.endswith("pretrain_unix.py") for argument in child.cmdline()):
            found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def test_a_scheduler_signals_everybody_at_once_and_twice(tmp_path: Path) -> None:
    """As Slurm does before the time is up: SIGUSR1 to every process of the job, and again while it saves."""
    with started(tmp_path, TORCHRUN, checkpoint={"optimizer": "fast", "asynchronous": True}) as process:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                child.send_signal(number)
        assert process.wait(60 * SLOWER) != 0, "torchrun's own status after a signal"
        last = recorded_steps(tmp_path)[-1]
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step-{last:08d}"
    assert f"step {last}  SIGUSR1: stopped; the same command goes on from here" in text(tmp_path)
    assert "exitcode" not in text(tmp_path), "a rank ended with something else than 0"


def recorded_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "stopped", [1, pytest.param(0, marks=pytest.mark.slow)]
)  # rank 1 leaves the word to 0 for 10 s
def test_a_rank_that_is_stopped_is_named_by_the_others(stopped: int, tmp_path: Path) -> None:
    seconds = 5 * SLOWER
    with started(tmp_path, TORCHRUN, parallel={"timeout_minutes": seconds / 60}) as process:
        victim = ranks(process)[stopped]
        victim.suspend()
        line = told(process, tmp_path)
        victim.kill()
        assert process.wait(60 * SLOWER) == 1
    assert line.startswith(f"unimega: rank {1 - stopped} waited {seconds} s (parallel.timeout_minutes) for ")
    assert f". rank {stopped} does not answer: last seen in " in line


def test_a_rank_that_is_killed_is_told_of(tmp_path: Path) -> None:
    with started(tmp_path, TORCHRUN) as process:
        ranks(process)[1].kill()
        assert told(process, tmp_path).startswith("unimega: rank 0 lost the connection to another rank in ")
        assert process.wait(60 * SLOWER) == 1


def told(process: subprocess.Popen[str], folder: Path) -> str:
    """The one line that a run ends with, once it is there."""
    deadline = time.monotonic() + 60 + 60 * SLOWER
    while not (lines := [line for line in text(folder).splitlines() if line.startswith("unimega: ")]):
        assert process.poll() is None and time.monotonic() < deadline, text(folder)
        time.sleep(0.1)
    (line,) = lines
    assert "Traceback (most recent call last)" not in text(folder).split(line)[0]
    return line


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    with started(tmp_path, []) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(60 * SLOWER) == 130
    *_, last = text(tmp_path).splitlines()
    assert last.startswith("unimega: interrupted at step ") and last.endswith("goes on from the last checkpoint.")
    assert "Traceback" not in text(tmp_path)
