"""A run goes on from a step: bit for bit under the same layout, with equal loss under any other.

Every layout trains four steps, with a save after two; then every layout resumes from every one of these saves.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_dist
from tests.models import PRESETS, microbatch
from tests.tolerances import RESHARDED_LOSS
from unimega.config.schema import OptimizerConfig, ParallelConfig, Rate

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "tp 2 + sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp 2": (2, ParallelConfig(pp=2)),
    "pp 2 interleaved": (2, ParallelConfig(pp=2, vpp=2)),
    "dp 2": (2, ParallelConfig()),
    "tp 2 x pp 2": (4, ParallelConfig(tp=2, sequence_parallel=True, pp=2)),
}
STEPS, SAVED, MICROBATCHES = 4, 2, 2
OPTIMIZER = OptimizerConfig(
    lr=1e-2,
    min_lr=1e-2,
    eps=1e-3,  # at 1e-8 Adam turns the rounding of gradients near 0 into updates
    rates=(Rate(match="*_vision", factor=3.0), Rate(match="layers.2.*", factor=0.5)),
)
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"model": "three modalities"},
    "bf16": {"model": "three modalities", "precision": "bf16"},
    "tied": {"model": "unix tied"},
    "first half frozen": {"model": "share", "trainable": ("layers.[23].*",)},
}
"""43 rows of vocabulary: no tp divides them. Buckets of 2000 parameters: several per rank, all with padding.

