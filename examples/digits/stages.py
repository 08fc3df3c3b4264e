"""Stages of a program that may be stopped anywhere: a finished one is kept while nothing that it stands on has changed.

A stage is done when its marker ``OUTPUT/stages/NAME.json`` lists files. The marker holds what went in (settings, the
checksums of the code, everything that the stages before wrote) and a checksum of every file that came out: if either
differs, the stage runs again, and so does every one behind it.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unimega.errors import UnimegaError


@dataclass(frozen=True)
class Started:
    """What the work of a stage is told."""

    inputs: dict[str, Any]
    again: bool
    """An earlier run with the same inputs was stopped: what it left may be gone on with."""
    note_seconds: Callable[[], None]
    """Writes down what was spent so far, lest a ``kill -9`` takes it out of the books; for long stages."""


@dataclass
class Stages:
    """The stages of one output folder, run one after the other."""

    folder: Path
    wall_s: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage so far, whenever they were spent."""
    before: str = ""
    """Names everything that went into the stages so far and came out of them."""

    def run(
        self,
        name: str,
        work: Callable[[Started], Sequence[Path]],
        *,
        settings: Mapping[str, Any],
        code: Sequence[Path] = (),
        say: str = "",
    ) -> None:
        """Do ``work`` unless it is done; it returns the files that it wrote, all below the folder.

        Args:
            settings: what its results depend on, as JSON.
            code: sources that its results depend on.
            say: what it makes, printed behind its name and seconds.
        """
        marker = self.folder / "stages" / f"{name}.json"
        sources = {path.name: checksum(path) for path in code}
        inputs = json.loads(json.dumps({"settings": settings, "code": sources, "before": self.before}))
        found = read_json(marker)
        if found is None or found.get("inputs") != inputs:
            found = None
        if found is not None and "files" in found and not self._is_whole(found["files"]):
            found = None  # what somebody changed is nothing to go on with
        if found is not None and "files" in found:
            tell(f"{name:8} kept, made in {found['wall_s']:.1f} s: {say}")
        else:
            found = self._work(marker, work, inputs, earlier=found)
            tell(f"{name:8} {found['wall_s']:.1f} s: {say}")
        self.wall_s[name] = found["wall_s"]
        self.before = hashlib.sha256(json.dumps([inputs, found["files"]], sort_keys=True).encode()).hexdigest()

    def _work(
        self,
        marker: Path,
        work: Callable[[Started], Sequence[Path]],
        inputs: dict[str, Any],
        *,
        earlier: dict[str, Any] | None,
    ) -> dict[str, Any]:
        spent = float(earlier["wall_s"]) if earlier else 0.0
        start = time.monotonic()

        def record() -> dict[str, Any]:
            return {"inputs": inputs, "wall_s": round(spent + time.monotonic() - start, 2)}

        def note() -> None:
            write_json(marker, record())

        note()
        try:
            files = work(Started(inputs, again=earlier is not None, note_seconds=note))
        except BaseException:
            note()
            raise
        done = record() | {"files": {path.relative_to(self.folder).as_posix(): checksum(path) for path in files}}
        write_json(marker, done)
        return done

    def _is_whole(self, files: Mapping[str, str]) -> bool:
        """Every file is still what was written."""
        paths = {name: self.folder / name for name in files}
        return all(path.is_file() and checksum(path) == files[name] for name, path in paths.items())


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or half of one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder against a second demo.

    Raises:
        UnimegaError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnimegaError(
                f"--output={str(folder)!r} is in use: another demo runs there. Wait for it, or name another folder."
            ) from None
        yield


def bar(name: str, total: int, *, unit: str, done: int = 0) -> "tqdm[Any]":
    """A progress bar on stderr: live on a terminal, a line now and then in a file."""
    live = sys.stderr.isatty()
    return tqdm(total=total, desc=f"{name:8}", unit=unit, initial=done, leave=not live, mininterval=0.1 if live else 10)


def redraw(progress: "tqdm[Any]") -> None:
    """Let the seconds of a bar run on where somebody sees it."""
    if sys.stderr.isatty():
        progress.refresh()


def tell(line: str) -> None:
    """One line on stdout that leaves a bar in peace."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
