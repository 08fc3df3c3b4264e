"""The layering of docs/architecture.md, read from the source: who imports whom, where, and what only some may name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "unimega"

BASE = {"errors", "log", "batch"}
MAY_IMPORT: dict[str, set[str]] = {"errors": set(), "log": set(), "batch": set()}
MAY_IMPORT["config"] = BASE
MAY_IMPORT["backend"] = BASE | {"config"}
MAY_IMPORT["kernels"] = BASE | {"backend", "_data_index", "_softmax"}
MAY_IMPORT["parallel"] = BASE | {"config", "backend", "kernels"}
MAY_IMPORT["layers"] = MAY_IMPORT["parallel"] | {"parallel"}
MAY_IMPORT["moe"] = MAY_IMPORT["layers"] | {"layers"}
MAY_IMPORT["models"] = MAY_IMPORT["moe"] | {"moe"}
MAY_IMPORT["data"] = BASE | {"config", "_data_index"}
MAY_IMPORT["training"] = MAY_IMPORT["models"] | {"models", "data"}
MAY_IMPORT["hf"] = MAY_IMPORT["training"] | {"training"}
MAY_IMPORT["inference"] = MAY_IMPORT["hf"] | {"hf"}
MAY_IMPORT["__main__"] = MAY_IMPORT["inference"] | {"inference"}

# Packages of others that only some modules may import: module prefix below unimega/.
ONLY_IN = {
    "megatron": ("parallel",),
    "triton": ("kernels", "backend"),
    "torch_npu": ("kernels", "backend"),
    "transformers": ("hf", "inference", "data.tokenize", "models.vision"),
    "tokenizers": ("hf", "inference", "data.tokenize"),
}
WITHOUT_TORCH = ("errors", "log", "batch", "config", "data")
NAMES_DEVICES = ("backend", "kernels")
IMPORTS_IN_FUNCTIONS = ("__main__",)


@dataclass(frozen=True)
class Import:
    """One imported module, in full, and where it stands."""

    module: str
    line: int
    in_function: bool


def sources() -> list[tuple[str, Path]]:
    """Dotted name below unimega and path of each module, the package file of a folder under the folder's name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts), path))
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES}
IS_PACKAGE = {name: path.name == "__init__.py" for name, path in SOURCES}


def modules_of(node: ast.AST, inside: str, is_package: bool) -> list[str]:
    """Full names of the modules that an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = ["unimega", *inside.split(".")]
            base = ".".join(filter(None, [*parts[: len(parts) - node.level + is_package], base]))
        if base == "unimega" or f"{base}.".startswith("unimega."):
            return [f"{base}.{alias.name}" for alias in node.names]
        return [base]
    return []


def imports(tree: ast.AST, *, inside: str = "", is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, those for type checkers only included."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for module in modules_of(child, inside, is_package):
                yield Import(module, child.lineno, in_function)
            yield from walk(
                child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )

    yield from walk(tree, False)


def all_imports() -> Iterator[tuple[str, Import]]:
    for name, tree in TREES.items():
        for found in imports(tree, inside=name, is_package=IS_PACKAGE[name]):
            yield name, found


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def top(module: str) -> str:
    """unimega.kernels.registry -> kernels; the package itself (its version) -> ''."""
    parts = module.split(".")
    part = parts[1] if len(parts) > 1 else ""
    return "" if part.startswith("__version") else part


def test_imports_go_upward_only():
    wrong = []
    for name, found in all_imports():
        if found.module.split(".")[0] != "unimega":
            continue
        layer, target = name.split(".")[0], top(found.module)
        if layer == "__init__":
            wrong.append(f"unimega/__init__.py:{found.line} imports {found.module}: it imports nothing")
        elif layer not in MAY_IMPORT:
            wrong.append(f"unimega/{layer} has no place in the table of docs/architecture.md")
        elif target and target != layer and target not in MAY_IMPORT[layer]:
            wrong.append(f"unimega.{name}:{found.line} imports {found.module}: {layer} may not import {target}")
    assert not wrong, "\n".join(wrong)


def test_no_cycles_between_modules():
    names = set(TREES)
    edges: dict[str, set[str]] = {name: set() for name in names}
    for name, found in all_imports():
        if found.in_function or not found.module.startswith("unimega."):
            continue
        target = found.module.removeprefix("unimega.")
        target = target if target in names else target.rpartition(".")[0]
        if target in names and target != name:
            edges[name].add(target)
    while free := {name for name, targets in edges.items() if not targets & edges.keys()}:
        for name in free:
            del edges[name]
    assert not edges, f"modules that import each other: {sorted(edges)}"


def test_no_import_inside_a_function():
    wrong = [
        f"unimega.{name}:{found.line} imports {found.module} inside a function"
        for name, found in all_imports()
        if found.in_function and not is_within(name, IMPORTS_IN_FUNCTIONS)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_who_imports_what_others_wrote(package):
    wrong = [
        f"unimega.{name}:{found.line} imports {found.module}: only {', '.join(ONLY_IN[package])} may"
        for name, found in all_imports()
        if found.module.split(".")[0] == package and not is_within(name, ONLY_IN[package])
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_named_where_they_may_be():
    """``errors.optional("transformers", ...)`` and ``import_module`` are imports as well."""
    wrong = []
    for name, tree in TREES.items():
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not call.args or not isinstance(call.args[0], ast.Constant):
                continue
            function = getattr(call.func, "attr", getattr(call.func, "id", ""))
            package = str(call.args[0].value).split(".")[0]
            if function in ("optional", "import_module") and not is_within(name, ONLY_IN.get(package, (name,))):
                wrong.append(f"unimega.{name}:{call.lineno} loads {package}: only {', '.join(ONLY_IN[package])} may")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_never_imports_torch(package):
    wrong = [
        f"unimega.{name}:{found.line} imports {found.module}"
        for name, found in all_imports()
        if is_within(name, (package,)) and found.module.split(".")[0] in ("torch", "megatron", "transformers")
        # transformers imports torch; the tokenizer module may only load it where it is asked for
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_what_needs_no_torch_loads_none():
    modules = [f"unimega.{name}" for name in TREES if is_within(name, WITHOUT_TORCH)]
    load = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code = load + "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *modules], check=True, cwd=ROOT)


def strings_and_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every identifier and string of the code, docstrings left out."""
    documentation = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno


