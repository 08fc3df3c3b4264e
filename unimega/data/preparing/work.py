"""The folder of a job's parts: whose it is, which parts are there, which tasks are left."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from unimega import log
from unimega.data.preparing.parts import Record, read_record
from unimega.data.preparing.plan import Plan
from unimega.data.preparing.task import Task
from unimega.data.writer import write_error, write_synced
from unimega.errors import DataError

_log = log.get(__name__)
_SETTINGS, _LOCK = "job.json", "lock"
_WORTH_KEEPING_SECONDS = 60
_LOCK_TRIES = 100


class BadRows(DataError):
    """The rows themselves do not make a corpus."""


def refused(prefix: str) -> DataError:
    """The line for a corpus that is there already."""
    return DataError(f"{prefix}.idx: exists already. Choose another output or pass --overwrite.")


def _locked(folder: Path) -> IO[str]:
    """The folder's lock, held until it is closed; a process that ends may remove the folder at any moment."""
    path = folder / _LOCK
    for tries_left in reversed(range(_LOCK_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and tries_left:
                continue
            raise write_error(folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass  # the folder went after the file was opened
        except OSError:
            break
        lock.close()
    raise DataError(f"{folder}: another process writes this corpus. Wait for it, or end it.")


class Work:
    """Opens ``PREFIX.work`` for one process, and keeps what an earlier one of the same job finished in it."""

    def __init__(self, plan: Plan) -> None:
        """Take the folder.

        Raises:
            DataError: another process has it, it holds parts of another job, or it cannot be written.
        """
        self.plan, self._start = plan, time.monotonic()
        self._lock = _locked(plan.work)
        try:
            self.published = not plan.job.validate and not plan.job.overwrite and self._is_published()
            """Whether the corpus is whole: a run of this job was killed between its last rename and its end."""
            if not self.published:
                self._keep_what_fits()
        except BaseException:
            self._close(keep=True)
            raise

    def __enter__(self) -> "Work":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self.plan.work.glob("*.tmp"):
            path.unlink(missing_ok=True)
        judged = isinstance(error, BadRows) and time.monotonic() - self._start < _WORTH_KEEPING_SECONDS
        self._close(keep=not judged)

    def _close(self, *, keep: bool) -> None:
        """Give the folder back; ``keep`` the parts in it for a next run, if there are any."""
        if not keep or not any(self.plan.work.glob("*.part")):
            self.remove()
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder: the corpus is whole. Whose parts they were goes after them, for a run after a kill; the
        lock goes last, so that nobody takes the folder meanwhile."""
        parts = [path for path in self.plan.work.glob("*") if path.name not in (_SETTINGS, _LOCK)]
        for path in (*parts, self.plan.work / _SETTINGS, self.plan.work / _LOCK):
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            self.plan.work.rmdir()

    def record(self, file: int, block: int) -> Record | None:
        """The record of a part, None if it is not there."""
        path = self.plan.part(file, block)
        if not path.exists():
            return None
        record = read_record(path)
        if record is None or record.job != self.plan.key:
            path.unlink()
            return None
        return record

    def blocks(self, file: int) -> int | None:
        """Number of blocks of a file, None where that is not known yet."""
        spans = self.plan.files[file].spans
        if spans is not None:
            return len(spans)
        end = self.plan.end(file)
        return int(end.read_text()) if end.exists() else None

    def tasks(self) -> tuple[list[Task], int]:
        """(what is left to do, bytes of the inputs that are done)."""
        left: list[Task] = []
        done = 0
        streams = sum(file.spans is None for file in self.plan.files)
        for number, file in enumerate(self.plan.files):
            blocks = self.blocks(number)
            if blocks is None:
                turns = max(1, min(-(-self.plan.job.workers // streams), 1 + 4 * file.bytes // self.plan.task_bytes))
                left += [Task(number, None, turn, turns) for turn in range(turns)]
                continue
            missing = [block for block in range(blocks) if self.record(number, block) is None]
            if file.spans is None and missing:
                left.append(Task(number, None))
            elif file.spans is not None:
                left += [Task(number, block) for block in missing]
            done += file.bytes * (blocks - len(missing)) // max(1, blocks)
        return left, done

    def _inputs(self) -> list[list[Any]]:
        return [[file.shown, file.bytes, file.mtime_ns] for file in self.plan.files]

    def _is_published(self) -> bool:
        """Whether a killed run of this very job has written the corpus.

        Raises:
            DataError: there is a corpus, of another job, input or time.
        """
        index, path = Path(f"{self.plan.job.output}.idx"), self.plan.work / _SETTINGS
        if not index.exists():
            return False
        if self._known(path) != {"settings": self.plan.settings, "inputs": self._inputs()}:
            raise refused(self.plan.job.output)
        if index.stat().st_mtime_ns < path.stat().st_mtime_ns:  # older: the run was to replace it
            raise refused(self.plan.job.output)
        return True

    def _keep_what_fits(self) -> None:
        path = self.plan.work / _SETTINGS
        inputs = self._inputs()
        known = self._known(path)
        for leftover in self.plan.work.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        if known is not None and known["settings"] != self.plan.settings:
            self._refuse_other(known["settings"])
            known = None
        if known is None:
            for pattern in ("*.part", "*.end"):
                for old in self.plan.work.glob(pattern):
                    old.unlink()
        else:
            for number, (old_input, new_input) in enumerate(zip(known["inputs"], inputs, strict=True)):
                if old_input != new_input:
                    _log.warning("%s has changed since: all of it is read again", new_input[0])
                    self._forget(number)
        try:
            temporary = path.with_suffix(".tmp")
            write_synced(temporary, json.dumps({"settings": self.plan.settings, "inputs": inputs}).encode())
            os.replace(temporary, path)
        except OSError as error:
            raise write_error(path, error) from error

    @staticmethod
    def _known(path: Path) -> dict[str, Any] | None:
        try:
            return dict(json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError):
            return None

    def _forget(self, file: int) -> None:
        for old in (*self.plan.work.glob(f"{file:05d}-*.part"), self.plan.end(file)):
            old.unlink(missing_ok=True)

    def _refuse_other(self, settings: dict[str, Any]) -> None:
        """Parts of another job are only thrown away on request."""
        if self.plan.job.overwrite or not any(self.plan.work.glob("*.part")):
            return
        differing = [name for name, value in self.plan.settings.items() if settings.get(name) != value]
        name = differing[0] if differing else "version"
        raise DataError(
            f"{self.plan.work}: holds parts of another job: {name} was {_short(settings.get(name))}, is "
            f"{_short(self.plan.settings.get(name))}. Pass --overwrite to start anew, or choose another output."
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
