"""What routers did over a run, from ``metrics.jsonl``: loads of experts, entropy, dropped slots."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimega.errors import UnimegaError, optional
from unimega.training.metrics import FILE

FORMATS = (".png", ".svg", ".pdf")
MOST_COLUMNS = 800
"""Records in a picture; of more every n-th is drawn."""
_LOAD, _ENTROPY, _DROPPED = "moe_load_", "moe_entropy_", "moe_dropped_"


@dataclass(frozen=True)
class History:
    """R records of a run with L sparse layers of E experts; NaN where a modality had no tokens."""

    steps: np.ndarray
    """[R]."""
    layers: tuple[int, ...]
    """Numbers of the sparse layers."""
    load: dict[str, np.ndarray]
    """By modality [R, L, E]: slots of an expert over its fair share, 1 if loads are even."""
    entropy: dict[str, np.ndarray]
    """By modality [R, L], nats."""
    dropped: dict[str, np.ndarray]
    """By modality [R, L], of 1."""


def find(place: Path) -> Path:
    """The file of metrics that a path means: itself, in a folder, or in its ``logs``.

    Raises:
        UnimegaError: there is none.
    """
    tried = [place] if place.is_file() else [place / FILE, place / "logs" / FILE]
    for file in tried:
        if file.is_file():
            return file
    if not place.exists():
        raise UnimegaError(f"{place}: no such file or folder. Give {FILE} of a run, or the folder it lies in.")
    raise UnimegaError(f"{place}: holds no {FILE}, nor does its folder 'logs'. Give the run's logging.directory.")


def read(file: Path, *, layers: Sequence[int] = ()) -> History:
    """Read all records that tell of routed experts.

    Args:
        layers: of these alone; empty: all.

    Raises:
        UnimegaError: a line that is no record (a torn last one is left out), none tells of routed experts, or one of
            ``layers`` has none.
    """
    records = [record for record in _records(file) if record.get("moe_layers")]
    if not records:
        raise UnimegaError(f"{file}: no record tells of routed experts. They come of runs with preset moe or unimoe.")
    listed = records[-1]["moe_layers"]
    records = [record for record in records if record["moe_layers"] == listed]  # before a run of another shape
    if not isinstance(listed, list):
        raise UnimegaError(f"{file}: moe_layers={listed!r} is no list of layers. Give a run's {FILE}.")
    found = tuple(listed)
    for layer in layers:
        if layer not in found:
            raise UnimegaError(f"{file}: layer {layer} has no routed experts. Those have: {_listed(found)}.")
    kept = [i for i, layer in enumerate(found) if not layers or layer in layers]
    names = [key.removeprefix(_LOAD) for key in records[-1] if key.startswith(_LOAD) and key != f"{_LOAD}max"]
    if not names:
        raise UnimegaError(f"{file}: no record has {_LOAD}MODALITY, the loads of experts. Give a run's {FILE}.")
    try:
        return History(
            steps=np.array([record["step"] for record in records], dtype=np.int64),
            layers=tuple(found[i] for i in kept),
            load={name: _loads([record[_LOAD + name] for record in records])[:, kept] for name in names},
            entropy={name: _array([record[_ENTROPY + name] for record in records])[:, kept] for name in names},
            dropped={name: _array([record[_DROPPED + name] for record in records])[:, kept] for name in names},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnimegaError(
            f"{file}: records of routed experts do not fit together ({type(error).__name__}: {error}). "
            "Was the file put together from several runs?"
        ) from error


def write_charts(path: Path, history: History, *, title: str) -> None:
    """One column for each modality: loads over steps, entropy and dropped share of each layer.

    Raises:
        UnimegaError: a format that is not known, a file that cannot be written (nothing half-written is left), or
            matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise UnimegaError(f"--output='{path}' is wrong. It ends in none of {', '.join(FORMATS)}.")
    data = _drawn(history, title, path.suffix[1:])
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UnimegaError(f"{path}: cannot be written ({error.strerror}).") from error


