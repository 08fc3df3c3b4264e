"""The optional C++ helper (csrc/data_index.cpp). Its Python twins define every result; this only makes them faster."""

import importlib
from types import ModuleType

_VERSION = 3
"""Of the helper's functions; one that an older checkout left behind is not taken."""


def _load() -> ModuleType | None:
    try:
        module = importlib.import_module("unimega._data_index")
    except ImportError:
        return None
    return module if getattr(module, "version", None) == _VERSION else None


helper = _load()
"""The extension module, or None where it is not compiled."""
