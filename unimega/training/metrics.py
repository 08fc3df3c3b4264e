"""What a run says of itself: one JSON line per record in ``metrics.jsonl``, and the clock behind its rates."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class Metrics:
    """Appends records to a folder that exists; on ranks that do not write (``directory`` None) it does nothing."""

    def __init__(self, directory: str | None) -> None:
        self._file = None
        if directory is not None:
            self._file = (Path(directory) / FILE).open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One line, flushed, so that a killed run keeps what it logged; NaN and infinity become null."""
        if self._file is not None:
            clean = {key: None if isinstance(v, float) and v - v != 0 else v for key, v in record.items()}
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Clock:
    """Seconds of a step, without what the loop does between steps.

    Args:
        now: seconds that only grow.
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._step = now, 0
        self._started = self._last = now()

    def lap(self, step: int) -> float:
        """Mean seconds of the steps since the last lap, up to and with number ``step`` (the first is 1)."""
        now = self._now()
        seconds = (now - self._last) / (step - self._step)
        self._last, self._step = now, step
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile belongs to no step."""
        start = self._now()
        yield
        self._last += self._now() - start

    def left(self, step: int, steps: int) -> float:
        """Seconds until the end, pauses included in proportion."""
        return (self._now() - self._started) / step * (steps - step)
