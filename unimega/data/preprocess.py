"""Files of rows to one corpus: `.bin/.idx/.json`, all or nothing, and what a kill has left is gone on from."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unimega import log
from unimega.data.preparing import pool
from unimega.data.preparing.files import unreadable
from unimega.data.preparing.job import Job
from unimega.data.preparing.merge import merge, too_many, write_entries
from unimega.data.preparing.plan import Plan, make
from unimega.data.preparing.task import Delta, Worker
from unimega.data.preparing.work import Work, refused
from unimega.data.tokenize import TextTokenizer
from unimega.errors import DataError

_log = log.get(__name__)
_JUDGED_FROM = 1000
"""Rows after which a job may stop for its share of bad ones; the whole is judged at the end."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    total_bytes: int
    """Of the inputs as they lie on disk."""
    kept_bytes: int
    """Done by an earlier run."""
    done_bytes: int
    """Done, by any."""
    rows: int
    """Since this run began, like what follows."""
    documents: int
    tokens: int
    bad: int
    seconds: float
    phase: Literal["reading", "merging", "done"] = "reading"


def preprocess(job: Job, progress: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
    """Write the corpus and return its sidecar; ``progress`` is called about twice a second or more often.

    With ``job.validate`` nothing but the quarantine is written, and what is returned are the sidecar's facts without
    the texts' tokens.

    Raises:
        DataError: a file is missing or damaged, too many rows are bad (``file:line: why``), or the output cannot be
            written; no reader sees anything half-written, and finished parts are kept for the next run.
    """
    may_be_there = job.validate or job.overwrite or Path(f"{job.output}.work").exists()  # Work looks whose that is
    if not may_be_there and Path(f"{job.output}.idx").exists():
        raise refused(job.output)
    tokenizer = TextTokenizer(job.tokenizer, backend=job.backend)
    plan = make(job, tokenizer)
    with Work(plan) as work:
        if work.published:
            return _published(plan, work, progress)
        tasks, done = work.tasks()
        watch = _Watch(plan, done, progress)
        if min(job.workers, len(tasks)) <= 1:
            worker = Worker(plan, tokenizer)
            for task in tasks:
                worker.run(task, watch.report)
        else:
            pool.run(plan, tasks, watch.report, tick=watch.tick)
        _refuse_changed(plan)
        for number, file in enumerate(plan.files):
            if work.blocks(number) == 0:
                _log.warning("%s: empty, no rows", file.shown)
        watch.phase = "merging"
        sidecar = merge(plan, work, tick=watch.tick)
        watch.finish()
        work.remove()
    return sidecar


def _published(plan: Plan, work: Work, progress: Callable[[Progress], None]) -> dict[str, Any]:
    """The sidecar of a corpus that a killed run of this job has finished."""
    _log.info("%s: was whole when the last run of this job was killed; nothing is left to do", plan.job.output)
    watch = _Watch(plan, sum(file.bytes for file in plan.files), progress)
    watch.finish()
    sidecar: dict[str, Any] = json.loads(Path(f"{plan.job.output}.json").read_bytes())
    work.remove()
    return sidecar


class _Watch:
    """Adds up what workers tell, and stops a job with too many bad rows early."""

    def __init__(self, plan: Plan, done: int, progress: Callable[[Progress], None]) -> None:
        self._plan, self._progress, self._kept = plan, progress, done
        self._total = sum(file.bytes for file in plan.files)
        self._start = time.monotonic()
        self._bytes = self._rows = self._documents = self._tokens = 0
        self._bad: Counter[str] = Counter()
        self._examples: list[dict[str, Any]] = []
        self.phase: Literal["reading", "merging", "done"] = "reading"

    def report(self, delta: Delta) -> None:
        """Take a worker's report."""
        self._bytes += delta.bytes
        self._rows += delta.rows
        self._documents += delta.documents
        self._tokens += delta.tokens
        self._bad.update(delta.bad)
        self._examples += delta.examples
        if self._rows >= _JUDGED_FROM and self._bad.total() > self._plan.job.may_be_bad(self._rows):
            self._stop()
        self.tick()

    def tick(self) -> None:
        """Tell how far the job is."""
        self._progress(
            Progress(
                total_bytes=self._total,
                kept_bytes=self._kept,
                done_bytes=min(self._total, self._kept + self._bytes),
                rows=self._rows,
                documents=self._documents,
                tokens=self._tokens,
                bad=self._bad.total(),
                seconds=time.monotonic() - self._start,
                phase=self.phase,
            )
        )

    def finish(self) -> None:
        """Tell the end."""
        self._bytes, self.phase = self._total - self._kept, "done"
        self.tick()

    def _stop(self) -> None:
        order = {file.shown: number for number, file in enumerate(self._plan.files)}
        entries = sorted(self._examples, key=lambda entry: (order[entry["file"]], entry["byte"], entry["line"] or 0))
        for entry in entries:
            if entry["line"] is None:
                entry["line"] = _line_at(self._plan.files[order[entry["file"]]].path, entry["byte"])
        write_entries(self._plan, entries)
        raise too_many(self._plan, self._rows, self._bad, entries[0])


def _line_at(path: str, byte: int) -> int:
    """Number of the line that starts at a byte."""
    number = 1
    with Path(path).open("rb") as file:
        while byte > 0 and (data := file.read(min(byte, _CHUNK))):
            number += data.count(b"\n")
            byte -= len(data)
    return number


def _refuse_changed(plan: Plan) -> None:
    for file in plan.files:
        try:
            found = os.stat(file.path)
        except OSError as error:
            raise unreadable(file.shown, error) from error
        if (found.st_size, found.st_mtime_ns) != (file.bytes, file.mtime_ns):
            raise DataError(f"{file.shown}: it was changed while it was read. Run again when it is complete.")
