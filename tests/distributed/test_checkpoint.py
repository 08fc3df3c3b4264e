"""Weights on disk: saved under one layout, loaded under another, equal bit for bit; rows added for tp stay out."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.faults import seal_again
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


def refusals(folder: str, cases: list[tuple[str, dict[str, object], str]]) -> list[str]:
    """On a rank: what loading a checkpoint of ``dense`` into each changed model says."""
    from dataclasses import replace

    from unimega.errors import CheckpointError
    from unimega.parallel import groups
    from unimega.training.engine import Engine

    lines = []
    for name, changes, path in cases:
        try:
            Engine(
                replace(PRESETS[name], **changes), ParallelConfig(), optimizer_config=None, initial=f"{folder}/{path}"
            )
        except CheckpointError as error:
            lines.append(str(error))
        groups.destroy()
    return lines


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    """By its description; without one, by names and shapes."""
    run_dist(save, world=1, args=(str(tmp_path), ParallelConfig()))
    layers = PRESETS["dense"].layers
    wider = tuple(replace(layer, shared_ffn=26) for layer in layers)
    described: list[tuple[str, dict[str, object], str]] = [
        ("dense", {"layers": layers[:3]}, "dense"),
        ("dense", {"heads": 2, "head_width": 24, "kv_heads": 1}, "dense"),
        ("dense", {}, "nowhere"),
    ]
    fewer, heads, missing = run_dist(refusals, world=1, args=(str(tmp_path), described))[0]
    assert "model has other layers" in fewer
    assert "model has heads=4, the run 2" in heads
    assert "not there" in missing
    step = tmp_path / "dense" / "step-00000007"
    (step / "model.json").write_text("{}")
    seal_again(step, "model.json")
    bare: list[tuple[str, dict[str, object], str]] = [
        ("dense", {"layers": layers[:3]}, "dense"),
        ("unix tied", {}, "dense"),
        ("dense", {"layers": wider}, "dense"),
    ]
    fewer, other, shape = run_dist(refusals, world=1, args=(str(tmp_path), bare))[0]
    assert "has a tensor that the model lacks: 'layers.3." in fewer
    assert "has no tensor 'layers.0." in other
    assert "'layers.0.ffn.down.weight' is [32, 24], the model's is [32, 26]" in shape


@pytest.mark.parametrize("damage", ["cut", "gone", "no metadata", "no common", "not json", "not a spec"])
def test_a_damaged_checkpoint_is_one_line(damage: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "dense", tmp_path / "dense")
    step = tmp_path / "dense" / "step-00000007"
    shard = max(step.glob("*.distcp"), key=lambda file: file.stat().st_size)
    match damage:
        case "cut":
            os.truncate(shard, shard.stat().st_size // 2)
        case "gone":
            shard.unlink()
        case "no metadata":
            (step / ".metadata").unlink()
        case "no common":
            (step / "common.pt").unlink()
        case "not json":
            (step / "model.json").write_bytes(b"\xff{")
        case "not a spec":
            (step / "model.json").write_text('{"spec": {"width": 3}}')
    (line,) = run_dist(refusals, world=1, args=(str(tmp_path), [("dense", {}, "dense")]))[0]
    assert "\n" not in line and ("damaged" in line)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_dist(save, world=1, args=(str(folder), ParallelConfig()))
    return folder
