"""Histograms of a corpus as one picture or one page."""

import base64
import html
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from unimega.data.scan import MODALITIES
from unimega.data.statistics import Lengths, Statistics
from unimega.errors import DataError, optional

FORMATS = (".png", ".svg", ".pdf", ".html")
_BINS = 60
_MOST_SOURCES = 15


def write_charts(path: Path, statistics: Statistics, *, title: str) -> None:
    """Lengths of documents and sequences, and the shares of kinds and sources; HTML holds the picture in itself.

    Raises:
        DataError: a format that is not known, or a file that cannot be written; nothing half-written is left.
        UnimegaError: matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise DataError(f"--output='{path}' is wrong. It ends in none of {', '.join(FORMATS)}.")
    kind = path.suffix[1:]
    data = _drawn(statistics, title, "png" if kind == "html" else kind)
    if kind == "html":
        name, picture = html.escape(title), base64.b64encode(data).decode()
        page = f"<!doctype html><meta charset=utf-8><title>{name}</title><img alt='{name}' src='data:image/png;base64,"
        data = (page + picture + "'>\n").encode()
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error


def _drawn(statistics: Statistics, title: str, kind: str) -> bytes:
    figures = optional("matplotlib.figure", extra="data")
    figure = figures.Figure(figsize=(12, 8), layout="constrained")  # no pyplot: no window, no global state
    figure.suptitle(_plain(title))
    axes = figure.subplots(2, 2)
    _histogram(axes[0, 0], "tokens of a document", {"documents": statistics.documents})
    named = dict(zip(MODALITIES, statistics.sequences, strict=True))
    _histogram(axes[0, 1], "tokens of a sequence", {name: value for name, value in named.items() if value.number})
    _bars(axes[1, 0], "tokens by kind of document", statistics.kinds)
    _bars(axes[1, 1], "tokens by source", statistics.sources)
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=110)
    return out.getvalue()


def _histogram(axis: Any, label: str, series: dict[str, Lengths]) -> None:
    """Counts in bins of equal ratio: lengths run over orders of magnitude."""
    top = max((int(lengths.values[-1]) for lengths in series.values() if len(lengths.values)), default=1)
    edges = np.unique(np.rint(np.geomspace(1, top + 1, _BINS + 1)).astype(np.int64))
    for name, lengths in series.items():
        counts, _ = np.histogram(np.maximum(lengths.values, 1), bins=edges, weights=lengths.counts)
        axis.stairs(counts, edges, fill=True, alpha=0.6, label=f"{name} ({lengths.number:,})")
    axis.set(xscale="log", xlabel=label, ylabel="how many")
    axis.legend()


def _bars(axis: Any, label: str, shares: Any) -> None:
    """Stacked by modality, the largest on top."""
    ordered = sorted(shares.items(), key=lambda item: -sum(item[1].tokens))[:_MOST_SOURCES]
    names = [_plain(name if len(name) <= 40 else "..." + name[-37:]) for name, _ in ordered]
    left = np.zeros(len(ordered))
    for number, modality in enumerate(MODALITIES):
        values = np.asarray([share.tokens[number] for _, share in ordered], dtype=np.float64)
        axis.barh(range(len(names)), values, left=left, label=modality)
        left += values
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=label + (f", the largest {_MOST_SOURCES} of {len(shares)}" if len(shares) > _MOST_SOURCES else ""))
    axis.legend()


def _plain(text: str) -> str:
    """A name as it is: between dollar signs matplotlib would read a formula, and may refuse it."""
    return text.replace("$", r"\$")
