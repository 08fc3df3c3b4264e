"""The project around the code: make targets, what the pages promise, packaging, what no file may hold."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"setup", "demo", "test", "test-all", "lint", "doctor"}
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def run(*command, cwd=ROOT, **options):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


def tracked_files():
    """What git would put in a clone; without git, what lies here."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode == 0:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts)]


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_importing_unimega_loads_nothing_heavy():
    heavy = ["torch", "numpy", "megatron", "sklearn"]
    code = f"import sys, unimega; print([name for name in {heavy} if name in sys.modules])"
    done = run(sys.executable, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_setup_imports_no_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    loaded = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    loaded |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert loaded == {"sys", "setuptools", "pybind11"}


def test_make_has_the_targets_that_pages_name():
    assert make_targets() >= TARGETS
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text()))
        assert named <= make_targets(), page


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    links = {link for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", text)}
    named = set(re.findall(r"\b((?:tools|examples|benchmarks|csrc)/[\w/]+\.\w+)", text))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page} names {missing}"


def test_tests_that_hold_a_constraint_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"tests/[\w/]+\.py", text))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test\n" in script.read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_packaging_says_what_the_code_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[; ]", line)[0] for line in project["dependencies"]}
    assert names >= {"torch", "megatron-core", "numpy", "tyro", "safetensors", "psutil", "tensorboard"}
    assert "megatron-core>=0.16,<0.17" in project["dependencies"]
    extras = set(project["optional-dependencies"])
    assert extras >= {"triton", "hf", "data", "demo", "wandb", "apex", "flash-attn", "transformer-engine", "npu", "dev"}
    used = set()
    for path in (ROOT / "unimega").rglob("*.py"):
        used |= set(re.findall(r"\bextra=\"([\w-]+)\"", path.read_text()))
    assert used <= extras, "errors.optional names an extra that pyproject.toml lacks"


def test_no_file_names_a_machine():
    """A path of the machine that someone worked on would be wrong everywhere else."""
    words = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/")
    wrong = []
    for path in tracked_files():
        if (
            path.suffix in {".py", ".md", ".toml", ".cpp", ".cu", ".json", ".sbatch", ""}
            and path.stat().st_size < 1 << 20
        ):
            for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
                if words.search(line) and path != Path(__file__).resolve():
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not wrong, "\n".join(wrong)


def test_sources_are_ascii():
    wrong = []
    for path in tracked_files():
        if path.suffix in {".py", ".cpp", ".cu", ".h", ".sbatch"} or path.name in {"Makefile", "CMakeLists.txt"}:
            wrong += [str(path.relative_to(ROOT))] if not path.read_bytes().isascii() else []
    assert not wrong


def test_shell_scripts_parse():
    for script in (ROOT / ".ci" / "run", ROOT / "examples" / "slurm" / "pretrain.sbatch"):
        done = run("bash", "-n", str(script))
        assert done.returncode == 0, done.stderr


def test_slurm_script_refuses_to_run_without_a_file():
    done = run("bash", str(ROOT / "examples" / "slurm" / "pretrain.sbatch"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


@needs_make
def test_setup_refuses_an_unsupported_python_in_one_line(tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    old = tmp_path / "old python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run("make", "setup", f"PYTHON={old}", cwd=folder)
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12" in done.stderr.splitlines()[0]
    assert not (folder / ".venv").exists()


@needs_cmake
@pytest.mark.parametrize(
    ("option", "status", "words"),
    [
        ("", 0, "nothing to compile"),
        ("rocm", 1, "UNIMEGA_BUILD='rocm' is wrong"),
    ],
)
def test_cmake_configures(tmp_path, option, status, words):
    done = run("cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DUNIMEGA_BUILD={option}")
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr
