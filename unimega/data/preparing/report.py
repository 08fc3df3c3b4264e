"""What a user sees of a job: a line of progress, and a table at the end."""

import time
from collections.abc import Mapping
from typing import Any, TextIO

from unimega.data.preparing.job import Job
from unimega.data.preprocess import Progress

_COLUMNS = ("source", "rows", "documents", "text tokens", "vision tokens", "bad", "MB")


class ProgressLine:
    """Writes how far a job is: one line that is rewritten on a terminal, lines of their own elsewhere."""

    def __init__(self, out: TextIO, *, seconds: float | None = None) -> None:
        """Write to ``out`` every ``seconds``: 1 on a terminal and 10 elsewhere if None."""
        self._out, self._terminal = out, out.isatty()
        self._apart = seconds if seconds is not None else 1.0 if self._terminal else 10.0
        self._told = time.monotonic()
        self._last: Progress | None = None
        self._width = 0

    @property
    def seconds(self) -> float:
        """How long the job has run."""
        return self._last.seconds if self._last else 0.0

    def __call__(self, progress: Progress) -> None:
        """Take the state of a job."""
        self._last = progress
        now = time.monotonic()
        if now - self._told >= self._apart:
            self._told = now
            self._write(progress)

    def close(self) -> None:
        """Write the last state."""
        if self._last is not None:
            self._write(self._last)
            if self._terminal:
                self._out.write("\n")
            self._out.flush()

    def _write(self, progress: Progress) -> None:
        line = describe(progress)
        padded = line.ljust(self._width)
        self._width = len(line)
        self._out.write(f"\r{padded}" if self._terminal else f"{line}\n")
        self._out.flush()


def describe(progress: Progress) -> str:
    """One line: how far, how fast, how long still."""
    seconds = max(progress.seconds, 1e-9)
    read = progress.done_bytes - progress.kept_bytes
    left = progress.total_bytes - progress.done_bytes
    share = 100 * progress.done_bytes / max(1, progress.total_bytes)
    still: str = progress.phase
    if progress.phase == "reading":
        still = f"ETA {_duration(left * seconds / read)}" if read else "ETA -"
    kept = f", {progress.kept_bytes / 1e6:.1f} MB kept" if progress.kept_bytes else ""
    return (
        f"{progress.done_bytes / 1e6:.1f} of {progress.total_bytes / 1e6:.1f} MB ({share:.0f} %{kept}), "
        f"{read / 1e6 / seconds:.1f} MB/s, {progress.rows} rows ({progress.rows / seconds:.0f}/s), "
        f"{progress.tokens} tokens ({progress.tokens / seconds:.0f}/s), {progress.bad} bad, {still}"
    )


def table(job: Job, sidecar: Mapping[str, Any], *, seconds: float) -> str:
    """The summary: one line per source, a total, and what was written."""
    rows: dict[str, list[float]] = {}
    for one in sidecar["sources"]:
        sums = rows.setdefault(one["name"], [0] * (len(_COLUMNS) - 1))
        bad = sum(one["quarantined"].values())
        values = (
            one["rows"],
            one["documents"],
            one["tokens"]["text"],
            one["tokens"]["vision"],
            bad,
            one["bytes"] / 1e6,
        )
        for number, value in enumerate(values):
            sums[number] += value
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [_COLUMNS, *(_cells(job, name, sums) for name, sums in rows.items())]
    if len(rows) > 1:
        lines.append(_cells(job, "total", total))
    widths = [max(len(line[number]) for line in lines) for number in range(len(_COLUMNS))]
    shown = [
        "  ".join(cell.ljust(width) if not number else cell.rjust(width) for number, (cell, width) in enumerate(line))
        for line in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rate = f"{total[-1]:.1f} MB in {seconds:.1f} s, {total[-1] / max(seconds, 1e-9):.1f} MB/s"
    return "\n".join([*shown, *_reasons(job, sidecar), _written(job, sidecar, rate)])


def _cells(job: Job, name: str, sums: list[float]) -> tuple[str, ...]:
    cells = [name, *(f"{value:.0f}" for value in sums[:-1]), f"{sums[-1]:.1f}"]
    if job.validate:  # texts are not tokenised then
        cells[_COLUMNS.index("text tokens")] = "-"
    return tuple(cells)


def _reasons(job: Job, sidecar: Mapping[str, Any]) -> list[str]:
    counts: dict[str, int] = {}
    for one in sidecar["sources"]:
        for reason, count in one["quarantined"].items():
            counts[reason] = counts.get(reason, 0) + count
    if not counts:
        return []
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda one: -one[1]))
    return [f"bad rows: {told}; see {job.output}.quarantine.jsonl"]


def _written(job: Job, sidecar: Mapping[str, Any], rate: str) -> str:
    if job.validate:
        return f"validated, no corpus written; {rate}"
    counts = sidecar["counts"]
    size = sidecar["bin"]["bytes"] + sidecar["idx"]["bytes"]
    tokens = counts["tokens"]
    return (
        f"{job.output}: {counts['documents']} documents, {counts['images']} images, {tokens['text']} text and "
        f"{tokens['vision']} vision tokens, longest document {counts['longest_document']}, {size} bytes; {rate}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
