"""Every Triton kernel compiles for sm_80 and sm_90 on a machine without a GPU, spills nothing, keeps its registers."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels import compile_all
from unimega.kernels import availability

pytestmark = [
    pytest.mark.skipif(availability.missing("triton") is not None, reason="triton is not installed"),
    pytest.mark.timeout(600),  # the first test compiles them all, without a cache on a new machine
]

SHARED = {"80": 166_912, "90": 232_448}
"""Bytes of shared memory that a block may ask for."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k != availability.INTERPRET}
    command = [sys.executable, "-m", "tests.kernels.compile_all"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_compiled(compiled: dict[str, Any]) -> None:
    assert compiled["missing"] == []


def test_nothing_spills(compiled: dict[str, Any]) -> None:
    spilled = {
        (name, c): row for name, found in compiled["table"].items() for c, row in found.items()
        if row["stack"] or row["local"]
    }  # fmt: skip
    assert not spilled


def test_shared_memory_fits(compiled: dict[str, Any]) -> None:
    for name, found in compiled["table"].items():
        for capability, row in found.items():
            assert row["shared"] <= SHARED[capability], name


def test_the_page_lists_what_was_compiled(compiled: dict[str, Any]) -> None:
    kept = compile_all.PAGE.read_text()
    if f"triton {compiled['triton']} " not in kept:
        pytest.skip(f"docs/kernel_resources.md is of another triton than {compiled['triton']}")
    assert kept == compile_all.page(compiled), "run: python -m tests.kernels.compile_all --write"
