"""Micro-batches step by step, built ahead by one background thread that keeps their order."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unimega.batch import Microbatch
from unimega.data.plan import DataPlan


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which part of a step a rank builds."""

    global_batch_packs: int
    micro_batch_packs: int
    dp_rank: int = 0
    dp: int = 1
    tp_rank: int = 0
    tp: int = 1
    sequence_parallel: bool = False
    cross_document: bool = False


@dataclass(frozen=True)
class StepBatch:
    """What one rank needs for one step."""

    step: int
    targets: tuple[int, ...]
    """Targets per modality of the input token in the global batch; equal on all ranks."""
    denominator: float
    """Sum of the loss weights over the global batch; weights in the micro-batches are divided by it already."""
    microbatches: tuple[Microbatch, ...]


def step_batch(plan: DataPlan, step: int, place: Place, loss_weights: Sequence[float]) -> StepBatch:
    """Build a step; a step without targets has denominator 0 and weights 0.

    Args:
        loss_weights: weight of a target per modality of its input token.
    """
    targets = plan.targets(step, global_batch_packs=place.global_batch_packs)
    denominator = float(sum(weight * int(count) for weight, count in zip(loss_weights, targets, strict=True)))
    scale = [weight / denominator if denominator > 0 else 0.0 for weight in loss_weights]
    microbatches = plan.microbatches(
        step,
        global_batch_packs=place.global_batch_packs,
        micro_batch_packs=place.micro_batch_packs,
        loss_scale=scale,
        dp_rank=place.dp_rank,
        dp=place.dp,
        tp_rank=place.tp_rank,
        tp=place.tp,
        sequence_parallel=place.sequence_parallel,
        cross_document=place.cross_document,
    )
    return StepBatch(step, tuple(targets.tolist()), denominator, tuple(microbatches))


class Loader:
    """Iterates over steps from ``first_step`` to ``last_step`` (exclusive; None: for ever)."""

    def __init__(
        self,
        plan: DataPlan,
        place: Place,
        loss_weights: Sequence[float],
        *,
        first_step: int = 0,
        last_step: int | None = None,
        prefetch_steps: int = 2,
    ) -> None:
        """Start the thread; it stops at the last step, at the first error, or at ``close``."""
        self._plan, self._place, self._loss_weights = plan, place, tuple(loss_weights)
        self._steps = first_step, last_step
        self._ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=prefetch_steps)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="unimega-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._ended:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, StepBatch):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._ended = True
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        step, last = self._steps
        end: BaseException | None = None
        try:
            while not self._stop.is_set() and (last is None or step < last):
                self._hand_over(step_batch(self._plan, step, self._place, self._loss_weights))
                step += 1
        except Exception as error:  # travels to the consumer, who raises it
            end = error
        self._hand_over(end)

    def _hand_over(self, item: StepBatch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
