"""The step benchmark runs, compares equal models, and says what the README of the benchmarks promises."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "tokens=96 shortest=16 longest=48 width=32 layers=4 heads=4 kv_heads=2 ffn=48 text_rows=32 codes=32"
KEYS = """
    benchmark precision model parameters flops seconds seconds_min seconds_max tokens_per_s flops_per_s rounds
    gemm_flops_per_s_square gemm_flops_per_s_model fraction_of_square fraction_of_model_gemms
    ratio_to_dense ratio_to_masked cpu_ratio_to_dense flops_to_dense syncs_forward_backward syncs_step
    loss_after_one_step shape device threads torch megatron_core commit date
"""


def bench(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_step.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_prints_and_writes_a_line_per_precision_and_model(tmp_path):
    output = tmp_path / "lines.jsonl"
    done = bench("--shape", *SHAPE.split(), "--steps", "1", "--threads", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert output.read_text() == done.stdout
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(record) == set(KEYS.split()) for record in records)
    found = {(record["precision"], record["model"]): record for record in records}
    assert set(found) == {(p, m) for p in ("fp32", "bf16") for m in ("unix", "dense", "dense_document", "masked")}
    for precision in ("fp32", "bf16"):
        unix, dense, masked = (found[precision, name] for name in ("unix", "dense", "masked"))
        assert unix["flops"] == dense["flops"]
        assert unix["parameters"] == masked["parameters"] > dense["parameters"]
        assert unix["syncs_forward_backward"] == dense["syncs_forward_backward"] == 0
        assert masked["syncs_forward_backward"] > 20
        assert dense["ratio_to_dense"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_an_unknown_size_is_one_line():
    done = bench("--shape", "depth=3")
    assert done.returncode == 2
    assert done.stderr.startswith("unimega: --shape 'depth=3' is wrong.") and len(done.stderr.splitlines()) == 1
