"""Every Triton kernel compiles for sm_80 and sm_90 on a machine without a GPU, spills nothing, keeps its registers."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from unimega.kernels import availability

if availability.missing("triton") is not None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernels import compile_all

pytestmark = pytest.mark.timeout(600)  # the first test compiles them all, without a cache on a new machine

SHARED = {"80": 166_912, "90": 232_448}
"""Bytes of shared memory that a block may ask for."""
LAUNCHES = sorted({launch.name for launch in compile_all.launches()[0]})


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k != availability.INTERPRET}
    command = [sys.executable, "-m", "tests.kernels.compile_all"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_listed() -> None:
    assert compile_all.launches()[1] == []


# A test for each launch: the file is then among the largest, which `--dist loadfile` begins with.
@pytest.mark.parametrize("name", LAUNCHES)
def test_spills_nothing_and_fits(compiled: dict[str, Any], name: str) -> None:
    found = compiled["table"][name]
    assert found
    for capability, row in found.items():
        assert row["registers"] > 0
        assert (row["stack"], row["local"]) == (0, 0), f"sm_{capability} spills"
        assert row["shared"] <= SHARED[capability], f"sm_{capability} has no so much shared memory"


def test_the_page_is_of_the_triton_that_is_installed_for_development() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (pinned,) = [each for each in project["optional-dependencies"]["dev"] if each.startswith("triton")]
    assert f"triton {pin(pinned)} " in compile_all.PAGE.read_text(), "run: python -m tests.kernels.compile_all --write"


def test_the_page_lists_what_was_compiled(compiled: dict[str, Any]) -> None:
    kept = compile_all.PAGE.read_text()
    if f"triton {compiled['triton']} " not in kept:
        of_torch = [pin(each) for each in importlib.metadata.requires("torch") or () if each.startswith("triton")]
        if compiled["triton"] in of_torch:
            pytest.skip(f"docs/kernel_resources.md is of another triton than {of_torch[0]}, which this torch brings")
        pytest.fail(f'triton is {compiled["triton"]}, not what the page is of: pip install -e ".[dev]"')
    assert kept == compile_all.page(compiled), "run: python -m tests.kernels.compile_all --write"


def pin(requirement: str) -> str | None:
    """The version in ``name==version; marker``."""
    found = re.match(r"[\w-]+==([\w.]+)", requirement)
    return found[1] if found else None
