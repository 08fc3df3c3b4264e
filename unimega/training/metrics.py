"""What a run says of itself in ``metrics.jsonl``: one JSON line per record, each step once also after a restart."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unimega import log
from unimega.errors import UnimegaError

FILE = "metrics.jsonl"

logger = log.get(__name__)


@contextmanager
def writing(directory: str, *, key: str = "logging.directory") -> Iterator[None]:
    """What is written below a folder of the run, which ``key`` names.

    Raises:
        UnimegaError: the disk is full or gone.
    """
    try:
        yield
    except OSError as error:
        raise UnimegaError(
            f"{key}={directory!r} cannot be written ({error.strerror or error}). Once it can, the same "
            "command goes on from the last checkpoint."
        ) from error


class Metrics:
    """Appends records to a folder that exists."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        with writing(directory):
            self._file = (Path(directory) / FILE).open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One line, flushed, so that a killed run keeps what it logged; NaN and infinity become null."""
        clean = {key: None if isinstance(v, float) and v - v != 0 else v for key, v in record.items()}
        with writing(self._directory):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Have it on the disk: a checkpoint of step N stands for the records up to N."""
        with writing(self._directory):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with writing(self._directory):
            self._file.close()


def drop_after(directory: str | os.PathLike[str], step: int) -> int:
    """Take the records after a step out of ``metrics.jsonl``, and a last line that a killed run left torn.

    The file is replaced at once, or not at all if there is nothing to take out.

    Returns:
        How many lines were dropped.
    """
    file = Path(directory) / FILE
    if not file.exists():
        return 0
    temporary = file.with_suffix(".tmp")
    dropped = 0
    with file.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            if line.endswith(b"\n") and _step_of(line) <= step:
                new.write(line)
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if dropped:
        os.replace(temporary, file)
    else:
        temporary.unlink()
    return dropped


def _step_of(line: bytes) -> float:
    """Infinity for what is no record: a disk that was full can tear a line in the middle of the file."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return step if isinstance(step, int) else float("inf")
