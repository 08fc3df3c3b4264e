"""``python -m tests.kernels.npu.wheel FOLDER``: our rows through the schemas and meta kernels of torch-npu's own wheel.

FOLDER holds the Python part of an unpacked wheel. Nothing of it that needs CANN is imported: its operators are defined
from its table of functions, its meta kernels are executed with stand-ins for the modules that they import. Every call
goes to the meta kernel as well, which must agree with the simulation on shapes and dtypes. Prints one line of JSON.
"""

import functools
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.kernels.npu import contracts, simulation

TABLE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
KERNELS = "torch_npu/op_plugin/meta/_meta_registrations.py"
FRONT = "torch_npu/npu/__init__.py"
MEMBERS = (TABLE, KERNELS, FRONT)
STAND_INS = (
    "torch_npu",
    "torch_npu.utils",
    "torch_npu.utils._error_code",
    "torch_npu.npu",
    "torch_npu.npu.utils",
    "torch_npu.npu._backends",
)
FUSED_ADAMW = "_fused_adamw_"
compared: set[str] = set()


def table(folder: Path) -> dict[str, Any]:
    return yaml.load((folder / TABLE).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def schemas(functions: dict[str, Any]) -> list[str]:
    """Of the operators of torch-npu's own, as its code generator reads them."""
    found = (entry["func"] if isinstance(entry, dict) else entry for entry in functions["custom"])
    return [schema.removeprefix("npu::") for schema in found]


def load_meta_kernels(folder: Path) -> None:
    """Execute the wheel's registrations; its constants and questions about the machine get any answer."""

    class Anything(types.ModuleType):
        __path__ = ()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return 300 + hash(name) % 999

    stand_ins: dict[str, Any] = {name: Anything(name) for name in STAND_INS}
    stand_ins["torch_npu.utils._error_code"].ErrCode = Anything("ErrCode")
    stand_ins["torch_npu.utils._error_code"].ops_error = str
    stand_ins["torch_npu.npu._backends"].get_soc_version = lambda: 223
    stand_ins["torch_npu.npu.utils"].get_cann_version = lambda *_: "9.1.0"
    sys.modules.update(stand_ins)
    spec = importlib.util.spec_from_file_location("torch_npu_meta_kernels", folder / KERNELS)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for name in stand_ins:
        del sys.modules[name]


def compare(name: str, bound: contracts.Arguments, result: Any) -> None:
    """Hold the meta kernel's answer to a call against ``result``."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta"):
        return
    operator = getattr(torch.ops.npu, name).default
    to_meta = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor, lambda t: t.detach().to("meta"))
    positional = [a.name for a in operator._schema.arguments if not a.kwarg_only]
    kwargs = {a.name: to_meta(bound[a.name]) for a in operator._schema.arguments if a.kwarg_only}
    answer = operator(*(to_meta(bound[n]) for n in positional), **kwargs)
    leaves = torch.utils._pytree.tree_leaves
    for mine, theirs in zip(leaves(result), leaves(answer), strict=True):
        if isinstance(mine, torch.Tensor) and mine.numel():  # the simulation leaves out what we do not use
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), (name, mine.shape, theirs.shape)
    compared.add(name)


def main(folder: Path) -> None:
    functions = table(folder)
    simulation.install(tuple(schemas(functions)), compare)
    load_meta_kernels(folder)
    from tests.kernels.npu.test_rows import EVERY, row
    from tests.kernels.test_kernels import run

    failures = {}
    for name, (op, case) in EVERY.items():
        for dtype in (torch.float32, torch.bfloat16):
            try:
                run(row(op), case, dtype)
            except Exception as error:
                failures[f"{name} {dtype}"] = f"{type(error).__name__}: {error}"
    supported = [f["func"] if isinstance(f, dict) else f for f in functions["supported"]]
    report = {
        "operators": len(schemas(functions)),
        "calls": 2 * len(EVERY),
        "failures": failures,
        "compared": sorted(compared),
        "fused_adamw": [schema for schema in supported if schema.startswith(FUSED_ADAMW)],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
