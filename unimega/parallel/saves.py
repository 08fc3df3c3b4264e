"""Saving a step: all ranks write, rank 0 gives it its name once all is on the disk, and errors reach everyone."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from unimega import log
from unimega.errors import CheckpointError
from unimega.parallel import step_folder
from unimega.parallel.agreement import raise_everywhere
from unimega.parallel.host_memory import HostPeak
from unimega.parallel.shard_writer import ShardWriter, Written

logger = log.get(__name__)


@dataclass(frozen=True)
class Step:
    """What is to be saved beside the tensors, and where."""

    directory: Path
    number: int
    documents: dict[str, str]
    """Text files by name; equal on all ranks, rank 0 writes them."""
    keep: int | None
    """How many of the newest steps remain; None: all."""

    @property
    def final(self) -> Path:
        """The step's folder, once it is whole."""
        return step_folder.step_folder(self.directory, self.number)


class Saves:
    """Saves of one run: at once, or one at a time in the background. Every method is collective over the world."""

    def __init__(self) -> None:
        self._queue = AsyncCallsQueue()
        self._whole: list[Path] = []

    def save(self, step: Step, tensors: Sequence[ShardedTensor], *, asynchronous: bool = False) -> Path:
        """Write a step; waits for one that is still being written.

        Args:
            step: where, and what lies beside the tensors.
            tensors: this rank's share; with ``asynchronous`` they may change once this returns.
            asynchronous: only take a snapshot; ``finish`` makes the step appear.

        Returns:
            The step's folder.

        Raises:
            CheckpointError: on every rank, with the cause; what was there before is as it was.
        """
        self._queue.maybe_finalize_async_calls(blocking=True)
        began = time.perf_counter()
        temporary = self._make_folder(step)
        with HostPeak() as peak:
            writer = self._plan(temporary, tensors)
            if not asynchronous:
                written = writer.write()
        if asynchronous:
            self._schedule(step, writer, began, peak)
        else:
            self._complete(step, writer, replace(written, peak_bytes=peak.bytes), began)
        return step.final

    def finish(self, *, wait: bool) -> list[Path]:
        """The steps written in the background that became whole since the last call.

        Args:
            wait: until all of them are.

        Raises:
            CheckpointError: on every rank, if one could not be written.
        """
        self._queue.maybe_finalize_async_calls(blocking=wait)
        whole, self._whole = self._whole, []
        return whole

    def _make_folder(self, step: Step) -> Path:
        """A new temporary folder that every rank sees."""
        token = [os.urandom(4).hex()]
        dist.broadcast_object_list(token)
        temporary = step.final.with_name(f"{step.final.name}.{token[0]}{step_folder.TEMPORARY}")
        error = None
        if dist.get_rank() == 0:
            try:
                step_folder.clean(step.directory)
                temporary.mkdir(parents=True)
            except OSError as cause:
                error = f"{step.directory}: cannot be written ({cause.strerror}). The checkpoint was not saved."
        raise_everywhere(error, CheckpointError)
        if not temporary.is_dir():
            error = f"{step.directory}: rank {dist.get_rank()} does not see it. All nodes must share the folder."
        raise_everywhere(error, CheckpointError)
        return temporary

    def _plan(self, temporary: Path, tensors: Sequence[ShardedTensor]) -> ShardWriter:
        error, writer = None, None
        try:
            writer = ShardWriter.plan(temporary, tensors)
        except (OSError, RuntimeError, ValueError) as cause:
            error = f"{temporary}: the save could not be planned ({type(cause).__name__}: {cause})."
        raise_everywhere(error, CheckpointError)
        assert writer is not None
        return writer

    def _schedule(self, step: Step, writer: ShardWriter, began: float, peak: HostPeak) -> None:
        error = None
        try:
            request, report = writer.request()
        except OSError as cause:
            error = f"rank {dist.get_rank()}: no temporary file can be made ({cause.strerror})."
        raise_everywhere(error, CheckpointError)

        def finalize() -> None:
            written = report.get()
            written = replace(written, peak_bytes=max(peak.bytes, written.peak_bytes))
            self._complete(step, writer, written, began)
            self._whole.append(step.final)

        request.add_finalize_fn(finalize)
        self._queue.schedule_async_request(request)

    def _complete(self, step: Step, writer: ShardWriter, written: Written, began: float) -> None:
        """Rank 0 indexes, seals and publishes what all have written."""
        everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(written, everyone)
        error = None
        if everyone is not None:
            error = next((each.error for each in everyone if each.error), None)
            try:
                if error is None:
                    self._publish(step, writer, everyone, began)
            except (OSError, RuntimeError) as cause:  # torch wraps what the file raises
                reason = (cause.strerror if isinstance(cause, OSError) else None) or " ".join(str(cause).split())
                error = f"rank 0: {writer.folder}: {reason}"
            if error is not None:
                shutil.rmtree(writer.folder, ignore_errors=True)
                error = f"step {step.number} could not be saved: {error}. Earlier checkpoints are as they were."
        raise_everywhere(error, CheckpointError)

    def _publish(self, step: Step, writer: ShardWriter, everyone: Sequence[Written], began: float) -> None:
        seals = writer.index(everyone)
        for each in everyone:
            seals |= each.seals
        for name, text in step.documents.items():
            step_folder.write_durably(writer.folder / name, text)
            seals[name] = step_folder.seal(writer.folder / name)
        step_folder.write_manifest(writer.folder, seals)
        step_folder.publish(writer.folder, step.final)
        if step.keep is not None:
            step_folder.keep_newest(step.directory, step.number, step.keep)
        logger.info(
            "saved %s: %.1f MB in %.1f s, at most %.1f MB of host memory more than before on a rank",
            step.final,
            sum(size for size, _ in seals.values()) / 1e6,
            time.perf_counter() - began,
            max(each.peak_bytes for each in everyone) / 1e6,
        )
