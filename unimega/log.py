"""Logging that knows its rank: the library logs, only commands print."""

import logging
import sys


def get(name: str) -> logging.Logger:
    """The logger of a module; ``name`` is its ``__name__``."""
    return logging.getLogger(name)


def setup(*, rank: int = 0, world: int = 1, level: int = logging.INFO) -> None:
    """Send unimega's records to stderr: everything from rank 0, warnings and worse from the others."""
    root = logging.getLogger("unimega")
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {rank}] " if world > 1 and rank > 0 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level if rank == 0 else logging.WARNING)
    root.propagate = False
