"""A trace of some steps by torch.profiler, one Chrome trace per rank."""

from pathlib import Path

import torch

from unimega import log
from unimega.training.metrics import writing

FOLDER = "profile"

logger = log.get(__name__)


class Profile:
    """Traces steps ``first`` to ``last``; without them nothing of the profiler is touched.

    Args:
        steps: ``logging.profile``.
        directory: of the logs.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: str, *, rank: int) -> None:
        self._steps, self._folder, self._rank = steps, Path(directory) / FOLDER, rank
        self._running: torch.profiler.profile | None = None
        self._first = 0

    def before(self, step: int) -> None:
        """Start if the step, counted from 1, is among those; a run that goes on may begin in the middle."""
        if self._steps and self._running is None and self._steps[0] <= step <= self._steps[1]:
            self._running, self._first = torch.profiler.profile(), step
            self._running.start()

    def after(self, step: int) -> None:
        """Write the trace once the last step is done."""
        if self._steps and step >= self._steps[1]:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what was traced up to a step, if anything was."""
        if self._running is None:
            return
        self._running.stop()
        running, self._running = self._running, None
        file = self._folder / f"steps-{self._first}-{step}-rank-{self._rank}.json"
        with writing(str(self._folder.parent)):
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(file))
        logger.info("step %d  profile of this rank in %s: open it in https://ui.perfetto.dev", step, file)
