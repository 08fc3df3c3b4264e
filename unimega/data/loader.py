"""Micro-batches step by step, built ahead by one background thread that keeps their order.

One thread is enough, by far: a core fills tens of millions of tokens a second. The plan knows the future, so the
documents of the next packs are asked of the operating system before they are needed.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unimega.batch import Microbatch
from unimega.data.collate import Rank
from unimega.data.draft import Draft
from unimega.data.plan import DataPlan
from unimega.errors import DataError

BLOCK_PACKS = 64
"""About so many packs of a rank are laid out at a time: the numpy calls for it are shared by all of them."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which part of a step a rank builds."""

    global_batch_packs: int
    """A multiple of dp x micro_batch_packs, as ``config.rules`` has checked."""
    micro_batch_packs: int
    dp_rank: int = 0
    dp: int = 1
    tp_rank: int = 0
    tp: int = 1
    sequence_parallel: bool = False
    cross_document: bool = False

    def packs(self, step: int) -> list[int]:
        """Global packs of this rank: pack i of micro-batch a of step s is ``s G + (a dp + r) m + i``."""
        micro = self.micro_batch_packs
        first = range(self.dp_rank * micro, self.global_batch_packs, self.dp * micro)
        return [step * self.global_batch_packs + start + i for start in first for i in range(micro)]

    @property
    def rank(self) -> Rank:
        """What the token order needs to know of it."""
        return Rank(
            tp_rank=self.tp_rank,
            tp=self.tp,
            sequence_parallel=self.sequence_parallel,
            cross_document=self.cross_document,
        )


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

    Raises:
        DataError: a document cannot be read as planned.
    """
    return _filled(plan, step, place, loss_weights, plan.draft(place.packs(step)), 0)


def _filled(plan: DataPlan, step: int, place: Place, loss_weights: Sequence[float], draft: Draft, at: int) -> StepBatch:
    """The step whose packs begin at pack ``at`` of the draft."""
    targets = plan.targets(step, global_batch_packs=place.global_batch_packs).tolist()
    denominator = float(sum(weight * count for weight, count in zip(loss_weights, targets, strict=True)))
    scale = np.asarray([weight / denominator if denominator > 0 else 0.0 for weight in loss_weights], dtype=np.float32)
    tokens = plan.tokens(step, global_batch_packs=place.global_batch_packs)
    packs, micro, rank = place.packs(step), place.micro_batch_packs, place.rank
    made = tuple(
        plan.collate(
            draft.slice(at + i, at + i + micro), packs[i : i + micro], scale=scale, step_tokens=tokens, rank=rank
        )
        for i in range(0, len(packs), micro)
    )
    return StepBatch(step, tuple(targets), denominator, made)


def step_batches(
    plan: DataPlan, place: Place, loss_weights: Sequence[float], *, first_step: int = 0, last_step: int | None = None
) -> Iterator[StepBatch]:
    """Steps one after another, equal to ``step_batch`` of each, laid out in blocks with one block read ahead."""
    mine = max(1, len(place.packs(0)))
    stride = max(1, BLOCK_PACKS // mine)

    def drafted(first: int) -> tuple[range, Draft] | None:
        steps = range(first, first + stride if last_step is None else min(first + stride, last_step))
        if not steps:
            return None
        draft = plan.draft([pack for step in steps for pack in place.packs(step)])
        plan.read_ahead(draft)
        return steps, draft

    block = drafted(first_step)
    while block is not None:
        steps, draft = block
        behind: tuple[range, Draft] | None = None
        failed: DataError | None = None
        for at, step in enumerate(steps):
            yield _filled(plan, step, place, loss_weights, draft, at * mine)
            if at == len(steps) // 2:  # in the middle, so that the first step of a run waits for one block only
                try:
                    behind = drafted(steps.stop)
                except DataError as error:  # not before the steps that it does not touch
                    failed = error
        if failed is not None:
            raise failed
        block = behind


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
        self._steps = step_batches(plan, place, tuple(loss_weights), first_step=first_step, last_step=last_step)
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
        end: BaseException | None = None
        try:
            for batch in self._steps:
                self._hand_over(batch)
                if self._stop.is_set():
                    break
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