With the first half frozen a pipeline's first rank has nothing to train.
"""


def make_engine(parallel: ParallelConfig, case: dict[str, Any]) -> Any:
    from unimega.training.engine import Engine

    options = {key: value for key, value in case.items() if key != "model"}
    return Engine(PRESETS[case["model"]], parallel, optimizer_config=OPTIMIZER, bucket_parameters=2000, **options)


def train(engine: Any, start: int, stop: int) -> list[float]:
    """Losses of some steps on a global batch that does not depend on the layout."""
    from unimega import backend

    tp, dp, sp = engine.groups.tp, engine.groups.dp, engine.config.sequence_parallel
    losses = []
    for step in range(start, stop):
        mine = range(dp.rank(), MICROBATCHES, dp.size())
        made = [
            microbatch(engine.spec, "mixed", 10 * step + n, scale=0.02, tp_rank=tp.rank(), tp=tp.size(), sp=sp)
            for n in mine
        ]
        losses.append(engine.step([backend.to_device(batch) for batch in made], lr=1e-2 / (step + 1)).loss)
    return losses


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """Everything that decides how training goes on: parameters, masters, moments, steps, lr and decay, generators."""
    from megatron.core import tensor_parallel

    from unimega.parallel.placement import fragments

    engine.settle()
    found = {f"weight {n}": p.detach().clone() for stage in engine.stages for n, p in stage.weights()}
    for piece in fragments(engine.optimizer, engine.stages):
        for state, values in piece.states.items():
            found[f"{state} {piece.name} {piece.start}"] = values.clone()
    for number, group in enumerate(engine.optimizer.param_groups):
        kept = [float(group[key]) for key in ("step", "lr", "weight_decay", "eps", *(["max_lr"] * ("max_lr" in group)))]
        found[f"group {number}"] = torch.tensor(kept, dtype=torch.float64)
    found["random numbers"] = torch.rand(4)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        found["random numbers of the tp rank"] = torch.rand(4)
    return found


def train_and_save(folder: str, parallel: ParallelConfig) -> dict[str, list[float]]:
    """On every rank: each case trained through, saved half-way; the final state goes to a file of the rank."""
    import torch.distributed as dist

    losses = {}
    for number, (name, case) in enumerate(CASES.items()):
        engine = make_engine(parallel, case)
        torch.rand(number + 1)  # so that the generators are not where they are after a start
        before = train(engine, 0, SAVED)
        model = {"spec": engine.spec.to_dict()}
        engine.save(f"{folder}/{name}", SAVED, model, training={"seen": 7}, asynchronous=name == "bf16")
        losses[name] = before + train(engine, SAVED, STEPS)
        engine.finish_saves(wait=True)
        torch.save(state_of(engine), f"{folder}/{name} {dist.get_rank()}.pt")
        engine.close()
    return losses


def resume(
    folders: dict[str, str], parallel: ParallelConfig, own: str, crossing: list[str]
) -> dict[tuple[str, str], Any]:
    """On every rank: (layout, case) -> losses after resuming, and what is not bit-equal if the layout is the same.

    Cases that are not ``crossing`` resume under their own layout only.
    """
    import torch.distributed as dist

    found = {}
    for layout, folder in folders.items():
        for name, case in CASES.items():
            if layout != own and name not in crossing:
                continue
            engine = make_engine(parallel, case)
            resumed = engine.resume(f"{folder}/{name}")
            assert (resumed.step, resumed.training) == (SAVED, {"seen": 7})
            losses, different = train(engine, SAVED, STEPS), []
            if layout == own:
                want, got = torch.load(f"{folder}/{name} {dist.get_rank()}.pt"), state_of(engine)
                assert want.keys() == got.keys()
                different = [key for key in want if not torch.equal(want[key], got[key])]
            found[layout, name] = (losses, different)
            engine.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, list[float]]]]:
    """Layout -> folder of its saves, losses by case."""
    made = {}
    for layout, (world, parallel) in LAYOUTS.items():
        folder = str(tmp_path_factory.mktemp("runs"))
        made[layout] = (folder, run_dist(train_and_save, world=world, args=(folder, parallel))[0])
    return made


@pytest.mark.parametrize(
    "crossing", [["fp32"], pytest.param(["tied", "first half frozen"], marks=pytest.mark.slow)], ids=["fp32", "others"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_on_from_every_other(
    layout: str, crossing: list[str], runs: dict[str, tuple[str, dict[str, list[float]]]]
) -> None:
    world, parallel = LAYOUTS[layout]
    folders = {name: folder for name, (folder, _) in runs.items()}
    for rank, found in enumerate(run_dist(resume, world=world, args=(folders, parallel, layout, crossing))):
        for (saved, case), (losses, different) in found.items():
            want = runs[saved][1][case][SAVED:]
            if saved == layout:
                assert losses == want, f"{case} on rank {rank}"
                assert not different, f"{case} on rank {rank}: {different[:3]}"
            else:
                assert losses == pytest.approx(want, rel=RESHARDED_LOSS), f"{case}, saved under {saved}"


def test_the_saves_are_not_trivial(runs: dict[str, tuple[str, dict[str, list[float]]]]) -> None:
    """Losses that move, so that a state that was not loaded shows."""
    for _, losses in runs.values():
        for values in losses.values():
            assert min(abs(a - b) for a, b in itertools.pairwise(values)) > 1e-3 * values[0]


def fast(folder: str, parallel: ParallelConfig, again: list[ParallelConfig]) -> list[str]:
    """On every rank: a save with ``checkpoint.optimizer = fast``, then what other layouts say; "" if bit-equal."""
    from unimega.errors import CheckpointError

    engine = make_engine(parallel, CASES["fp32"])
    train(engine, 0, SAVED)
    engine.save(folder, SAVED, {"spec": engine.spec.to_dict()}, form="fast")
    train(engine, SAVED, STEPS)
    want = state_of(engine)
    engine.close()
    said = []
    for other in again:
        engine = make_engine(other, CASES["fp32"])
        try:
            engine.resume(folder)
            train(engine, SAVED, STEPS)
            got = state_of(engine)
            said.append("" if all(torch.equal(want[key], got[key]) for key in want) else "differs")
        except CheckpointError as error:
            said.append(str(error))
        engine.close()
    return said


def test_fast_states_load_under_the_same_layout_only(tmp_path: Path) -> None:
    layouts = [ParallelConfig(), ParallelConfig(tp=2), ParallelConfig(overlap=False)]
    for same, other, no_overlap in run_dist(fast, world=2, args=(str(tmp_path), ParallelConfig(), layouts)):
        assert same == ""
        assert "checkpoint.optimizer = fast under world 2, tp 1," in other and "this run has world 2, tp 2" in other
        assert "overlap True" in no_overlap and "overlap False" in no_overlap
    written = sum(file.stat().st_size for file in (tmp_path / f"step-{SAVED:08d}").iterdir())
    assert written < 2_000_000, "each tensor is a view of a buffer, and torch.save would write the buffer every time"


def changed(folder: str, changes: list[dict[str, Any]]) -> list[str]:
    """What a run that is not the one that was saved says, and what starts from its weights."""
    from unimega.errors import CheckpointError

    frozen = {"model": "unix", "trainable": ("*_text",)}
    engine = make_engine(ParallelConfig(), frozen)
    train(engine, 0, 1)
    engine.save(f"{folder}/run", 1, {"spec": engine.spec.to_dict()})
    engine.optimizer = None
    engine.save(f"{folder}/weights", 1, {"spec": engine.spec.to_dict()})
    engine.close()
    said = []
    for change in changes:
        engine = make_engine(ParallelConfig(), frozen | {key: v for key, v in change.items() if key != "folder"})
        try:
            engine.resume(f"{folder}/{change.get('folder', 'run')}")
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
        engine.close()
    return said


def test_a_run_that_is_another_one_is_refused_in_one_line(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"trainable": ("*",)},
        {"precision": "bf16"},
        {"model": "share"},
        {"folder": "weights"},
        {"folder": "nowhere"},
        {"trainable": ("*.bias_text", "*.weight_text")},
    ]
    unfrozen, precision, model, weights, nothing, same = run_dist(changed, world=1, args=(str(tmp_path), changes))[0]
    assert "no optimizer state that fits" in unfrozen and "training.trainable" in unfrozen
    assert "was trained in float32, this run in bfloat16" in precision
    assert "model has other layers" in model
    assert "holds weights alone" in weights
    assert nothing == same == ""
