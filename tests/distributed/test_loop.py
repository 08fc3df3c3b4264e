"""Runs that are stopped and go on, steps that are no numbers, and what ends up in metrics and TensorBoard."""

import json
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.distributed.harness import run_dist

VOLATILE = ("tokens_per_s", "mfu", "memory_bytes", "step_time_min", "step_time_median", "step_time_max")
EVERYTHING = {"training": {"steps": 6, "evaluate_every_steps": 2}, "checkpoint": {"every_steps": 2}}


def numbers(config: Any) -> list[dict[str, Any]]:
    """The records without what a clock says."""
    dropped = (*VOLATILE, "step_time_slowest_rank")
    return [{key: value for key, value in record.items() if key not in dropped} for record in runs.records(config)]


def run(config: Any, before: Callable[[], None] | None = None, world: int = 2) -> str:
    """On a new world; the line of the first rank that ended with one."""
    return next((line for line in run_dist(runs.train, world=world, args=(config, before)) if line), "")


def change_step(number: int, change: Callable[..., Any]) -> None:
    """Have ``change(engine, original, microbatches, **options)`` do the engine's step of this number, from 1."""
    from unimega.training.engine import Engine

    original, made = Engine.step, [0]

    def step(engine: Any, microbatches: Any, **options: Any) -> Any:
        made[0] += 1
        return (change if made[0] == number else _plain)(engine, original, microbatches, **options)

    Engine.step = step  # type: ignore[method-assign]


def _plain(engine: Any, original: Any, microbatches: Any, **options: Any) -> Any:
    return original(engine, microbatches, **options)


def asked_in_step_3() -> None:
    """Rank 1 alone gets the signal, in the middle of its third step."""
    kill_in(3, signal.SIGTERM, rank=1)


def kill_in(number: int, what: signal.Signals, *, rank: int) -> None:
    def change(engine: Any, original: Any, microbatches: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), what)
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(engine, microbatches, **options)

    change_step(number, change)


def crash_in_step_6() -> None:
    def change(engine: Any, original: Any, microbatches: Any, **options: Any) -> Any:
        from unimega.errors import UnimegaError

        raise UnimegaError("killed")

    change_step(6, change)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run of 6 steps on two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    config = runs.make(folder, data={"evaluation": [str(folder / "a")]}, **EVERYTHING)
    assert run(config) == ""
    return config


def again(straight: Any, folder: Path, **sections: dict[str, Any]) -> Any:
    """The same run in another folder."""
    merged = runs.config_cases.strict.merge(EVERYTHING, sections)
    return runs.make(folder, data={"evaluation": [straight.data.evaluation[0]]}, **merged)


def test_a_signal_to_one_rank_saves_all_at_the_same_step_and_the_run_goes_on(straight: Any, tmp_path: Path) -> None:
    config = again(straight, tmp_path)
    assert run(config, asked_in_step_3) == ""
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003"
    assert [record["step"] for record in numbers(config)] == [1, 2, 2, 3]
    assert run(config) == ""
    assert numbers(config) == numbers(straight)
    assert [r["step"] for r in numbers(config)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_records_after_the_checkpoint_come_once(straight: Any, tmp_path: Path) -> None:
    """A run that dies after step 5 goes on from 4; its last record was torn."""
    config = again(straight, tmp_path)
    assert run(config, crash_in_step_6) == "killed"
    file = tmp_path / "logs" / "metrics.jsonl"
    assert json.loads(file.read_text().splitlines()[-1])["step"] == 5
    with file.open("a") as torn:
        torn.write('{"step": 6, "loss": 3.')
    assert run(config) == ""
    assert numbers(config) == numbers(straight)
    assert scalars(tmp_path / "logs") == scalars(Path(straight.logging.directory))


def scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(logs / "tensorboard"))
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if "loss" in tag or "lr" in tag]
    assert {"train/loss", "train/loss_text", "train/loss_vision", "train/lr", "evaluation/a/loss_text"} <= set(tags)
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def test_tensorboard_and_metrics_agree(straight: Any) -> None:
    shown = scalars(Path(straight.logging.directory))
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in shown["evaluation/a/loss_text"]] == [2, 4, 6]
    first = runs.records(straight)[0]
    assert shown["train/loss"][0][1] == pytest.approx(first["loss"])
    assert list(first)[:8] == ["step", "loss", "loss_text", "loss_vision", "grad_norm", "lr", "tokens_per_s", "mfu"]
    assert first["memory_bytes"] > 1e6 and first["step_time_median"] is None
    second = runs.records(straight)[1]
    assert 0 < second["step_time_min"] <= second["step_time_median"] <= second["step_time_max"]
    assert second["step_time_slowest_rank"] in (0, 1)


