"""Scans as pictures: tiny PNGs inside the report page, and the two files that a README shows."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from corpus import CAPTIONS, DIGITS, Scans
from curve import FLOORS, WINDOW, Point, running_means
from matplotlib.figure import Figure
from PIL import Image

ENLARGE = 5


def data_uri(scan: Scans) -> str:
    """A grey scan [8, 8] in 0..1 as a PNG of as many pixels; the page enlarges it without smoothing."""
    buffer = io.BytesIO()
    Image.fromarray((scan * 255).round().astype(np.uint8)).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_grid(rows: Sequence[tuple[str, Scans]], path: Path) -> None:
    """One row of ten scans [10, 8, 8] after the other, each under its name, digits as columns."""
    side = rows[0][1].shape[1] * ENLARGE
    gap = 6
    canvas = np.ones((len(rows) * (side + gap), 10 * (side + gap)))
    for i, (_, scans) in enumerate(rows):
        for j, scan in enumerate(scans):
            top, left = i * (side + gap) + gap // 2, j * (side + gap) + gap // 2
            canvas[top : top + side, left : left + side] = np.kron(scan, np.ones((ENLARGE, ENLARGE)))
    figure = Figure(figsize=(7.2, 5.1), facecolor="white")
    axes = figure.subplots()
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    middles = np.arange(10) * (side + gap) + (side + gap) / 2
    axes.set_xticks(middles, DIGITS, fontsize=9)
    axes.set_yticks(middles[: len(rows)], [name for name, _ in rows], fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})


def caption_rows(count: int) -> list[int]:
    """Which of the captions each of ``count`` rows of drawings was asked with: equal shares, in order."""
    return sorted(i % len(CAPTIONS) for i in range(count))


def draw_curve(
    metrics: Mapping[int, Mapping[str, Any]],
    points: Sequence[Point],
    accuracy: Mapping[int, Mapping[str, float]],
    path: Path,
) -> None:
    """Both losses over the steps with the measured places and what a model without some knowledge gets; accuracies."""
    figure = Figure(figsize=(10, 3.3), facecolor="white", layout="constrained")
    *losses, share = figure.subplots(1, 3)
    steps = sorted(metrics)
    for plot, (key, floors) in zip(losses, FLOORS.items(), strict=True):
        values = [float(metrics[step][key]) for step in steps]
        means = running_means(values)
        plot.plot(steps, values, linewidth=0.5, alpha=0.35)
        plot.plot(steps, means, color="C0", label=f"mean of {WINDOW} steps")
        measured = [getattr(point, key.replace("loss", "measured")) for point in points]
        plot.plot([point.step for point in points], measured, "kx", markersize=5, label="expected")
        for name, level in floors.items():
            plot.axhline(level, linestyle="--", linewidth=0.8, color="grey")
            plot.annotate(name, (steps[-1], level), ha="right", va="bottom", fontsize=7, color="grey")
        plot.set(
            xlabel="step", title=f"{key}, nats", ylim=(0, max(means[min(9, len(means) - 1)], *floors.values()) * 1.1)
        )
        plot.legend(fontsize=7)
    for name, label in (("t2i", "drawn digits judged right"), ("i2t", "captions right")):
        share.plot(list(accuracy), [100 * each[name] for each in accuracy.values()], "o-", markersize=3, label=label)
    share.set(xlabel="step", title="held out, %", ylim=(0, 102), xlim=(0, None))
    share.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=90, metadata={"Software": None})
