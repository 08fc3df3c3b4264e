"""Schedules and FLOPs: arithmetic that a run reports or obeys."""

import json
import math
from dataclasses import replace

import pytest

from tests.models import PRESETS, microbatch
from unimega.config.schema import OptimizerConfig
from unimega.training.flops import step_flops
from unimega.training.metrics import Metrics
from unimega.training.schedule import learning_rate

OPTIMIZER = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10)


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("linear", 35, 0.775),
        ("linear", 109, 0.109),
        ("constant", 109, 1.0),
        ("wsd", 98, 1.0),
        ("wsd", 110, 0.1),
    ],
)
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(step, 110, replace(OPTIMIZER, schedule=schedule)) == pytest.approx(expected, abs=1e-3)


def test_flops_are_six_per_weight_and_token_plus_attention() -> None:
    model = PRESETS["unix"]
    batch = microbatch(model, "mixed", 1)
    attention = 4 * 12
    linears = 32 * (2 * attention + 2 * 2 * 12) + 3 * 32 * 24
    documents = sum(n * (n + 1) // 2 for n in batch.order.documents.lengths)
    own = sum(n * (n + 1) // 2 for n in batch.order.own.lengths)
    expected = 6 * 4 * 64 * linears + 3 * 4 * attention * 2 * (documents + own)
    expected += 6 * len(batch.loss_rows) * 32 * 43
    assert step_flops(model, [batch]) == expected


def test_metrics_append_and_hold_no_nan(tmp_path) -> None:
    for step in (1, 2):
        metrics = Metrics(str(tmp_path))
        metrics.write({"step": step, "loss": math.nan})
        metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
