"""The end of the demo: every figure into report.json, a page to look at, two pictures for a README."""

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import judge
import numpy as np
from corpus import CAPTIONS, COPIES, DIGITS, Codebook, Numbers, Scans, Split, Tick, warped
from curve import FLOORS, WINDOW, compare, read_evaluations, read_metrics, throughput
from page import Beside, Described, Pictures, page
from pictures import caption_rows, draw_curve, draw_grid
from stages import write_json

import unimega

GATE = 0.9
DRAWN_ROWS, STRIP = 7, 24
PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "scikit-learn", "numpy")
FILES = ("report.html", "report.json", "digits.png", "digits_curve.png")


@dataclass(frozen=True)
class Results:
    """What the stages before left."""

    split: int
    data: Split
    book: Codebook
    sampled: judge.Sampled
    templates: Numbers
    """[N] which caption each drawing was asked with."""
    by_step: Mapping[int, Mapping[str, float]]
    """Accuracies of the checkpoints before the last."""
    run: Mapping[str, Any]
    """What it was: steps, ranks, parameters."""
    metrics: Path
    wall_s: Mapping[str, float]


def write(results: Results, folder: Path, *, tick: Tick = lambda: None) -> dict[str, Any]:
    """Write ``FILES``, the JSON last; returns the figures."""
    start = time.monotonic()
    verdict = judge.judge(results.data, results.book, results.sampled, judge.train_judge(results.data))
    metrics = read_metrics(results.metrics)
    pictures = choose(results, verdict)
    tick()
    rows = [("real", np.stack(pictures.real))]
    rows += [(caption.format("..."), np.stack([scan for scan, _ in ten])) for caption, ten in pictures.drawn]
    draw_grid(rows, folder / "digits.png")
    tick()
    draw_curve(metrics, compare(metrics), accuracy_by_step(results, verdict, max(metrics)), folder / "digits_curve.png")
    tick()
    figures = collect(results, verdict, metrics, seconds=time.monotonic() - start)
    (folder / "report.html").write_text(page(figures, pictures, metrics), encoding="utf-8")
    write_json(folder / "report.json", figures)
    tick()
    return figures


def collect(
    results: Results, verdict: judge.Verdict, metrics: Mapping[int, Mapping[str, Any]], *, seconds: float
) -> dict[str, Any]:
    """All figures of a run; shares are fractions of 1, seconds are wall clock."""
    by_step = accuracy_by_step(results, verdict, max(metrics))
    wall_s = dict(results.wall_s) | {"report": round(seconds, 2)}
    tail = [metrics[step] for step in sorted(metrics)[-WINDOW:]]
    return dict(verdict.figures) | {
        "gate": GATE,
        "passed": min(by_step[max(metrics)].values()) >= GATE,
        "split": results.split,
        **results.run,
        "accuracy_by_step": {str(step): each for step, each in by_step.items()},
        "loss": {key: round(sum(float(record[key]) for record in tail) / len(tail), 4) for key in FLOORS},
        "loss_held_out": {str(step): each for step, each in read_evaluations(results.metrics).items()},
        "curve": [vars(point) for point in compare(metrics)],
        "floors": FLOORS,
        "tokens_per_s": round(throughput(metrics), 1),
        "wall_s": wall_s,
        "wall_s_total": round(sum(wall_s.values()), 1),
        "versions": versions(),
    }


def accuracy_by_step(results: Results, verdict: judge.Verdict, last: int) -> dict[int, dict[str, float]]:
    """Both accuracies of the earlier checkpoints and of the last one."""
    own = {"t2i": verdict.figures["t2i_accuracy"], "i2t": verdict.figures["i2t_accuracy"]}
    return {step: dict(each) for step, each in sorted({**results.by_step, last: own}.items())}


def choose(results: Results, verdict: judge.Verdict) -> Pictures:
    """What the page shows: always the first ones, so that nobody has to wonder."""
    data, sampled = results.data, results.sampled
    truth = data.labels[data.held_out]
    rebuilt = results.book.decode(results.book.encode(data.scans[data.held_out]))
    described = [
        Described(data.scans[scan], rebuilt[i], sampled.said[i], DIGITS[truth[i]], bool(verdict.named[i] == truth[i]))
        for i, scan in enumerate(data.held_out)
    ]
    of_digit = [np.flatnonzero(data.labels[data.held_out] == digit)[0] for digit in range(10)]
    firsts = [int(np.flatnonzero(sampled.labels == digit)[0]) for digit in range(10)]
    warps = [warped(data, results.split, copy)[0] for copy in range(1, COPIES + 1)]
    return Pictures(
        real=[data.scans[data.held_out[i]] for i in of_digit],
        drawn=_rows(results, verdict),
        held_out=described[:STRIP],
        misread=[one for one in described if not one.is_right],
        warps=[data.scans[data.train[0]], *warps],
        beside=[
            Beside(verdict.drawings[i], data.scans[verdict.nearest[i]], float(verdict.distance[i])) for i in firsts
        ],
    )


def _rows(results: Results, verdict: judge.Verdict) -> list[tuple[str, list[tuple[Scans, bool]]]]:
    """The grid of drawings: the n-th row of a caption has each digit's n-th drawing under it."""
    right = verdict.seen_as == results.sampled.labels
    rows, used = [], dict.fromkeys(range(len(CAPTIONS)), 0)
    for caption in caption_rows(DRAWN_ROWS):
        picked = []
        for digit in range(10):
            places = np.flatnonzero((results.sampled.labels == digit) & (results.templates == caption))
            picked.append(int(places[used[caption] % len(places)]))
        used[caption] += 1
        rows.append((CAPTIONS[caption], [(verdict.drawings[i], bool(right[i])) for i in picked]))
    return rows


def versions() -> dict[str, str]:
    """What the figures were made with."""
    found = {"python": platform.python_version(), "unimega": unimega.__version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}
