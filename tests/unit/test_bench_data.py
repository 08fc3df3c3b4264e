"""The data benchmark: its documents, what packing reaches on them, and (slow) a whole quick run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unimega.data import native, packing
from unimega.data.corpus import Source
from unimega.data.plan import DataPlan, Recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import mixes  # noqa: E402

FILLED = {"A": 0.998, "B": 0.983, "C": 0.998}


@pytest.mark.parametrize("name", FILLED)
def test_packs_are_full(name):
    """A million documents in one window where the helper is compiled, a tenth of them in Python."""
    lengths = mixes.mix(name, 1_000_000 if native.helper is not None else 100_000).assembled()
    fits = lengths[lengths <= 10_240]
    start = time.process_time()
    packs = packing.best_fit(fits, 10_240)
    seconds = time.process_time() - start
    used = np.add.reduceat(fits[packs.items], packs.starts[:-1])
    assert np.array_equal(np.bincount(packs.items), np.ones(len(fits))), "a document twice, or not at all"
    assert used.max() <= 10_240 and used.sum() + lengths[lengths > 10_240].sum() == lengths.sum()
    assert fits.sum() / (packs.num_packs * 10_240) >= FILLED[name]
    assert seconds < 0.6, "0.02 to 0.04 s of C++, or a tenth of 0.6 s of Python, on a busy core"


def test_the_mix_is_what_a_corpus_of_it_becomes(tmp_path):
    made = mixes.mix("A", 300)
    mixes.write(tmp_path / "a", made)
    recipe = Recipe(pack_length=1 << 18, templates="none", unconditional_ratio=0.0)
    plan = DataPlan([Source(path=str(tmp_path / "a"))], mixes.VOCABULARY, recipe, evaluation=True)
    window = plan.window_of(0)
    captions = np.add.reduceat(made.modes == 0x10, made.documents[:-1])
    exact = np.empty(300, dtype=np.int64)
    exact[window.document] = window.length
    expected = made.assembled()
    same = captions == 0
    assert np.array_equal(exact[same], expected[same]) and plan.pack(0).mask.any()
    assert (np.abs(exact - expected) <= 400).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_data.py"), "--quick", "--folder", str(tmp_path)]
    command += ["--only", "packing", "plan", "index", "reads", "loader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=550)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["part"] for record in records} == {"packing", "plan", "index", "reads", "loader"}
    opened = next(record for record in records if record["part"] == "index" and record["contestant"] == "ours")
    assert opened["open_cpu_ms"] < 50 and opened["open_mb"] < 20
    assert all(record["equal_to_python"] for record in records if record["part"] == "packing")
    assert len({record["plan"] for record in records if record["part"] == "plan"}) == 1
