"""Weights on disk: saved under one layout, loaded under another, equal bit for bit; rows added for tp stay out."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import run_dist
from tests.models import PRESETS
from unimega.config.schema import ParallelConfig

LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tp 2 + sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp 2": (2, ParallelConfig(pp=2)),
    "pp 2 interleaved": (2, ParallelConfig(pp=2, vpp=2)),
    "dp 2": (2, ParallelConfig()),
}
MODELS = ("dense", "share, no vision FFN", "mot, original output", "three modalities")


def save(folder: str, parallel: ParallelConfig) -> list[dict[str, torch.Tensor] | None]:
    """On every rank: one engine per model with its own random weights, saved; rank 0 returns the whole tensors."""
    from unimega.training.engine import Engine

    found = []
    for name in MODELS:
        engine = Engine(PRESETS[name], parallel, optimizer_config=None, seed=3)
        engine.save(f"{folder}/{name}", 7, {"spec": engine.spec.to_dict()})
        found.append(engine.gather_parameters())
        engine.close()
    return found


def load(folder: str, parallel: ParallelConfig) -> list[dict[str, torch.Tensor] | None]:
    from unimega.training.engine import Engine

    found = []
    for name in MODELS:
        engine = Engine(PRESETS[name], parallel, optimizer_config=None, seed=4, initial=f"{folder}/{name}")
        found.append(engine.gather_parameters())
        engine.close()
    return found


@pytest.mark.parametrize(
    "saved, loaded", [("tp 2 + sp", "one rank"), ("pp 2 interleaved", "tp 2 + sp"), ("dp 2", "pp 2")]
)
def test_weights_cross_layouts(saved: str, loaded: str, tmp_path: Path) -> None:
    world, parallel = LAYOUTS[saved]
    expected = run_dist(save, world=world, args=(str(tmp_path), parallel))[0]
    world, parallel = LAYOUTS[loaded]
    got = run_dist(load, world=world, args=(str(tmp_path), parallel))[0]
    for name, mine, theirs in zip(MODELS, got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, values in theirs.items():
            assert torch.equal(mine[key], values), f"{name}: {key}"
        assert mine["embedding.weight"].shape[0] == 43
        assert (tmp_path / name / "latest").read_text() == "step-00000007"
        assert json.loads((tmp_path / name / "step-00000007" / "model.json").read_text())["spec"]["width"] == 32


def initial(parallel: ParallelConfig) -> dict[str, torch.Tensor] | None:
    from unimega.training.engine import Engine

    engine = Engine(PRESETS["three modalities"], parallel, optimizer_config=None, seed=3)
    return engine.gather_parameters()


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    reference = run_dist(initial, world=1, args=(ParallelConfig(),))[0]
    for name in ("tp 2 + sp", "pp 2"):
        world, parallel = LAYOUTS[name]
        got = run_dist(initial, world=world, args=(parallel,))[0]
        assert got.keys() == reference.keys()
        assert all(torch.equal(got[key], values) for key, values in reference.items())


def refusals(folder: str) -> list[str]:
    from dataclasses import replace

    from unimega.errors import CheckpointError
    from unimega.training.engine import Engine

    lines = []
    dense = PRESETS["dense"]
    for model, path in (
        (replace(dense, layers=dense.layers[:3]), "dense"),
        (PRESETS["unix tied"], "dense"),
        (dense, "nowhere"),
    ):
        try:
            Engine(model, ParallelConfig(), optimizer_config=None, initial=f"{folder}/{path}")
        except CheckpointError as error:
            lines.append(str(error))
        from unimega.parallel import groups

        groups.destroy()
    return lines


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    run_dist(save, world=1, args=(str(tmp_path), ParallelConfig()))
    fewer, other, missing = run_dist(refusals, world=1, args=(str(tmp_path),))[0]
    assert "has a tensor that the model lacks: 'layers.3." in fewer
    assert "has no tensor 'layers.0." in other
    assert "not there" in missing
