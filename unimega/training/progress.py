"""How far a run is: the clock behind rates and remaining time, and the line that shows them."""

import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unimega import log

FIRST_LINES, LINES = 3, 100
"""A log file gets a line for each of the first steps and then so many over the whole run."""
BAR = 24

logger = log.get(__name__)


class Clock:
    """Seconds of a step, without what the loop does between steps.

    Args:
        step: steps that were made before.
        now: seconds that only grow.
    """

    def __init__(self, step: int = 0, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._step, self._first = now, step, step
        self._started = self._last = now()

    def lap(self, step: int) -> float:
        """Mean seconds of the steps since the last lap, up to and with number ``step`` (counted from 1)."""
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
        return (self._now() - self._started) / (step - self._first) * (steps - step)


class Progress:
    """A line that is rewritten on a terminal; now and then a line that stays, in a log file those alone.

    Args:
        modalities: whose losses are shown.
        steps: of the whole run.
        every: ``logging.every_steps``.
        first: steps made before this start.
    """

    def __init__(self, modalities: tuple[str, ...], *, steps: int, every: int, first: int) -> None:
        self.modalities, self.steps, self.first = modalities, steps, first
        self.every = max(every, steps // LINES)

    def show(self, record: Mapping[str, Any], seconds_left: float) -> None:
        """Tell of a step that has a record."""
        step = record["step"]
        text = self._text(record, seconds_left)
        if step % self.every == 0 or step <= self.first + FIRST_LINES or step == self.steps:
            logger.info("%s", text)
        done = BAR * step // self.steps
        log.live(f"[{'#' * done}{'.' * (BAR - done)}] {100 * step / self.steps:.0f} %  {text}")

    def _text(self, record: Mapping[str, Any], seconds_left: float) -> str:
        losses = [("loss", record["loss"])] + [(name, record[f"loss_{name}"]) for name in self.modalities]
        shown = "  ".join(f"{name} {value:.4f}" for name, value in losses if value is not None)
        return (
            f"step {record['step']}/{self.steps}  {shown}  norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_s']:.0f} tokens/s  mfu {100 * record['mfu']:.1f} %  "
            f"{datetime.timedelta(seconds=round(seconds_left))} left"
        )
