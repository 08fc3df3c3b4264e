"""Who is missing when ranks wait for each other in vain: every rank leaves word of where it is in the store.

A thread of its own writes (beats, step, place) every few seconds; the place is read off the main thread's stack, so
nothing in the model or the engine has to say what it does. Whoever a collective gives up on reads what the others left.
"""

import json
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist

from unimega import log
from unimega.errors import UnimegaError

INTERVAL = 5.0
"""Seconds between two beats at most; a thousand ranks are 200 short messages a second to the store."""
SHOWN = 4
COMPUTE = "forward or backward"
LOST = ("gloo", "nccl", "hccl", "timed out", "connection", "pair closure")
"""What the text of an error of a collective holds: most are plain RuntimeErrors.

Where several wait for a rank, gloo says "Timed out" in one, "Application timeout caused pair closure" in the others.
"""
PLACES = (
    ("megatron/core/pipeline_parallel/p2p_communication", "", "a transfer between pipeline stages"),
    ("megatron/core/distributed/param_and_grad_buffer", "grad", "the reduction of gradients"),
    ("megatron/core/distributed/param_and_grad_buffer", "param", "the gather of parameters"),
    ("megatron/core/distributed/finalize_model_grads", "", "the reduction of gradients"),
    ("megatron/core/optimizer/clip_grads", "", "the gradient norm"),
    ("megatron/core/tensor_parallel/", "", "an exchange between tensor-parallel ranks"),
    ("unimega/parallel/linear", "", "an exchange between tensor-parallel ranks"),
    ("unimega/parallel/lora", "", "an exchange between tensor-parallel ranks"),
    ("unimega/parallel/vocabulary", "", "an exchange between tensor-parallel ranks"),
    ("unimega/parallel/replicas", "", "the comparison of replicas"),
    ("unimega/parallel/agreement", "check_equal", "the comparison of what the ranks were told to do"),
    ("unimega/training/engine", "_reduce", "the sum of losses"),
    ("unimega/training/engine", "save", "the save of a checkpoint"),
    ("unimega/training/engine", "resume", "the load of a checkpoint"),
    ("unimega/training/engine", "__init__", "the start of the engine"),
    ("unimega/training/engine", "_run", COMPUTE),
    ("unimega/data/loader", "", "the data"),
    ("unimega/training/evaluation", "", "the evaluation"),
)
"""(part of a file's path, part of a function's name, what happens there); the innermost frame that fits says it."""

logger = log.get(__name__)


class Beat(NamedTuple):
    """What a rank says of itself."""

    beats: int
    step: int
    place: str
    waits: bool
    """Whether it was in a collective."""


def place(frames: Iterable[tuple[str, str]]) -> tuple[str, bool]:
    """What happens in a stack, and whether it is a collective.

    Args:
        frames: (file, function), the innermost first.
    """
    waits = False
    for file, function in frames:
        file = file.replace("\\", "/")
        waits = waits or "torch/distributed/" in file
        for part, name, words in PLACES:
            if part in file and name in function:
                computes = not waits and ("tensor-parallel" in words or words == COMPUTE)
                return (COMPUTE, False) if computes else (words, waits or "reduction of" in words)
    return "its own code", waits


class Watch:
    """The word that this rank leaves, and the reading of all others'.

    Args:
        store: a connection of its own: the main thread may be waiting in the other one. None: nobody to tell.
        timeout: seconds after which a collective gives up.
        tells: also log who is missing shortly before: a device's library ends the process without an exception.
    """

    def __init__(self, store: Any, *, rank: int, world: int, timeout: float, tells: bool) -> None:
        self.step = 0
        self._store, self._rank, self._world, self._timeout, self._tells = store, rank, world, timeout, tells
        self.interval = min(INTERVAL, timeout / 5)
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="unimega-watch", daemon=True)
        if store is not None:
            self._thread.start()

    @staticmethod
    def of_world(*, timeout: float) -> "Watch":
        """The watch of this rank, once the process group is there."""
        rank, world = dist.get_rank(), dist.get_world_size()
        tells = dist.get_backend() != "gloo"
        store: Any = dist.distributed_c10d._get_default_store()
        return Watch(store.clone() if world > 1 else None, rank=rank, world=world, timeout=timeout, tells=tells)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self.interval)

    def explain(self, error: BaseException) -> UnimegaError | None:
        """The line for a collective that gave up; None for any other error. May take two beats of time."""
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in LOST):
            return None
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        words, _ = place([("torch/distributed/", ""), *((code.co_filename, code.co_name) for code in reversed(codes))])
        at = f"at step {self.step}" if self.step else "before the first step"
        if "timed out" in text.lower() or "timeout" in text.lower():
            what = f"rank {self._rank} waited {self._timeout:g} s (parallel.timeout_minutes) for {words} {at}"
            return UnimegaError(f"{what}. {self.missing()} The same command goes on from the last checkpoint.")
        return UnimegaError(  # at once: the launcher ends this rank as well
            f"rank {self._rank} lost the connection to another rank in {words} {at}: that one ended, and its own lines "
            "or the launcher's report say why. The same command goes on from the last checkpoint."
        )

    def missing(self) -> str:
        """Who keeps the others waiting, in words. Takes two beats of time."""
        before = self._read()
        time.sleep(1.5 * self.interval)
        return blame(before, self._read(), own=self._rank)

    def _work(self) -> None:
        beats, seen, since, told = 0, (-1, ""), time.monotonic(), False
        while not self._stop.wait(self.interval if beats else 0):
            beats += 1
            words, waits = place(_stack(sys._current_frames().get(self._main or 0)))
            try:
                self._store.set(f"unimega-watch/{self._rank}", json.dumps([beats, self.step, words, waits]))
            except (RuntimeError, dist.DistError):  # the store went with its host: the collectives say more
                return
            if (self.step, words) != seen:
                seen, since, told = (self.step, words), time.monotonic(), False
            waited = time.monotonic() - since
            if self._tells and not told and waited > 0.9 * self._timeout:
                told = True
                line = "rank %d has waited %.0f s in %s at step %d. %s"
                logger.error(line, self._rank, waited, words, self.step, self.missing())

    def _read(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self._world):
            key = f"unimega-watch/{rank}"
            try:
                if self._store.check([key]):
                    found[rank] = Beat(*json.loads(self._store.get(key)))
            except (RuntimeError, dist.DistError):
                break
        return found


def blame(before: dict[int, Beat], after: dict[int, Beat], *, own: int) -> str:
    """Of the ranks that left word twice, who keeps the others waiting: silent ones, those behind, those elsewhere."""
    others = {rank: beat for rank, beat in after.items() if rank != own}
    if not others:
        return "The store with the other ranks' whereabouts does not answer."
    newest = max(beat.step for beat in after.values())
    silent = [rank for rank in others if rank in before and before[rank].beats == others[rank].beats]
    behind = [rank for rank, beat in others.items() if beat.step < newest]
    elsewhere = [rank for rank, beat in others.items() if not beat.waits]
    for ranks, how in ((silent, "does not answer"), (behind, "is behind"), (elsewhere, "did not arrive")):
        if ranks:
            told = [f"rank {rank} {how}: last seen in {after[rank].place} at step {after[rank].step}" for rank in ranks]
            return "; ".join(told[:SHOWN]) + (f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else "") + "."
    told = [f"rank {rank} in {beat.place}" for rank, beat in others.items()]
    return f"All ranks answer: {', '.join(told[:SHOWN])}."


def _stack(frame: FrameType | None) -> Iterable[tuple[str, str]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back
