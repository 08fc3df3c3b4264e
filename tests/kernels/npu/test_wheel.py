"""Our rows against torch-npu's own wheel: recorded schemas, schemas and meta kernels in an environment of its own.

The wheel is never installed: with it in an environment and no CANN beside it, importing torch itself fails. It is
downloaded (44 MB) and its Python part unpacked into a folder that a process of its own reads.
"""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.npu import wheel
from tests.kernels.npu.simulation import SCHEMAS
from tests.kernels.npu.test_rows import EVERY
from unimega.backend import npu, npu_redirection
from unimega.kernels.adamw import AdamW

VERSION = "2.13.0"
ROOT = Path(__file__).resolve().parents[3]
PIP = ("pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--retries", "0", "--timeout", "20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python part of the wheel."""
    place = tmp_path_factory.mktemp("torch_npu")
    command = [sys.executable, "-m", *PIP, "--only-binary", ":all:", "-d", str(place), f"torch-npu=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    except subprocess.TimeoutExpired:
        pytest.skip("torch-npu's wheel did not arrive in 100 s")
    if done.returncode:
        pytest.skip(f"torch-npu's wheel cannot be had: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    (path,) = place.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        for member in wheel.MEMBERS:
            archive.extract(member, place)
    path.unlink()
    return place


@pytest.fixture(scope="module")
def report(folder: Path) -> Any:
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-m", wheel.__name__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_recorded_schemas_are_the_wheel_s(folder: Path) -> None:
    assert not set(SCHEMAS) - set(wheel.schemas(wheel.table(folder)))


def test_every_call_agrees_with_the_meta_kernels(report: Any) -> None:
    assert report["failures"] == {}
    assert report["calls"] == 2 * len(EVERY) > 100
    assert report["operators"] > 400
    assert set(report["compared"]) == {schema.partition("(")[0] for schema in SCHEMAS}


def test_every_name_of_the_backend_is_in_torch_npu(folder: Path) -> None:
    """``self.module.NAME`` of the backend, ``npu.NAME`` of the redirection, and the names that it takes as they are."""
    used = set(npu_redirection.SAME)
    for module, owner in ((npu, "self.module"), (npu_redirection, "npu")):
        tree = ast.parse(Path(module.__file__).read_text())
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        used |= {node.attr for node in attributes if ast.unparse(node.value) == owner}
    there: set[str] = set()
    for node in ast.walk(ast.parse((folder / wheel.FRONT).read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            there = set(ast.literal_eval(node.value))
    assert len(used) >= 25
    assert not used - there


def test_adamw_is_the_fused_one_of_the_wheel(report: Any) -> None:
    """``_fused_adamw_`` with a rate that is a number; the overload with a tensor has no kernel there."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with Record():
        AdamW([weight], lr=0.1).step()
    assert torch.ops.aten._fused_adamw_.default in called
    assert report["fused_adamw"] == [str(torch.ops.aten._fused_adamw_.default._schema).removeprefix("aten::")]
