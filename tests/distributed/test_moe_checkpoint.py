"""Checkpoints of models with routed experts: bit for bit on the same layout, and onto any other ep, etp, tp, pp, dp."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.distributed.harness import run_dist
from tests.distributed.test_moe_engine import SP, SPEC
from tests.tolerances import PARITY_FP32, relative_error
from unimega.config.schema import OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.timeout(500)

OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-2, eps=1e-3, schedule="constant")
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one rank": (1, ParallelConfig(overlap=False)),
    "tp 2, etp 2": (2, ParallelConfig(tp=2, etp=2)),
    "ep 2, expert-dp 2": (4, ParallelConfig(ep=2)),
    "ep 4": (4, ParallelConfig(ep=4, overlap=False)),
    "ep 2 x tp 2 + sp, etp 2": (4, ParallelConfig(**SP, ep=2, etp=2)),
    "ep 2 x pp 2": (4, ParallelConfig(pp=2, ep=2)),
}

Job = tuple[str, str, str, bool]
"""Layout, folder, form of the optimizer's state, whether to save (else to go on from what was saved)."""


def run_jobs(jobs: list[Job]) -> list[dict[str, torch.Tensor]]:
    return [run_job(*job) for job in jobs]


def run_job(layout: str, folder: str, form: Any, saves: bool) -> dict[str, torch.Tensor]:
    """Parameters after the step that follows the checkpoint; ``loaded.`` before their names: right after loading."""
    from unimega import backend
    from unimega.training.engine import Engine

    # another seed, so that what a checkpoint does not bring shows
    engine = Engine(
        SPEC, LAYOUTS[layout][1], optimizer_config=OPTIMIZER, seed=1 if saves else 2, bucket_parameters=2000
    )
    tp, dp, sp = engine.groups.tp, engine.groups.dp, engine.config.sequence_parallel

    def step(number: int) -> None:
        kinds = enumerate(("mixed", "text", "image", "mixed"))
        made = [
            models.microbatch(SPEC, kind, 10 * number + n, scale=0.02, tp_rank=tp.rank(), tp=tp.size(), sp=sp)
            for n, kind in kinds
        ]
        engine.step([backend.to_device(batch) for batch in made[dp.rank() :: dp.size()]], lr=OPTIMIZER.lr)

    if saves:
        step(1)
        step(2)
        engine.save(folder, 2, {"spec": SPEC.to_dict()}, form=form, asynchronous=layout == "ep 2, expert-dp 2")
        engine.finish_saves(wait=True)
    else:
        assert engine.resume(folder) is not None
    found = {f"loaded.{key}": values for key, values in (engine.gather_parameters() or {}).items()}
    step(3)
    found |= engine.gather_parameters() or {}
    engine.close()
    return found


def run_all(jobs: list[Job]) -> dict[Job, dict[str, torch.Tensor]]:
    """Each size of world once."""
    found: dict[Job, dict[str, torch.Tensor]] = {}
    for world in (1, 2, 4):
        mine = [job for job in jobs if LAYOUTS[job[0]][0] == world]
        if mine:
            found.update(zip(mine, run_dist(run_jobs, world=world, args=(mine,))[0], strict=True))
    return found


QUICK = [
    ("one rank", "ep 2 x pp 2", "reshardable"),
    ("ep 2, expert-dp 2", "ep 2, expert-dp 2", "reshardable"),
    ("ep 2, expert-dp 2", "tp 2, etp 2", "reshardable"),
]
MORE = [
    ("tp 2, etp 2", "one rank", "reshardable"),
    ("ep 2 x tp 2 + sp, etp 2", "ep 2 x tp 2 + sp, etp 2", "fast"),
    ("ep 2 x tp 2 + sp, etp 2", "ep 4", "reshardable"),
    ("ep 2 x pp 2", "ep 2, expert-dp 2", "reshardable"),
]


@pytest.mark.parametrize("paths", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_runs_go_on(tmp_path: Path, paths: list[tuple[str, str, str]]) -> None:
    """Parameters right after loading; after one more step; biases of routers are among them."""
    folders = {(saved, form): str(tmp_path / str(n)) for n, (saved, _, form) in enumerate(paths)}
    saved = run_all([(layout, folder, form, True) for (layout, form), folder in folders.items()])
    resumed = run_all([(to, folders[of, form], form, False) for of, to, form in paths])
    for of, to, form in paths:
        expected, got = saved[of, folders[of, form], form, True], resumed[to, folders[of, form], form, False]
        assert got.keys() == expected.keys()
        assert expected["loaded.layers.3.ffn.router.bias"].any()
        for key, wanted in expected.items():
            if of == to or key.startswith("loaded."):
                assert torch.equal(got[key], wanted), f"{of} -> {to}: {key}"
            else:
                assert relative_error(got[key], wanted) <= PARITY_FP32, f"{of} -> {to}: {key}"


def stored(folder: str) -> dict[str, tuple[int, ...]]:
    """Keys and global shapes of what a run of one rank saves."""
    from megatron.core import dist_checkpointing

    from unimega.parallel.checkpoint import resolve_step

    run_job("one rank", folder, "reshardable", True)
    found = dist_checkpointing.load_tensors_metadata(str(resolve_step(folder)))
    return {key: tuple(value.global_shape) for key, value in found.items() if "layers.3.ffn." in key}


def test_keys_and_shapes(tmp_path: Path) -> None:
    """What other tools read: experts in one tensor, gate and up apart, the bias of a router beside its weight."""
    shapes = run_dist(stored, world=1, args=(str(tmp_path),))[0]
    assert {key: shape for key, shape in shapes.items() if key.startswith("layers.")} == {
        "layers.3.ffn.router.weight": (8, 32),
        "layers.3.ffn.router.bias": (8,),
        "layers.3.ffn.experts.gate.weight": (8, 12, 32),
        "layers.3.ffn.experts.up.weight": (8, 12, 32),
        "layers.3.ffn.experts.down.weight": (8, 32, 12),
    }
    assert shapes["optimizer.exp_avg_sq.layers.3.ffn.experts.up.weight"] == (8, 12, 32)
    assert "optimizer.exp_avg.layers.3.ffn.router.bias" not in shapes
