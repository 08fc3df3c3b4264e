"""The digits demo: scans become a corpus, a small Uni-X trains on them on two ranks, its curve meets the measured one.

    python examples/digits/demo.py [--output DIR] [--split N] [--steps N] [--ranks N] [--section.key value ...]

What is left over on the command line goes to the training, e.g. ``--parallel.tp 2``. Finished stages are kept: delete
OUTPUT to start anew. ``curve.json`` and ``curve.png`` hold what the printed table shows.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
from matplotlib.figure import Figure

from unimega.config.loader import load_run
from unimega.errors import UnimegaError, run_cli

ROOT = corpus.ROOT
TEMPLATE = Path(__file__).with_name("pretrain.toml")
STEPS, WARMUP = 1500, 75
WINDOW = 50  # every figure is a mean of this many steps
SLOW_SECONDS = 360

# step: (loss_vision, loss_text), means of three measured runs of these settings
MEASURED = {
    100: (2.19, 0.686),
    200: (1.71, 0.61),
    300: (1.58, 0.51),
    400: (1.49, 0.43),
    500: (1.40, 0.360),
    750: (1.30, 0.30),
    1000: (1.21, 0.255),
    1250: (1.15, 0.253),
    1500: (1.08, 0.235),
}
VISION_TOLERANCE, TEXT_TOLERANCE, EARLY_TEXT_TOLERANCE = 0.06, 0.04, 0.09  # early: steps 200 to 400

# Losses in nats that a model without some knowledge cannot pass; the text floor is the choice among the captions.
VISION_LEVELS = {"uniform": math.log(32), "each code's frequency": 2.89, "frequency by place and digit": 1.49}
TEXT_FLOOR = 0.206


@dataclass(frozen=True)
class Point:
    """A place of the curve beside the measured one."""

    step: int
    loss_vision: float
    loss_text: float
    measured_vision: float
    measured_text: float
    vision_in_range: bool
    text_in_range: bool


def compare(metrics: Mapping[int, Mapping[str, Any]]) -> list[Point]:
    """The curve at the measured steps that the run has reached: means of the 50 steps up to each."""
    points = []
    for step, (vision, text) in MEASURED.items():
        steps = range(step - WINDOW + 1, step + 1)
        if not all(number in metrics for number in steps):
            continue
        own = [sum(float(metrics[number][key]) for number in steps) / WINDOW for key in ("loss_vision", "loss_text")]
        text_tolerance = EARLY_TEXT_TOLERANCE if 200 <= step <= 400 else TEXT_TOLERANCE
        in_range = abs(own[0] - vision) <= VISION_TOLERANCE, abs(own[1] - text) <= text_tolerance
        points.append(Point(step, own[0], own[1], vision, text, *in_range))
    return points


def read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Records of ``metrics.jsonl`` by step: the last of a step that ran again; a half-written last line is left out."""
    if not path.is_file():
        return {}
    whole = path.read_text().rpartition("\n")[0]
    records = (json.loads(line) for line in whole.splitlines() if line)
    return {int(record["step"]): record for record in records if "loss" in record}


def table(points: Sequence[Point]) -> str:
    """The curve as text, * where it leaves the measured range."""
    if not points:
        return f"The measured curve begins at step {min(MEASURED)}: nothing to compare with."
    lines = ["  step   loss_vision  measured     loss_text  measured"]
    for point in points:
        vision, text = ("  " if inside else " *" for inside in (point.vision_in_range, point.text_in_range))
        lines.append(
            f"{point.step:6d}   {point.loss_vision:9.3f}{vision} {point.measured_vision:8.2f}   "
            f"{point.loss_text:9.3f}{text}  {point.measured_text:8.3f}"
        )
    outside = sum(not (point.vision_in_range and point.text_in_range) for point in points)
    verdict = f"* outside the measured range: {outside}" if outside else "every place lies in the measured range"
    return "\n".join([*lines, f"Means of {WINDOW} steps; {verdict}."])


def run_file(output: Path) -> Path:
    """Write the run's TOML: the template with ``demo/`` replaced by the output folder."""
    target = output / "pretrain.toml"
    folder = json.dumps(str(output), ensure_ascii=False)[1:-1]
    target.write_text(TEMPLATE.read_text().replace('"demo/', f'"{folder}/'))
    return target


