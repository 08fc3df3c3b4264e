"""The preprocessing benchmark: its text, what it takes for equal, and (slow) a whole run."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unimega.data import format as layout
from unimega.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_preprocess  # noqa: E402
import texts  # noqa: E402


def corpus(prefix, documents, *, modes):
    lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
    parts = layout.index_parts(lengths, np.arange(len(documents) + 1), np.zeros(len(documents), dtype=np.int8))
    Path(f"{prefix}.idx").write_bytes(b"".join(parts[: None if modes else -1]))
    np.concatenate([np.array(ids, dtype="<i4") for ids in documents]).tofile(f"{prefix}.bin")
    return str(prefix)


def test_other_ids_or_other_documents_are_found(tmp_path):
    first = corpus(tmp_path / "a", [[1, 2], [3]], modes=True)
    assert bench_preprocess.compare(first, corpus(tmp_path / "b", [[1, 2], [3]], modes=False)) == 3
    for other in ([[1, 2], [4]], [[1], [2, 3]], [[1, 2, 3]]):
        with pytest.raises(DataError, match="differ"):
            bench_preprocess.compare(first, corpus(tmp_path / "c", other, modes=False))


def test_the_cost_is_of_the_command_and_its_children():
    work = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(80 << 20); sum(range(4000000))'])"
    )
    idle = bench_preprocess.run([sys.executable, "-c", "pass"])
    cost = bench_preprocess.run([sys.executable, "-c", work])
    assert cost.cpu_seconds > idle.cpu_seconds + 0.02
    held = bench_preprocess.run([sys.executable, "-c", "x = b'x' * (80 << 20)"])
    assert held.peak_bytes > idle.peak_bytes + (70 << 20)
    with pytest.raises(DataError, match="no such luck"):
        bench_preprocess.run([sys.executable, "-c", "raise SystemExit('no such luck')"])


def test_a_checkout_comes_before_what_is_installed(tmp_path):
    """Megatron-LM's tool appends its checkout to the path, where the installed megatron-core would shadow its own."""
    (tmp_path / "pytest.py").write_text("raise SystemExit('of the checkout')")
    with pytest.raises(DataError, match="of the checkout"):
        bench_preprocess.run([sys.executable, "-c", "import pytest"], first_on_path=str(tmp_path))
    tool = tmp_path / "tools" / "preprocess_data.py"
    ways = bench_preprocess.contestants(tmp_path, tmp_path)
    assert str(tool) in ways[0].command(tmp_path, tmp_path)
    assert [way.first_on_path for way in ways] == [str(tmp_path), "", "", ""]


def test_the_text_is_real_and_does_not_repeat(monkeypatch):
    first = list(itertools.islice(texts.documents(), 300))
    assert first == list(itertools.islice(texts.documents(), 300))
    assert len(set(first)) == 300 and sum(map(len, first)) > 300_000
    assert not any(special in text for text in first for special in texts.SPECIALS)
    monkeypatch.setattr(texts, "_files", lambda root: iter([str(ROOT / "README.md")]))
    monkeypatch.setattr(texts, "_LEAST_BYTES", 1000)
    again = list(itertools.islice(texts.documents(), 40))
    assert len(set(again)) == 40, "a second turn over the same files has other words"
    monkeypatch.setattr(texts, "_LEAST_BYTES", 1 << 40)
    with pytest.raises(DataError, match="Install more packages"):
        list(itertools.islice(texts.documents(), 40))


@pytest.mark.slow
def test_a_small_run(tmp_path):
    output = tmp_path / "lines.jsonl"
    sizes = {"--mb": ["0.4"], "--slow-mb": ["0.2"], "--memory-mb": ["0.2", "0.4"], "--vocabulary": ["900"]}
    arguments = [word for flag, values in sizes.items() for word in (flag, *values)]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_preprocess.py"), *arguments]
    command += ["--rounds", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert output.read_text() == done.stdout
    ways = [line["way"] for line in lines if line["what"] == "speed"]
    assert ways == ["megatron_loop", "gigatoken", "word-cache", "reference", "gigatoken"]
    assert [line["way"] for line in lines if line["what"] == "memory"] == ["gigatoken", "gigatoken"]
    assert all(line["tokens"] > 10_000 for line in lines if line["what"] == "speed")


def test_a_wrong_checkout_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_preprocess.py"), "--megatron", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "It has no tools/preprocess_data.py" in done.stderr