def _records(file: Path) -> list[dict[str, Any]]:
    lines = file.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except ValueError as error:
            if number == len(lines):  # a run that is writing, or was killed
                break
            raise UnimegaError(f"{file}:{number}: is no record of metrics ({error}). Give a run's {FILE}.") from error
        found.append(record)
    return found


def _array(rows: list[Any]) -> np.ndarray:
    """Nested lists with None as NaN."""
    return np.array(rows, dtype=np.float64)


def _loads(records: list[list[list[float] | None]]) -> np.ndarray:
    """[R, L, E]; a layer without tokens is None as a whole."""
    experts = next((len(shares) for layers in records for shares in layers if shares is not None), 1)
    return _array([[shares or [None] * experts for shares in layers] for layers in records])


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _drawn(history: History, title: str, kind: str) -> bytes:
    figures = optional("matplotlib.figure", extra="data")
    colors = optional("matplotlib.colors", extra="data")
    every = -(-len(history.steps) // MOST_COLUMNS)
    picked = slice((len(history.steps) - 1) % every, None, every)  # the last one always
    steps, names = history.steps[picked], list(history.load)
    figure = figures.Figure(figsize=(6.5 * len(names), 10), layout="constrained")  # no pyplot: no window, no state
    figure.suptitle(title.replace("$", r"\$"))
    grid = figure.subplots(3, len(names), squeeze=False, height_ratios=(3, 1, 1), sharex=True)
    scale = colors.TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=_top(history))
    for column, name in enumerate(names):
        load = history.load[name][picked]
        image = _draw_loads(grid[0, column], steps, load, history.layers, scale)
        grid[0, column].set_title(f"{name}: load of each expert, 1 is even")
        _draw_lines(
            grid[1, column],
            steps,
            history.entropy[name][picked],
            history.layers,
            "entropy of scores, nats",
            "lower left",
        )
        _draw_lines(
            grid[2, column],
            steps,
            history.dropped[name][picked],
            history.layers,
            "dropped share of slots",
            "upper left",
        )
        grid[2, column].set_xlabel("step")
    figure.colorbar(image, ax=list(grid[0]), label="slots / fair share", extend="max")
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=110)
    return out.getvalue()


def _top(history: History) -> float:
    """Where colours end: above nearly all loads, so that a few do not hide the others."""
    loads = np.concatenate([load.ravel() for load in history.load.values()])
    loads = loads[np.isfinite(loads)]
    return max(2.0, float(np.quantile(loads, 0.99))) if loads.size else 2.0


def _draw_loads(axis: Any, steps: np.ndarray, load: np.ndarray, layers: Sequence[int], scale: Any) -> Any:
    """Experts of the layers one under another, from the first layer on top."""
    experts = load.shape[2]
    half = np.diff(steps, append=steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)) / 2
    edges = np.append(steps - half, steps[-1] + half[-1])
    rows = load.reshape(len(steps), -1).T
    image = axis.pcolorfast(edges, np.arange(len(rows) + 1), np.ma.masked_invalid(rows), cmap="RdBu_r", norm=scale)
    axis.set_ylim(len(rows), 0)
    for border in range(1, len(layers)):
        axis.axhline(border * experts, color="black", linewidth=0.6)
    shown = range(0, len(layers), max(1, len(layers) // 16))
    axis.set_yticks([(i + 0.5) * experts for i in shown], [f"layer {layers[i]}" for i in shown])
    return image


def _draw_lines(
    axis: Any, steps: np.ndarray, values: np.ndarray, layers: Sequence[int], label: str, corner: str
) -> None:
    """One line for each layer, dark to light."""
    for i, layer in enumerate(layers):
        shade = str(round(0.75 * i / max(1, len(layers) - 1), 3))
        named = f"layer {layer}" if i in (0, len(layers) - 1) else None
        axis.plot(steps, values[:, i], color=shade, linewidth=1, label=named, marker="." if len(steps) == 1 else None)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(label)
    axis.legend(loc=corner, fontsize="small")
