"""Compile every kernel of ``unimega.kernels.triton`` ahead of time and print what each takes: one JSON object.

    python -m tests.kernels.compile_all --write     # keeps docs/kernel_resources.md, which a test compares

A process of its own: in the tests' processes Triton interprets, which is settled when it is imported. No GPU is needed:
Triton brings ptxas and cuobjdump.
"""

import argparse
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from unimega.kernels import triton as ours
from unimega.kernels.triton.launch import Launch

PAGE = Path(__file__).parents[2] / "docs" / "kernel_resources.md"
TEXT = """# What the Triton kernels take

Registers a thread and bytes of shared memory a block, as compiled ahead of time by triton {triton} for sm_80 (A100) and
sm_90 (H100, H200) at the sizes in the names; none has a stack or spills. Written by
`python -m tests.kernels.compile_all --write`, kept by `tests/kernels/test_ahead_of_time.py`.

| kernel | sm_80 registers | sm_80 shared | sm_90 registers | sm_90 shared |
|---|---:|---:|---:|---:|
"""
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def main() -> None:
    """Print {"triton": version, "missing": [kernel], "table": {launch: {capability: {registers, stack, ...}}}}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a launch's name")
    parser.add_argument("--write", action="store_true", help="write docs/kernel_resources.md")
    options = parser.parse_args()
    wanted = options.only
    every, missing = launches()
    table: dict[str, dict[str, dict[str, int]]] = {}
    for launch in every:
        if wanted in launch.name:
            table.setdefault(launch.name, {}).update({str(c): resources(launch, c) for c in launch.capabilities})
    result = {"triton": triton.__version__, "missing": missing, "table": table}
    print(json.dumps(result))
    if options.write:
        PAGE.write_text(page(result))


def launches() -> tuple[list[Launch], list[str]]:
    """The launches that modules list, and the kernels that are in none of them."""
    listed: list[Launch] = []
    entries: dict[int, str] = {}
    for info in pkgutil.iter_modules(ours.__path__):
        module = importlib.import_module(f"{ours.__name__}.{info.name}")
        listed += list(getattr(module, "LAUNCHES", ()))
        own = [v for v in vars(module).values() if hasattr(v, "fn") and inspect.getmodule(v.fn) is module]
        entries |= {id(v.fn): f"{info.name}.{v.fn.__name__}" for v in own if not v.fn.__name__.startswith("_inline")}
    known = {id(launch.kernel.fn) for launch in listed}
    return listed, sorted(name for key, name in entries.items() if key not in known)


def page(result: dict[str, Any]) -> str:
    """The table as a page."""
    rows = []
    for name, found in sorted(result["table"].items()):
        cells = (str(found[c][key]) if c in found else "" for c in ("80", "90") for key in ("registers", "shared"))
        rows.append(f"| {name} | " + " | ".join(cells) + " |\n")
    return TEXT.format(triton=result["triton"]) + "".join(rows)


def resources(launch: Launch, capability: int) -> dict[str, int]:
    """Registers a thread, bytes of stack (where spilled registers go) and local memory, bytes of shared memory."""
    names = launch.kernel.arg_names
    types = {name: "constexpr" if name in launch.constants else launch.types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in launch.multiples]
    attributes: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=dict(launch.constants), attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    main()