def test_only_backend_and_kernels_name_a_device():
    wrong = []
    for name, tree in TREES.items():
        if is_within(name, NAMES_DEVICES):
            continue
        for text, line in strings_and_names(tree):
            words = text.lower().replace(":", " ").replace(".", " ").replace("'", " ").split()
            if {"cuda", "npu"} & set(words):
                wrong.append(f"unimega.{name}:{line} names {text!r}")
    assert not wrong, "\n".join(wrong)


def test_nothing_reads_a_value_off_the_device():
    wrong = []
    for name, tree in TREES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "item":
                wrong.append(f"unimega.{name}:{call.lineno} calls .item()")
    assert not wrong, "\n".join(wrong)


def test_the_library_does_not_print():
    allowed = ("__main__", "errors", "config.reference")  # commands, and --help
    wrong = []
    for name, tree in TREES.items():
        for call in ast.walk(tree):
            prints = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"
            if prints and not is_within(name, allowed):
                wrong.append(f"unimega.{name}:{call.lineno} prints")
    assert not wrong, "\n".join(wrong)


def test_errors_are_not_swallowed():
    wrong = []
    for name, tree in TREES.items():
        for handler in ast.walk(tree):
            if isinstance(handler, ast.ExceptHandler) and handler.type is None:
                wrong.append(f"unimega.{name}:{handler.lineno} has a bare except")
    assert not wrong, "\n".join(wrong)


def test_the_redirection_comes_before_everything_else_in_parallel():
    """megatron-core names its device while it is imported: the backend must have acted by then."""
    body = TREES["parallel"].body
    installs = [node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert installs, "unimega/parallel/__init__.py installs nothing"
    early = [
        module for node in body if node.lineno < installs[0].lineno for module in modules_of(node, "parallel", True)
    ]
    for module in early:
        name = module.removeprefix("unimega.")
        assert name in TREES, f"unimega.parallel imports {module} before it installs the redirection"
        loaded = {found.module.split(".")[0] for found in imports(TREES[name]) if not found.in_function}
        assert "megatron" not in loaded, f"{module} imports megatron before the redirection is installed"


def test_the_walker_sees_what_it_must():
    tree = ast.parse("from . import a\nfrom ..kernels import b\ndef f():\n    import torch.nn\n")
    found = [(one.module, one.in_function) for one in imports(tree, inside="layers.norm")]
    assert found == [("unimega.layers.a", False), ("unimega.kernels.b", False), ("torch.nn", True)]
    (inside,) = imports(ast.parse("from . import a"), inside="layers", is_package=True)
    assert inside.module == "unimega.layers.a"
