"""What a training wrote down, beside the curve that its settings are known to give: a wrong engine leaves it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW = 50  # every figure is a mean of this many steps

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

# Losses in nats that a model without some knowledge cannot pass.
FLOORS: dict[str, dict[str, float]] = {
    "loss_vision": {
        "uniform over 32 codes": math.log(32),
        "each code's frequency": 2.89,
        "frequency by place": 2.09,
        "by place and digit": 1.49,
    },
    "loss_text": {"choice among the captions": 0.206},
}


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
    return {int(record["step"]): record for record in _records(path) if "loss" in record}


def read_evaluations(path: Path) -> dict[int, dict[str, float]]:
    """Held-out losses by step and then by ``corpus/loss``."""
    found: dict[int, dict[str, float]] = {}
    for record in _records(path):
        values = {k.removeprefix("evaluation/"): v for k, v in record.items() if k.startswith("evaluation/")}
        if values:
            found[int(record["step"])] = values
    return found


def last_record(path: Path) -> dict[str, Any] | None:
    """What was logged last: its step is not the highest one while a resumed run does some again."""
    return next((record for record in reversed(_records(path)) if "loss" in record), None)


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line]


def running_means(values: Sequence[float]) -> list[float]:
    """The mean of up to 50 values, up to and with each."""
    parts = (values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def throughput(metrics: Mapping[int, Mapping[str, Any]]) -> float:
    """Tokens per second over all steps, without what lay between them (saves, evaluations, a restart)."""
    inverse = [1 / float(record["tokens_per_s"]) for record in metrics.values()]
    return len(inverse) / sum(inverse) if inverse else 0.0


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