def test_a_finished_run_says_so_and_a_longer_one_goes_on(straight: Any, tmp_path: Path) -> None:
    same = {"optimizer": {"schedule": "constant"}, "training": {"evaluate_every_steps": 0}}
    config = again(straight, tmp_path, **same, checkpoint={"every_minutes": 1e-9, "every_steps": 0, "keep": 10})
    assert run(config) == ""
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == [f"step-{step:08d}" for step in range(1, 7)], "rank 0's clock was to save every step"
    before = numbers(config)
    log = run_dist(told, world=1, args=(config,))[0]
    assert [line for line in log if "nothing to do" in line] == [
        f"all 6 steps are done, {config.checkpoint.directory} holds step 6: nothing to do. "
        "A larger training.steps goes on from there"
    ]
    assert numbers(config) == before
    longer = again(straight, tmp_path, **same | {"training": {"steps": 8, "evaluate_every_steps": 0}})
    assert run(longer) == ""
    assert numbers(longer)[:6] == before and [r["step"] for r in numbers(longer)] == list(range(1, 9))


def told(config: Any) -> list[str]:
    """On a rank: the run; what it logged."""
    import logging

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    from unimega import log

    setup = log.setup

    def with_keeper(**options: Any) -> None:
        setup(**options)
        logging.getLogger("unimega").addHandler(Keep())

    log.setup = with_keeper
    if line := runs.train(config):
        lines.append(f"error: {line}")
    return lines


def test_another_batch_size_goes_on_with_the_next_pack(straight: Any, tmp_path: Path) -> None:
    constant = {"optimizer": {"schedule": "constant", "warmup_steps": 0}, "training": {"evaluate_every_steps": 0}}
    config = again(straight, tmp_path, **constant)
    assert run(config, asked_in_step_3, world=1) == ""  # RANK is 0: no signal
    sizes = {"steps": 8, "evaluate_every_steps": 0, "global_batch_packs": 16}
    log = run_dist(told, world=1, args=(again(straight, tmp_path, **constant | {"training": sizes}),))[0]
    assert any("does not divide the 24 packs so far: 8 packs are left out" in line for line in log)
    state = json.loads((tmp_path / "checkpoints" / "step-00000008" / "training.json").read_text())
    assert state["training"]["data"]["packs"] == 64


def test_another_corpus_under_the_same_name_is_refused(tmp_path: Path) -> None:
    config = runs.make(tmp_path, training={"steps": 2})
    assert run(config, world=1) == ""
    runs.data_corpora.write(tmp_path / "a", runs.data_corpora.random_documents(41, 1))
    longer = runs.make(tmp_path, training={"steps": 3})
    line = run(longer, world=1)
    assert line.startswith("cannot resume: corpus 'a' had [40, ") and "now [41, " in line
    allowed = runs.make(tmp_path, training={"steps": 3}, data={"allow_change": True})
    assert run(allowed, world=1) == "" and numbers(allowed)[-1]["step"] == 3


POISONS = {"nan": float("nan"), "huge": 1e37}


