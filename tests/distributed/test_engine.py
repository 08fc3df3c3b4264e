"""What the engine promises beside parity: rates and decay by group, freezing, equal starts, and alarms that ring."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.harness import run_dist
from tests.models import PRESETS, microbatch
from unimega.config.schema import OptimizerConfig, ParallelConfig, Rate

ONE = ParallelConfig(overlap=False)
TWO = ParallelConfig(tp=2, sequence_parallel=True)


def engine_of(name: str, parallel: ParallelConfig = ONE, **options):
    from unimega.training.engine import Engine

    options.setdefault("optimizer_config", OptimizerConfig(lr=1e-2, min_lr=1e-2))
    return Engine(PRESETS[name], parallel, **options)


def batch_of(engine, kind: str = "mixed", seed: int = 1):
    from unimega import backend

    tp, sp = engine.groups.tp, engine.config.sequence_parallel
    made = microbatch(engine.spec, kind, seed, scale=0.02, tp_rank=tp.rank(), tp=tp.size(), sp=sp)
    return backend.to_device(made)


def groups() -> list[tuple[float, float]]:
    """(lr, weight decay) of every group at a schedule value of 1e-3."""
    from unimega.parallel.optimizer import set_lr

    config = OptimizerConfig(lr=1e-2, min_lr=0, weight_decay=0.3, rates=(Rate(match="*_vision", factor=3.0),))
    engine = engine_of("unix", optimizer_config=config)
    set_lr(engine.optimizer, 1e-3, config)
    return [(g["lr"], g["weight_decay"]) for g in engine.optimizer.param_groups]


def test_rates_and_decay_are_in_force_before_the_first_step() -> None:
    found = {(round(lr, 6), decay) for lr, decay in run_dist(groups, world=1)[0]}
    assert found == {(0.001, 0.3), (0.001, 0.0), (0.003, 0.3), (0.003, 0.0)}


def frozen() -> tuple[list[str], str]:
    """Names that moved in a step in which only vision is trainable, and what a pattern without a match says."""
    from unimega.errors import ConfigError

    engine = engine_of("unix", trainable=("*_vision",))
    before = engine.gather_parameters()
    engine.step([batch_of(engine)], lr=1e-2)
    after = engine.gather_parameters()
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    engine.close()
    try:
        engine_of("unix", trainable=("*_visoin",))
    except ConfigError as error:
        return moved, str(error)
    return moved, ""


def test_only_trainable_parameters_move() -> None:
    moved, line = run_dist(frozen, world=1)[0]
    assert moved and all(name.endswith("_vision") for name in moved)
    assert line.startswith("training.trainable='*_visoin' matches no parameter")


def unmarked(what: str) -> str:
    """Take one of megatron-core's marks away and train a step on tp 2 + sp: what the engine says."""
    from unimega.errors import UnimegaError

    engine = engine_of("unix", TWO)
    for stage in engine.stages:
        for name, values in stage.named_parameters():
            if what == "sequence_parallel" and "_norm" in name:
                values.sequence_parallel = False
    if what == "qk_layernorm":
        engine.config.qk_layernorm = False
    try:
        engine.step([batch_of(engine)], lr=1e-2)
    except UnimegaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what, name", [("sequence_parallel", "norm.weight"), ("qk_layernorm", "layernorm.weight")])
def test_replicas_that_drift_apart_stop_the_run(what: str, name: str) -> None:
    """megatron-core trains on in silence without these marks."""
    for line in run_dist(unmarked, world=2, args=(what,)):
        assert name in line and "differs between tp rank 0 and tp rank 1" in line


def vision_from_text() -> dict[str, torch.Tensor]:
    from unimega.training.engine import Engine

    model = replace(PRESETS["unix"], init_vision="text")
    return Engine(model, TWO, optimizer_config=None).gather_parameters()


def test_vision_can_start_from_text() -> None:
    found = run_dist(vision_from_text, world=2)[0]
    pairs = [key for key in found if key.endswith("_vision")]
    assert pairs
    for key in pairs:
        assert torch.equal(found[key], found[key.removesuffix("_vision") + "_text"]), key


def trained(steps: int, precision: str) -> list[float]:
    engine = engine_of("mot", ParallelConfig(pp=2), precision=precision, recompute="selective")
    batches = [batch_of(engine, seed=seed) for seed in (1, 2)]
    return [engine.step(batches, lr=1e-2).loss for _ in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tiny_model_learns_by_heart(precision: str) -> None:
    first, *_, last = run_dist(trained, world=2, args=(25, precision))[0]
    assert last < 0.35 * first


def nothing_to_learn() -> list[float]:
    """A global batch whose weights are all 0."""
    from unimega import backend

    engine = engine_of("unix", TWO)
    empty = microbatch(engine.spec, "mixed", 1, scale=0.0, tp_rank=engine.groups.tp.rank(), tp=2, sp=True)
    assert len(empty.loss_rows) == 0
    result = engine.step([backend.to_device(empty)], lr=1e-2)
    return [result.loss, result.grad_norm, *result.sums]


def test_a_batch_without_targets_has_loss_0_and_no_gradient() -> None:
    assert run_dist(nothing_to_learn, world=2)[0] == [0.0, 0.0, 0.0, 0.0]


def refused() -> list[str]:
    from unimega.errors import UnimegaError

    lines = []
    for options in (
        {"kernels": {"swigluu": "reference"}},
        {"kernels": {"swiglu": "tritonn"}},
        {"optimizer_config": OptimizerConfig(rates=(Rate(match="*_visoin", factor=3.0),))},
    ):
        try:
            engine_of("unix", **options)
        except UnimegaError as error:
            lines.append(str(error))
    return lines


def test_names_that_match_nothing_are_refused() -> None:
    op, implementation, rate = run_dist(refused, world=1)[0]
    assert op.startswith("kernels.swigluu is not an op")
    assert "kernels.swiglu='tritonn'" in implementation
    assert rate.startswith("optimizer.rates[0].match='*_visoin' matches no parameter")
