"""Logging that knows its rank: the library logs, only commands print."""

import logging
import shutil
import sys
import time

LIVE_SECONDS = 0.1
"""A terminal's live line is rewritten no more often."""


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes records to stderr, on a terminal above a live line that stays the last one."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.is_terminal = sys.stderr.isatty()
        self._line, self._shown = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the live line."""
        line = self._line
        self._draw("")
        super().emit(record)
        if line:
            self._draw(line)

    def live(self, text: str) -> None:
        """Show the text as the live line, cut to the terminal's width; none takes the line away."""
        if self.is_terminal and (not text or time.monotonic() - self._shown >= LIVE_SECONDS):
            self._shown = time.monotonic()
            self._draw(text[: shutil.get_terminal_size().columns - 1])

    def _draw(self, text: str) -> None:
        if text or self._line:
            self.stream.write(f"\r\x1b[K{text}")
            self.stream.flush()
        self._line = text


def get(name: str) -> logging.Logger:
    """The logger of a module; ``name`` is its ``__name__``."""
    return logging.getLogger(name)


def setup(*, rank: int = 0, world: int = 1, level: int = logging.INFO) -> None:
    """Send unimega's records to stderr: everything from rank 0, warnings and worse from the others."""
    root = logging.getLogger("unimega")
    root.handlers.clear()
    handler = _Handler()
    prefix = f"[rank {rank}] " if world > 1 and rank > 0 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level if rank == 0 else logging.WARNING)
    root.propagate = False


def live(text: str) -> None:
    """The last line of a terminal, rewritten each time; elsewhere nothing. An empty text ends it."""
    for handler in logging.getLogger("unimega").handlers:
        if isinstance(handler, _Handler):
            handler.live(text)
