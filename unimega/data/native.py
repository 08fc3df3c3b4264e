"""The optional C++ helper (csrc/data_index.cpp). Its Python twins define every result; this only makes them faster."""

import importlib
from types import ModuleType

helper: ModuleType | None
"""The extension module, or None where it is not compiled."""
try:
    helper = importlib.import_module("unimega._data_index")
except ImportError:
    helper = None
