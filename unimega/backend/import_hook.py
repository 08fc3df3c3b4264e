"""Doing something to a module at the moment it has been imported, without importing it ourselves.

The one mechanism behind two lists: the redirection (``backend.redirection``) and the repairs (``parallel.repairs``).
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action, *, below: bool = False) -> None:
    """Call ``action(module)`` right after the body of a module has run, before any importer sees the module.

    Args:
        name: dotted name of the module. If it is loaded already, the action runs at once.
        action: what to do with it.
        below: also for every module inside the package ``name``.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.actions.append((name, below, action))
    for loaded, module in list(sys.modules.items()):
        if _concerns(loaded, name, below):
            action(module)


def _concerns(module: str, name: str, below: bool) -> bool:
    return module == name or (below and module.startswith(f"{name}."))


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves the finding to the finders behind it and wraps the loader they return."""

    def __init__(self) -> None:
        self.actions: list[tuple[str, bool, Action]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        actions = [action for name, below, action in self.actions if _concerns(fullname, name, below)]
        if not actions:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, actions)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs the module with its own loader, gives that loader back to it, then runs the actions."""

    def __init__(self, loader: importlib.abc.Loader, actions: Sequence[Action]) -> None:
        self.loader = loader
        self.actions = actions

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # inspect, linecache and importlib.resources ask it for sources
        self.loader.exec_module(module)
        for action in self.actions:
            action(module)


_FINDER = _Finder()
