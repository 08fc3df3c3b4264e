"""Steps whose loss or gradient is not finite: their update is left out; several in a row stop the run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unimega import log
from unimega.errors import UnimegaError
from unimega.training.engine import StepResult

logger = log.get(__name__)


@dataclass
class Guard:
    """Counts the updates that ``Engine.step`` left out; the counts outlive a restart (``state``)."""

    most_in_a_row: int
    """``training.max_skipped_steps``."""
    sources: Callable[[Sequence[int]], str]
    """What the packs of these numbers hold, in words."""
    skipped: int = field(default=0, init=False)
    """Updates left out since step 1."""
    in_a_row: int = field(default=0, init=False)

    def look(self, step: int, result: StepResult, packs: range) -> None:
        """Count and log a step that was left out.

        Args:
            step: counted from 1.
            packs: global numbers of the packs of the step.

        Raises:
            UnimegaError: it is one too many in a row; on all ranks, as the result is the same on all.
        """
        if result.applied:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        what = f"loss {result.loss}" if not math.isfinite(result.loss) else f"gradient norm {result.grad_norm}"
        where = f"step {step}: {what} (packs {packs.start}-{packs.stop - 1}: {self.sources(packs)})"
        if self.in_a_row > self.most_in_a_row:
            others = f" {self.in_a_row} steps in a row," if self.in_a_row > 1 else ""
            raise UnimegaError(
                f"{where};{others} training.max_skipped_steps={self.most_in_a_row}. "
                "Lower optimizer.lr, or look at these documents; the run goes on from its last checkpoint."
            )
        logger.warning("%s; the update is left out (%d so far)", where, self.skipped)

    def state(self) -> dict[str, int]:
        """What ``restore`` takes."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = int(state.get("skipped", 0)), int(state.get("in_a_row", 0))
