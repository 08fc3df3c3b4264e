"""The training stage: torchrun with a progress bar. One that was stopped goes on from its last checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus import ROOT
from curve import WINDOW, last_record
from processes import Family
from stages import Started, bar, tell

from unimega.config.loader import load_run
from unimega.errors import UnimegaError

TEMPLATE = Path(__file__).with_name("pretrain.toml")
STEPS = 1500
WARMUP_SHARE = 20  # 75 of 1500 steps
SLOW_SECONDS = 360
GRACE_SECONDS = 60  # for a last checkpoint


@dataclass(frozen=True)
class Run:
    """A training as the command line asks for it."""

    output: Path
    steps: int
    ranks: int
    overrides: tuple[str, ...]

    @property
    def logs(self) -> Path:
        """Metrics and the ranks' log."""
        return self.output / "logs"

    @property
    def metrics(self) -> Path:
        """One line for each step."""
        return self.logs / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder of steps."""
        return self.output / "checkpoints"

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out."""
        return {
            "toml": TEMPLATE.read_text(),
            "steps": self.steps,
            "ranks": self.ranks,
            "overrides": list(self.overrides),
        }

    def arguments(self) -> list[str]:
        """The command line of examples/pretrain_unix.py."""
        arguments = ["--config", str(run_file(self.output)), "--training.steps", str(self.steps)]
        return [*arguments, "--optimizer.warmup_steps", str(max(1, self.steps // WARMUP_SHARE)), *self.overrides]


def run_file(output: Path) -> Path:
    """Write the run's TOML: the template with ``demo/`` replaced by the output folder."""
    target = output / "pretrain.toml"
    folder = json.dumps(str(output), ensure_ascii=False)[1:-1]
    target.write_text(TEMPLATE.read_text().replace('"demo/', f'"{folder}/'))
    return target


def check(run: Run) -> None:
    """Refuse settings that the ranks would refuse, before anything is thrown away."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(run.ranks)  # a launch fact, as torchrun will give it to each rank
    try:
        load_run(run.arguments())
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def train(run: Run, started: Started) -> list[Path]:
    """Train, one process per rank; returns what later stages read."""
    check(run)
    if not (started.again and any(run.checkpoints.glob("step-*"))):
        for folder in (run.logs, run.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
    run.logs.mkdir(parents=True, exist_ok=True)
    if last := last_record(run.metrics):
        tell(f"train    was stopped after step {last['step']} and goes on from its last checkpoint")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks)]
    command += [str(ROOT / "examples" / "pretrain_unix.py"), *run.arguments()]
    log = run.logs / "train.log"
    start = log.stat().st_size if log.exists() else 0
    with log.open("a") as sink:
        # A session of its own: Ctrl-C reaches this program alone, which then asks the ranks for a last checkpoint.
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        family = Family(process, run.output)
        try:
            _watch(run, family, started)
        except BaseException:
            tell("train    stopping: the ranks save a last checkpoint")
            family.stop(GRACE_SECONDS)
            raise
        family.stop()
    if process.returncode:
        why = reason(log.read_text(errors="replace")[start:])
        raise UnimegaError(
            f"the training ended with status {process.returncode}: {why} The whole log: {log}. "
            "The same command goes on from the last checkpoint."
        )
    return [run.metrics, *sorted(path for path in run.checkpoints.rglob("*") if path.is_file())]


def reason(log: str) -> str:
    """The engine's own line, or else what looks most like one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line.removeprefix("unimega: ") for line in lines if line.startswith("unimega: ")]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return (own or errors or lines or ["it wrote nothing."])[0 if own or errors else -1]


def _watch(run: Run, family: Family, started: Started) -> None:
    """Show where the training stands until it ends, and after 50 steps when that will be."""
    first: tuple[int, float] | None = None
    is_told = False
    begin, born = time.monotonic(), time.time()
    with bar("train", run.steps, unit="step") as progress:
        while family.process.poll() is None:
            time.sleep(0.5)
            family.update()
            started.note_seconds()
            last = last_record(run.metrics)
            if last is None or run.metrics.stat().st_mtime < born:
                continue  # of the run that was stopped
            step, now = int(last["step"]), time.monotonic()
            if first is None:
                first = (step, now)
            if step >= first[0] + WINDOW and not is_told:
                is_told = True
                left = (run.steps - step) * (now - first[1]) / (step - first[0])
                tell(projection(now - begin + left, left))
            text, vision = (f"{last[key]:.3f}" for key in ("loss_text", "loss_vision"))
            progress.set_postfix_str(
                f"text {text}, vision {vision}, {last['tokens_per_s']:.0f} tokens/s", refresh=False
            )
            progress.update(step - progress.n)


def projection(total: float, left: float) -> str:
    """When the training will end; what to do about it if that is late."""
    end = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
    line = f"train    about {total:.0f} s in all, ends at {end}"
    if total > SLOW_SECONDS:
        line += ". That is slow: training.steps=1000 takes two thirds of it and costs 1 to 4 points of accuracy"
        line += ' (make demo ARGS="--training.steps 1000")'
    return line
