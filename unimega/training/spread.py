"""How long ranks work on a step before they wait for each other: one that is slower holds up all."""

import statistics
from collections.abc import Sequence
from typing import Any

from unimega import log

FACTOR, SECONDS = 1.5, 0.05
"""A rank is told of when its steps take so many times, and so many seconds, longer than the median."""
QUIET_RECORDS = 50

logger = log.get(__name__)


class Spread:
    """Own seconds of every rank, and its device memory, gathered in the steps that have a record."""

    def __init__(self, *, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._seconds: list[float] = []
        self._told, self._quiet = -1, 0

    def add(self, seconds: float) -> None:
        """A step took this rank so long, its wait for data included, for other ranks not."""
        self._seconds.append(seconds)

    def share(self, memory_bytes: int) -> list[float]:
        """[2 world] numbers to be summed over ranks: mean seconds since the last record and memory, zeros elsewhere."""
        own = [0.0] * (2 * self._world)
        own[self._rank] = statistics.fmean(self._seconds) if self._seconds else 0.0
        own[self._world + self._rank] = float(memory_bytes)
        self._seconds.clear()
        return own

    def record(self, shared: Sequence[float], step: int) -> dict[str, Any]:
        """The keys of a record; times are None as long as no step has ended.

        Args:
            shared: the sum over ranks of what ``share`` gave.
        """
        seconds, memory = shared[: self._world], shared[self._world :]
        slowest = max(range(self._world), key=lambda rank: seconds[rank])
        most, median = seconds[slowest], statistics.median_low(seconds)
        if not most:
            times: tuple[Any, ...] = (None, None, None, None)
        else:
            times = (min(seconds), median, most, slowest)
            if self._rank == 0:
                self._tell(slowest, most, median, step)
        names = ("step_time_min", "step_time_median", "step_time_max", "step_time_slowest_rank")
        return {"memory_bytes": int(max(memory))} | dict(zip(names, times, strict=True))

    def _tell(self, rank: int, most: float, median: float, step: int) -> None:
        self._quiet -= 1
        if most > FACTOR * median and most - median > SECONDS and (rank != self._told or self._quiet < 0):
            self._told, self._quiet = rank, QUIET_RECORDS
            line = "step %d  rank %d takes %.3f s of its own for a step, the median is %.3f s: all ranks wait for it"
            logger.warning(line, step, rank, most, median)
