"""LoRA beside every kind of linear: each layout gives loss, gradients and updates of one rank; merged is added.

fp32 on gloo, one model with split, shared and routed layers; the cases of a size share one world.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.distributed import runs
from tests.distributed.harness import run_dist
from tests.distributed.test_parity import fill
from tests.tolerances import PARITY_BF16, PARITY_FP32, relative_error
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.lora import linears
from unimega.config.model import ModelSpec
from unimega.config.schema import Lora, OptimizerConfig, ParallelConfig
from unimega.errors import CheckpointError

pytestmark = pytest.mark.timeout(300)

SPLIT = LayerSpec(attention="split", output_projection="split", scope="own", ffn=(24, 24), norms="split")
BOTH = LayerSpec(ffn=(24, 10), shared_ffn=8)
EXPERTS: dict[str, Any] = {"number": 4, "width": 12, "top_k": 2, "balance": 0.3}
SPARSE = LayerSpec(experts=ExpertSpec(**EXPERTS, shared_width=8, shared_gate=True))
ONE_SIDED = LayerSpec(experts=ExpertSpec(**EXPERTS, sets=((1, 0), (2, 1))))
"""Expert 1 gets every token and 3 none."""
LORA = Lora(rank=3, alpha=6.0)
SPEC = models.spec((SPLIT, BOTH, SPARSE, ONE_SIDED), qkv_bias=True, output_bias=True, lora=LORA)
KINDS = ("mixed", "text", "image", "mostly text")
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-2, weight_decay=0.01, clip=0.5, eps=1e-3, schedule="constant")
SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
ONE = ParallelConfig(overlap=False)
FACTORS = ("*lora*",)


@dataclass(frozen=True)
class Case:
    """A layout of the model."""

    name: str
    world: int = 1
    parallel: ParallelConfig = ONE
    recompute: str = "none"
    trainable: tuple[str, ...] = ("*",)
    precision: str = "fp32"


def cases() -> list[Case]:
    """Every axis; the base frozen where LoRA takes another way then."""
    return [
        Case("tp 2", 2, ParallelConfig(tp=2)),
        Case("tp 2 + sp, full recompute, frozen base", 2, ParallelConfig(**SP), "full", FACTORS),
        Case("pp 2, selective recompute, frozen base", 2, ParallelConfig(pp=2), "selective", FACTORS),
        Case("dp 2, frozen base", 2, ParallelConfig(), trainable=FACTORS),
        Case("ep 2", 2, ParallelConfig(ep=2)),
        Case("tp 2 + sp, etp 2", 2, ParallelConfig(**SP, etp=2)),
    ]


def more_cases() -> list[Case]:
    return [
        Case("one rank, full recompute", recompute="full"),
        Case("tp 2, etp 2, frozen base", 2, ParallelConfig(tp=2, etp=2), "moe", FACTORS),
        Case("tp 2, ep 2, all-gather", 2, ParallelConfig(tp=2, ep=2, dispatch="allgather")),
        Case("pp 2 interleaved", 2, ParallelConfig(pp=2, vpp=2)),
        Case("ep 2 x tp 2 + sp", 4, ParallelConfig(**SP, ep=2), trainable=FACTORS),
        Case("ep 2 x tp 2, etp 2", 4, ParallelConfig(tp=2, ep=2, etp=2)),
        Case("ep 2 x pp 2, full recompute", 4, ParallelConfig(pp=2, ep=2), "full"),
        Case("tp 2 + sp x dp 2", 4, ParallelConfig(**SP), trainable=FACTORS),
    ]


def make(case: Case, spec: ModelSpec = SPEC, *, random: bool = True, **rest: Any) -> Any:
    """The engine, with random factors: B starts at zero, which would hide all that A does."""
    from unimega.parallel import initialize
    from unimega.training import engine

    drawn = initialize.initialize_weights
    if random:
        initialize.initialize_weights = fill
    try:
        return engine.Engine(
            spec,
            case.parallel,
            optimizer_config=OPTIMIZER,
            precision=case.precision,
            recompute=case.recompute,
            trainable=case.trainable,
            bucket_parameters=2000,
            **rest,
        )
    finally:
        initialize.initialize_weights = drawn


def batches(engine: Any, step: int) -> list[Any]:
    """Of this rank; dp ranks see different ones."""
    from unimega import backend

    tp, dp, sp = engine.groups.tp, engine.groups.dp, engine.config.sequence_parallel
    made = [
        models.microbatch(engine.spec, kind, 10 * step + n, scale=0.02, tp_rank=tp.rank(), tp=tp.size(), sp=sp)
        for n, kind in enumerate(KINDS)
    ]
    tokens = sum(models.TOKENS - batch.order.pads for batch in made)
    return [backend.to_device(replace(batch, step_tokens=tokens)) for batch in made[dp.rank() :: dp.size()]]


def run_cases(some: Sequence[Case]) -> list[dict[str, Any]]:
    return [run_case(case) for case in some]


def run_case(case: Case) -> dict[str, Any]:
    """Gradients, and two updates; copies are compared after each."""
    engine = make(case)
    try:
        before = engine.gather_parameters()
        engine.forward_backward(batches(engine, 0), whole_gradients=True)
        gradients = engine.gather_gradients()
        steps = []
        for step in range(2):
            steps.append(engine.step(batches(engine, step), lr=OPTIMIZER.lr))
            engine.check_replicas()
        return {
            "loss": torch.tensor([step.loss for step in steps]),
            "norm": torch.tensor([step.grad_norm for step in steps]),
            "gradients": gradients,
            "before": before,
            "parameters": engine.gather_parameters(),
        }
    finally:
        engine.close()


@functools.cache
def results(slow: bool) -> dict[Case, dict[str, Any]]:
    wanted = more_cases() if slow else cases()
    wanted = list(dict.fromkeys([reference(case) for case in wanted] + wanted))
    found: dict[Case, dict[str, Any]] = {}
    for world in (1, 2, 4):
        mine = [case for case in wanted if case.world == world]
        if mine:
            found.update(zip(mine, run_dist(run_cases, world=world, args=(mine,))[0], strict=True))
    return found


def reference(case: Case) -> Case:
    return Case("one rank", trainable=case.trainable)


def compare(case: Case, found: dict[Case, dict[str, Any]]) -> None:
    got, want = found[case], found[reference(case)]
    for what in ("loss", "norm"):
        assert relative_error(got[what], want[what]) <= PARITY_FP32, what
    for what in ("gradients", "parameters"):
        assert got[what].keys() == want[what].keys()
        for key, values in want[what].items():
            assert relative_error(got[what][key], values) <= PARITY_FP32, f"{what} of {key}"
    if case.trainable == FACTORS:
        assert all("lora_" in key for key in got["gradients"])
        frozen = {key for key in want["before"] if "lora_" not in key}
        assert all(torch.equal(got["parameters"][key], got["before"][key]) for key in frozen)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_equals_one_rank(case: Case) -> None:
    compare(case, results(False))


@pytest.mark.slow
@pytest.mark.parametrize("case", more_cases(), ids=lambda case: case.name)
def test_more_layouts_equal_one_rank(case: Case) -> None:
    compare(case, results(True))


def test_every_linear_has_factors_and_every_factor_learns() -> None:
    found = results(False)[Case("one rank", trainable=FACTORS)]
    have = {
        key.split(".lora_")[0].replace(".gate", ".gate_up").replace(".up", ".gate_up") for key in found["gradients"]
    }
    have = {name.replace("gate_gate_up", "gate_up") for name in have}
    assert have == set(linears(SPEC.layers))
    assert found["before"]["layers.0.attention.qkv.lora_a_vision"].shape == (9, 32)
    assert found["before"]["layers.2.ffn.experts.down.lora_b"].shape == (4, 32, 3)
    for key, gradient in found["gradients"].items():
        assert gradient.any() and not torch.equal(found["parameters"][key], found["before"][key]), key


# --- checkpoints -----------------------------------------------------------------------------------------------------


def train(parallel: ParallelConfig, steps: Sequence[int], folder: str, saved: str = "") -> dict[str, Any]:
    """Go on from what the folder holds, if anything, make these steps, and save to ``saved``."""
    engine = make(Case("", parallel=parallel, trainable=FACTORS), random=not steps or steps[0] == 0)
    try:
        resumed = engine.resume(folder)
        losses = [engine.step(batches(engine, step), lr=OPTIMIZER.lr).loss for step in steps]
        if saved:
            engine.save(saved, steps[-1] + 1, {"spec": engine.spec.to_dict()}, training={})
        parameters = engine.gather_parameters()
        return {"step": resumed.step if resumed else 0, "losses": losses, "parameters": parameters or {}}
    finally:
        engine.close()


def test_a_run_goes_on_under_another_layout(tmp_path: Path) -> None:
    """Two steps at tp 2 with sequence parallelism and etp 2, the third at ep 2: as three on one rank."""
    folder = str(tmp_path)
    whole = run_dist(train, args=(ONE, range(3), str(tmp_path / "none")), world=1)[0]
    first = run_dist(train, args=(ParallelConfig(**SP, etp=2), range(2), folder, folder), world=2)[0]
    last = run_dist(train, args=(ParallelConfig(ep=2), [2], folder), world=2)[0]
    assert last["step"] == 2
    assert first["losses"] + last["losses"] == pytest.approx(whole["losses"], rel=PARITY_FP32)
    for key, values in whole["parameters"].items():
        assert relative_error(last["parameters"][key], values) <= PARITY_FP32, key


def start(folder: str) -> dict[str, Any]:
    """A checkpoint without factors, then everything that may start from it or from one with factors."""
    from unimega.training.same_model import check_same_model

    plain = make(Case(""), replace(SPEC, lora=None))
    plain.save(f"{folder}/plain", 0, {"spec": plain.spec.to_dict()})
    base = plain.gather_parameters()
    plain.close()
    engine = make(Case(""), random=False, initial=f"{folder}/plain")
    started = engine.gather_parameters()
    engine.save(f"{folder}/lora", 0, {"spec": engine.spec.to_dict()})
    engine.close()
    drawn = make(Case(""), random=False)
    fresh = drawn.gather_parameters()
    drawn.close()
    lines = []
    for lora in (None, replace(LORA, rank=2), replace(LORA, alpha=3.0), replace(LORA, match=("*.attention.*",))):
        with pytest.raises(CheckpointError) as caught:
            check_same_model(f"{folder}/lora", replace(SPEC, lora=lora), starts=True)
        lines.append(str(caught.value))
    assert not check_same_model(f"{folder}/lora", replace(SPEC, lora=replace(LORA, dropout=0.1)))
    with pytest.raises(CheckpointError) as caught:
        check_same_model(f"{folder}/plain", SPEC)
    lines.append(str(caught.value))
    return {"base": base, "started": started, "fresh": fresh, "lines": lines}


def test_a_checkpoint_without_factors_starts_them(tmp_path: Path) -> None:
    got = run_dist(start, args=(str(tmp_path),), world=1)[0]
    for key, values in got["started"].items():
        want = got["fresh"] if "lora_" in key else got["base"]
        assert torch.equal(values, want[key]), key
        assert "lora_b" not in key or not values.any()
    qkv, expert = (got["fresh"][f"layers.{name}.lora_a"] for name in ("1.attention.qkv", "2.ffn.experts.gate"))
    for drawn in (qkv, expert[0], expert[1]):  # PEFT's: uniform within 1 / sqrt(inputs)
        assert 0.9 * 32**-0.5 < drawn.abs().max() <= 32**-0.5
    assert not torch.equal(expert[0], expert[1])
    said = [
        "the checkpoint's model has LoRA of rank 3, the run's has none. Set model.lora as it was, or merge it "
        "(tools/export_hf.py --merge-lora) and import that.",
        "the checkpoint has model.lora.rank=3, the run 2. Make them agree.",
        "the checkpoint has model.lora.alpha=6.0, the run 3.0. Make them agree.",
        "the checkpoint has model.lora.match=['*'], the run ['*.attention.*']. Make them agree.",
        "the checkpoint's model has no LoRA, the run's has. Take model.lora away, or start another run with "
        "checkpoint.initial.",
    ]
    assert [line.split(": ", 1)[1] for line in got["lines"]] == said


# --- merging, dropout, bf16 ----------------------------------------------------------------------------------------


def merged(parallel: ParallelConfig) -> dict[str, Any]:
    """Losses with factors beside the weights, in them, and beside them again; and the weights at the end."""
    from unimega.parallel import lora

    engine = make(Case("", parallel=parallel))
    try:
        before, losses = engine.gather_parameters(), []
        for change in (None, lora.merge, lora.unmerge):
            if change is not None:
                change(engine.stages)
            losses.append(engine.evaluate(batches(engine, 0))[0])
        return {"losses": losses, "before": before, "after": engine.gather_parameters()}
    finally:
        engine.close()


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(**SP, ep=2), pytest.param(ParallelConfig(tp=2, etp=2), marks=pytest.mark.slow)], ids=str
)
def test_merged_is_added(parallel: ParallelConfig) -> None:
    got = run_dist(merged, args=(parallel,), world=2)[0]
    assert got["losses"][1:] == pytest.approx(got["losses"][:1] * 2, rel=PARITY_FP32)
    for key, values in got["before"].items():
        assert relative_error(got["after"][key], values) < 1e-6, key


def dropped(parallel: ParallelConfig, recompute: str, dropout: float = 0.3) -> dict[str, Any]:
    """A step in training; copies are compared: factors that tp does not cut have the same gradients on all ranks."""
    engine = make(
        Case("", parallel=parallel, recompute=recompute, trainable=FACTORS),
        replace(SPEC, lora=replace(LORA, dropout=dropout)),
    )
    try:
        evaluated = [engine.evaluate(batches(engine, 0))[0] for _ in range(2)]
        engine.forward_backward(batches(engine, 0), whole_gradients=True)
        gradients = engine.gather_gradients()
        losses = [engine.step(batches(engine, 0), lr=lr).loss for lr in (0.0, OPTIMIZER.lr)]
        engine.check_replicas()
        return {"evaluated": evaluated, "gradients": gradients, "losses": losses}
    finally:
        engine.close()


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tp=2),
        pytest.param(ParallelConfig(**SP, etp=2), marks=pytest.mark.slow),
        pytest.param(ParallelConfig(tp=2, ep=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dropout_repeats_in_recompute_and_agrees_over_tp(parallel: ParallelConfig) -> None:
    kept, again = (run_dist(dropped, args=(parallel, recompute), world=2)[0] for recompute in ("none", "full"))
    without = run_dist(dropped, args=(ONE, "none", 0.0), world=1)[0]
    assert kept["evaluated"] == pytest.approx(without["evaluated"], rel=PARITY_FP32)
    assert abs(kept["losses"][0] - without["losses"][0]) > 1e-4 * without["losses"][0]
    assert kept["losses"][0] != kept["losses"][1]
    assert kept["losses"] == pytest.approx(again["losses"], rel=PARITY_FP32)
    for key, values in kept["gradients"].items():
        assert relative_error(again["gradients"][key], values) <= PARITY_FP32, key


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ParallelConfig(**SP), ParallelConfig(ep=2)], ids=str)
def test_bf16_keeps_fp32_main_gradients(parallel: ParallelConfig) -> None:
    cases = [Case("", precision="bf16"), Case("", 2, parallel, precision="bf16")]
    want, got = (run_dist(run_cases, world=case.world, args=([case],))[0][0] for case in cases)
    for key, values in want["gradients"].items():
        assert values.dtype == torch.float32
        assert relative_error(got["gradients"][key], values) <= PARITY_BF16, key


@pytest.mark.slow
def test_a_run_trains_factors_on_what_another_left(tmp_path: Path) -> None:
    """As the command does: a run without LoRA, one with it that starts there and goes on; the base stays as it was."""
    from unimega.hf.stored import StoredWeights

    first = runs.make(tmp_path)
    other = {"directory": str(tmp_path / "lora"), "initial": first.checkpoint.directory, "every_steps": 0}
    sections: dict[str, Any] = {
        "model": {"lora": {"rank": 4, "dropout": 0.1}},
        "checkpoint": other,
        "logging": {"directory": str(tmp_path / "lora logs")},
    }
    short, whole = (
        runs.make(tmp_path, **sections, training={"steps": steps, "trainable": ["*lora*"]}) for steps in (4, 6)
    )
    assert run_dist(runs.train, args=(first,), world=1) == [""]
    assert run_dist(runs.train, args=(short,), world=1) == [""]
    assert run_dist(runs.train, args=(whole,), world=2) == [""] * 2
    assert [one["step"] for one in runs.records(whole) if "loss" in one][-1] == 6
    old, new = (StoredWeights(Path(run.checkpoint.directory) / "step-00000006") for run in (first, whole))
    factors = {key for key in new.shapes if ".lora_" in key}
    assert factors and new.shapes.keys() - factors == old.shapes.keys()
    assert all(torch.equal(new.read([key])[key], old.read([key])[key]) for key in old.shapes)
    assert all(new.read([key])[key].any() for key in factors)
    wrong = runs.make(tmp_path, **{**sections, "model": {"lora": {"rank": 2}}}, training={"steps": 8})
    (line,) = run_dist(runs.train, args=(wrong,), world=1)
    assert "model.lora.rank was 4, is 2" in line
