"""What a run says of itself: one JSON line per record in ``metrics.jsonl``."""

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class Metrics:
    """Appends records; on ranks that do not write (``directory`` None) it does nothing."""

    def __init__(self, directory: str | None) -> None:
        self._file = None
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._file = (Path(directory) / FILE).open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One line, flushed, so that a killed run keeps what it logged; NaN and infinity become null."""
        if self._file is not None:
            clean = {key: None if isinstance(v, float) and v - v != 0 else v for key, v in record.items()}
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
