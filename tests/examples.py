"""The scripts of examples/digits as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"


def example(name: str) -> ModuleType:
    """A script of examples/digits; its neighbours import each other by name, so the folder goes onto the path."""
    sys.path.insert(0, str(DIGITS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DIGITS))