def train(output: Path, *, steps: int, ranks: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, one process per rank, with a line of progress; a finished training of equal settings is kept."""
    done, logs = output / "train.json", output / "logs"
    config = run_file(output)
    settings = {"toml": config.read_text(), "steps": steps, "ranks": ranks, "overrides": list(overrides)}
    settings |= {"corpus": json.loads((output / "corpus.json").read_text())["split"]}
    if done.is_file() and (found := json.loads(done.read_text()))["settings"] == settings:
        print(f"train: {steps} steps, kept")
        return dict(found)
    arguments = ["--config", str(config), "--training.steps", str(steps)]
    arguments += ["--optimizer.warmup_steps", str(min(WARMUP, steps)), *overrides]
    _check(arguments, ranks)
    done.unlink(missing_ok=True)
    for folder in (logs, output / "checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)
    logs.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "examples" / "pretrain_unix.py"), *arguments]
    start = time.monotonic()
    log = logs / "train.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            _watch(process, logs / "metrics.jsonl", steps)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise UnimegaError(f"the training ended with status {process.returncode}: {_reason(log)} The whole log: {log}")
    result = {"settings": settings, "wall_s": round(time.monotonic() - start, 1)}
    done.write_text(json.dumps(result, indent=2) + "\n")
    print(f"train: {steps} steps on {ranks} ranks in {result['wall_s']:.0f} s")
    return result


def _check(arguments: Sequence[str], ranks: int) -> None:
    """Refuse settings that the ranks would refuse, before the results of an earlier run are thrown away."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)  # a launch fact, as torchrun will give it to each rank
    try:
        load_run(arguments)
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _reason(log: Path) -> str:
    """The engine's own line, or else what looks most like one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("unimega: ") for line in lines if line.startswith("unimega: ")]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return (own or errors or lines or ["it wrote nothing."])[0 if own or errors else -1]


def _watch(process: "subprocess.Popen[bytes]", path: Path, steps: int) -> None:
    """Print where the training stands: rewritten on a terminal, every 100 steps elsewhere."""
    terminal, shown, first, told = sys.stdout.isatty(), 0, (0, 0.0), False
    while process.poll() is None:
        time.sleep(1)
        metrics = read_metrics(path)
        if not metrics:
            continue
        step, now = max(metrics), time.monotonic()
        if not first[0]:
            first = (step, now)
            continue
        left = (steps - step) * (now - first[1]) / max(1, step - first[0])
        if step >= WINDOW and not told:
            told = True
            total = now - first[1] + left
            hint = f" That is slow: {TEMPLATE.name} with training.steps=1000 takes two thirds (--steps 1000)."
            print(f"train: about {total:.0f} s in all.{hint if total > SLOW_SECONDS else ''}", flush=True)
        if step > shown and (terminal or step // 100 > shown // 100):
            shown, last = step, metrics[step]
            text = f"train: step {step} of {steps}, loss_vision {last['loss_vision']:.3f}, "
            text += f"loss_text {last['loss_text']:.3f}, {last['tokens_per_s']:.0f} tokens/s, {left:.0f} s left"
            print(text, end="\r" if terminal else "\n", flush=True)
    if terminal:
        print()


def draw_curve(metrics: Mapping[int, Mapping[str, Any]], points: Sequence[Point], path: Path) -> None:
    """A picture: both losses over the steps, the measured places, the levels that say what has been learnt."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    steps = sorted(metrics)
    levels = {"loss_vision": VISION_LEVELS, "loss_text": {"choice of the caption": TEXT_FLOOR}}
    for plot, key in zip(axes, levels, strict=True):
        values = [float(metrics[step][key]) for step in steps]
        means = [sum(part) / len(part) for part in (values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values)))]
        plot.plot(steps, values, linewidth=0.5, alpha=0.4)
        plot.plot(steps, means, color="C0", label=f"mean of {WINDOW} steps")
        measured = [getattr(point, key.replace("loss", "measured")) for point in points]
        plot.plot([point.step for point in points], measured, "kx", label="measured")
        for name, level in levels[key].items():
            plot.axhline(level, linestyle="--", linewidth=0.8, color="grey")
            plot.annotate(name, (steps[-1], level), ha="right", va="bottom", fontsize=7, color="grey")
        plot.set(xlabel="step", title=key, ylim=(0, max(means[min(9, len(means) - 1)], *levels[key].values()) * 1.1))
        plot.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Run the stages in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", metavar="DIR")
    parser.add_argument("--split", type=int, default=10, metavar="N", help="seed of the cut into training and held out")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"optimizer steps, {STEPS} in the table")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that train")
    arguments, overrides = parser.parse_known_args(argv)
    output = arguments.output.resolve()

    found = corpus.build(output, split=arguments.split)
    print(f"corpus: split {found['split']}, {sum(found['rows'].values())} rows in {found['seconds']:.0f} s", flush=True)
    trained = train(output, steps=arguments.steps, ranks=arguments.ranks, overrides=overrides)

    metrics = read_metrics(output / "logs" / "metrics.jsonl")
    points = compare(metrics)
    curve = {"split": found["split"], "wall_s": trained["wall_s"], "points": [vars(point) for point in points]}
    (output / "curve.json").write_text(json.dumps(curve, indent=2) + "\n")
    draw_curve(metrics, points, output / "curve.png")
    print(table(points))
    if arguments.steps < STEPS:
        print(f"The measured curve is of {STEPS} steps: a shorter run's learning rate falls earlier.")
    print(f"written: {output / 'curve.json'}, {output / 'curve.png'}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
