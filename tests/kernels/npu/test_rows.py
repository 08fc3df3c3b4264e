"""The rows over torch-npu's operators, on a CPU: results against the definitions, calls against the documentation."""

import importlib
from typing import Any

import pytest
import torch

from tests.kernels.cases import CASES, DEFINITIONS, Case
from tests.kernels.npu import simulation
from tests.kernels.test_kernels import DEVICE, run
from tests.tolerances import assert_as_good_as
from unimega.kernels import registry

if DEVICE.type != "cpu" or not simulation.install():
    pytest.skip("an NPU or a GPU runs its own rows", allow_module_level=True)

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = {op: impl for op in registry.ops() for impl in registry.implementations(op) if impl.name == "npu"}
UNDOCUMENTED = ("ties", "closed experts", "groups of one")
"""Of the gating operator; the row is not taken by auto for the first two, the operator refuses the third."""
EVERY = {
    f"{op}-{case.name}": (op, case)
    for op in ROWS
    for case in CASES[op]
    if op != "topk_routing" or not case.name.endswith(UNDOCUMENTED)
}


def row(op: str) -> Any:
    module, name = ROWS[op].target.split(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize(("op", "case"), EVERY.values(), ids=EVERY)
def test_matches_definition(op: str, case: Case, dtype: torch.dtype) -> None:
    got = run(row(op), case, dtype)
    low, exact = run(DEFINITIONS[op], case, dtype), run(DEFINITIONS[op], case, dtype, exact=True)
    for i, trio in enumerate(zip(got, low, exact, strict=True)):
        assert got[i].dtype == low[i].dtype
        assert_as_good_as(*trio, what=f"{op}, result {i}")