def poisoned(number: int, value: float, *, rank: int) -> None:
    """The loss weights of one rank's micro-batches of this step are no numbers, or so large that the norm is none."""

    def change(engine: Any, original: Any, microbatches: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            for batch in microbatches:
                batch.loss_weights.mul_(value)
        return original(engine, microbatches, **options)

    change_step(number, change)


def nan_in_step_3() -> None:
    poisoned(3, POISONS["nan"], rank=1)


def huge_in_step_3() -> None:
    poisoned(3, POISONS["huge"], rank=1)


def no_update_in_step_3() -> None:
    def change(engine: Any, original: Any, microbatches: Any, **options: Any) -> Any:
        from unimega.parallel import optimizer

        update, optimizer.update = optimizer.update, lambda *_: None
        try:
            return original(engine, microbatches, **options)
        finally:
            optimizer.update = update

    change_step(3, change)


LAYOUTS = {"dp 2": {}, "tp 2": {"tp": 2, "sequence_parallel": True}, "no overlap, bf16": {"overlap": False}}


@pytest.mark.parametrize("layout, poison", [("dp 2", nan_in_step_3), ("tp 2", huge_in_step_3), ("bf16", nan_in_step_3)])
def test_a_batch_that_is_no_number_changes_nothing(layout: str, poison: Callable[[], None], tmp_path: Path) -> None:
    options = {"parallel": LAYOUTS.get(layout, {"overlap": False})}
    options |= {"training": {"precision": "bf16" if layout == "bf16" else "fp32"}}
    skipped, left_out = (runs.make(tmp_path / name, **options) for name in ("skipped", "left out"))
    assert run(skipped, poison) == "" and run(left_out, no_update_in_step_3) == ""
    ours, theirs = numbers(skipped), numbers(left_out)
    assert ours[2]["skipped_steps"] == ours[5]["skipped_steps"] == 1
    assert ours[2]["loss"] is None or ours[2]["grad_norm"] is None
    for mine, reference in zip(ours[3:], theirs[3:], strict=True):
        assert mine["loss"] == reference["loss"] and mine["grad_norm"] == reference["grad_norm"]


def nan_from_step_3() -> None:
    for number in (3, 4, 5, 6):
        poisoned(number, POISONS["nan"], rank=0)


def nan_in_the_first_two() -> None:
    for number in (1, 2):
        poisoned(number, POISONS["nan"], rank=0)


def test_too_many_in_a_row_stop_the_run_and_a_restart_counts_on(tmp_path: Path) -> None:
    config = runs.make(tmp_path, training={"steps": 9}, checkpoint={"every_steps": 4})
    line = run(config, nan_from_step_3)
    assert line.startswith("step 6: loss nan (packs 20-23: a documents ")
    assert "4 steps in a row, training.max_skipped_steps=3. Lower optimizer.lr" in line
    assert [record["loss"] is None for record in numbers(config)] == [False, False, True, True, True]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004"
    line = run(config, nan_in_the_first_two)  # steps 5 and 6 after 3 and 4
    assert line.startswith("step 6: loss nan (packs 20-23:") and "4 steps in a row" in line
    assert run(config) == ""
    assert [record["skipped_steps"] for record in numbers(config)] == [0, 0, 1, 2, 2, 2, 2, 2, 2]


def late_in_step_4() -> None:
    """Rank 1 reaches its fourth step when the others have given up."""

    def change(engine: Any, original: Any, microbatches: Any, **options: Any) -> Any:
        import time

        if int(os.environ["RANK"]) == 1:
            time.sleep(6)
        return original(engine, microbatches, **options)

    change_step(4, change)


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    config = runs.make(tmp_path, parallel={"timeout_minutes": 2 / 60})
    waiting, late = run_dist(runs.train, world=2, args=(config, late_in_step_4))
    assert waiting.startswith(
        "rank 0 waited 2 s (parallel.timeout_minutes) for the gather of parameters at step 4. "
        "rank 1 did not arrive: last seen in its own code at step 4."
    )
    assert late.startswith("rank 1 lost the connection to another rank in the gather of parameters at step 4:")


def test_wandb_gets_what_metrics_get(tmp_path: Path) -> None:
    config = runs.make(tmp_path, logging={"wandb": True}, training={"steps": 3}, checkpoint={"every_steps": 2})
    assert run(config, without_wandb, world=1).startswith("package 'wandb' is needed here and cannot be imported")
    assert run(config, crash_wandb, world=1).startswith("logging.wandb=true: wandb cannot start (no api key). Log in")
    assert run(config, fake_wandb, world=1) == ""
    first, *logged, last = [json.loads(line) for line in (tmp_path / "logs" / "fake.jsonl").read_text().splitlines()]
    assert first["resume"] == "allow" and first["project"] == "unimega" and first["config"]["training"]["steps"] == 3
    assert first["id"] == (tmp_path / "logs" / "wandb_id").read_text()
    assert [(line["step"], line["train/loss"]) for line in logged] == [(r["step"], r["loss"]) for r in numbers(config)]
    assert last == "finished"


def without_wandb() -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]


def crash_wandb() -> None:
    def init(**_: Any) -> None:
        raise ValueError("no api\nkey")

    sys.modules["wandb"] = types.SimpleNamespace(init=init)  # type: ignore[assignment]


def fake_wandb() -> None:
    def init(**options: Any) -> Any:
        file = Path(options["dir"]) / "fake.jsonl"

        def tell(what: Any) -> None:
            with file.open("a") as sink:
                sink.write(json.dumps(what) + "\n")

        tell(options)
        return types.SimpleNamespace(
            log=lambda values, step: tell(values | {"step": step}), finish=lambda: tell("finished")
        )

    sys.modules["wandb"] = types.SimpleNamespace(init=init)  # type: ignore[assignment]


def test_a_profile_of_each_rank(tmp_path: Path) -> None:
    config = runs.make(tmp_path, logging={"profile": [2, 3]}, training={"steps": 4})
    assert run(config) == ""
    for rank in (0, 1):
        trace = json.loads((tmp_path / "logs" / "profile" / f"steps-2-3-rank-{rank}.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        assert "aten::mm" in names and any("gloo" in str(name) for name in names)
    assert len(list((tmp_path / "logs" / "profile").iterdir())) == 2
