"""Schedules, FLOPs, metrics and the clock; what a run refuses before ranks meet."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.models import PRESETS, microbatch
from tests.unit import config_cases
from tests.unit.data_corpora import BOI, CODEBOOK, TEXT, VOCABULARY, random_documents, write
from unimega.config.schema import OptimizerConfig, RunConfig
from unimega.data.plan import Recipe
from unimega.errors import ConfigError, DataError
from unimega.training import loop
from unimega.training.flops import step_flops
from unimega.training.metrics import Clock, Metrics
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


def test_a_modality_without_a_loss_is_null() -> None:
    found = loop.modality_losses(("text", "vision", "audio"), (0.0, 6.0, 0.0), (5, 3, 0), (0.0, 4.0, 1.0))
    assert found == {"loss_text": None, "loss_vision": 2.0, "loss_audio": None}


def test_pauses_belong_to_no_step() -> None:
    times = iter([0.0, 10.0, 10.0, 110.0, 114.0, 114.0])
    clock = Clock(now=lambda: next(times))
    assert clock.lap(5) == 2.0
    with clock.paused():
        pass
    assert clock.lap(9) == 1.0
    assert clock.left(9, 18) == 114.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run on a small corpus whose tokenizer names the vision ids, in an empty folder."""
    config_cases.enter_empty_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(loop.log, "setup", lambda **_: None)  # it would keep records from pytest's own handler
    write(tmp_path / "a", random_documents(40, 1))
    data = {"train": [{"path": "a"}], "window_tokens": 4096, "templates": "none"}
    return config_cases.run(config_cases.base(model={"vision_offset": TEXT, "codebook": CODEBOOK}, data=data))


def refusal(run: RunConfig, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        loop.train(run)
    assert not dist.is_initialized() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("section", ["checkpoint", "logging"])
def test_a_folder_that_cannot_be_made(section: str, run: RunConfig) -> None:
    Path("file").touch()
    for name, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        changed = replace(run, **{section: replace(getattr(run, section), directory=name)})
        line = f"{section}.directory={name!r} is no folder that can be written ({reason}). Name another one."
        assert refusal(changed) == line


@pytest.mark.parametrize(("section", "name"), [("checkpoint", "latest"), ("logging", "metrics.jsonl")])
def test_a_folder_of_an_earlier_run(section: str, name: str, run: RunConfig) -> None:
    folder = Path(getattr(run, section).directory)
    folder.mkdir()
    (folder / name).write_text("{}\n")
    line = f"{section}.directory={str(folder)!r} holds {name} of an earlier run, and resuming is not built yet. "
    assert refusal(run) == line + "Name another directory, or remove this one."


def test_a_missing_held_out_corpus_is_told_before_ranks_meet(run: RunConfig) -> None:
    data = replace(run.data, evaluation=("nowhere",))
    assert "nowhere" in refusal(replace(run, data=data), DataError)


def test_vision_ids_of_the_tokenizer_are_kept_in_the_run(run: RunConfig) -> None:
    assert run.model.vision_ids is None
    resolved = loop.resolved(run)
    assert resolved.model.vision_ids == (BOI,)
    plan, evaluations = loop.plans(resolved)
    assert plan.vocabulary == VOCABULARY and not evaluations


def test_every_key_of_the_data_reaches_the_plan(run: RunConfig) -> None:
    data = replace(run.data, overlong="drop", evaluation=("a",))
    plan, evaluations = loop.plans(loop.resolved(replace(run, data=data)))
    assert plan.recipe == Recipe(**{k: v for k, v in asdict(data).items() if k not in ("train", "evaluation")})
    assert plan.recipe.overlong == "drop" and list(evaluations) == ["a"]
    training = replace(run.training, evaluate_every_steps=0)
    assert not loop.plans(loop.resolved(replace(run, data=data, training=training)))[1]
