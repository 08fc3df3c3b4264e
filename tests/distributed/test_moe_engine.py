"""Models with routed experts in the engine: every layout that is built gives loss and gradients of one rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.distributed.harness import run_dist
from tests.tolerances import PARITY_FP32, relative_error
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import OptimizerConfig, ParallelConfig

COMMON: dict[str, Any] = {"number": 6, "width": 12, "top_k": 2, "balance": 0.3, "z_loss": 0.05}
SPARSE = LayerSpec(experts=ExpertSpec(**COMMON, shared_width=8, shared_gate=True))
BY_DOCUMENT = LayerSpec(experts=ExpertSpec(**COMMON, score="sigmoid", balance_over="document"), norms="split")
SPEC = models.spec((SPARSE, LayerSpec(shared_ffn=24), BY_DOCUMENT, SPARSE))
KINDS = ("mixed", "text", "image", "mostly text")

Result = tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]


def step(parallel: ParallelConfig, recompute: str, folder: str = "", spec: ModelSpec = SPEC) -> Result:
    """Loss, gradients, and parameters after an update; saved with the optimizer's state if there is a folder."""
    from unimega import backend
    from unimega.training.engine import Engine

    engine = Engine(
        spec, parallel, optimizer_config=OptimizerConfig(lr=1e-2, min_lr=1e-2, eps=1e-3), recompute=recompute
    )
    batches = [models.microbatch(spec, kind, seed, scale=0.01) for seed, kind in enumerate(KINDS)]
    tokens = sum(models.TOKENS - batch.order.pads for batch in batches)
    dp = engine.groups.dp
    mine = [backend.to_device(replace(b, step_tokens=tokens)) for b in batches[dp.rank() :: dp.size()]]
    results = engine.forward_backward(mine, whole_gradients=True)
    loss = engine.reduce_results(results)[0]
    gradients = engine.gather_gradients()
    engine.step(mine, lr=1e-2)
    if folder:
        engine.save(folder, 1, {"spec": spec.to_dict()}, training={})
    parameters = engine.gather_parameters()
    engine.close()
    return loss, gradients or {}, parameters or {}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("moe")
    return run_dist(step, world=1, args=(ParallelConfig(overlap=False), "none", str(folder)))[0], folder


@pytest.mark.parametrize(
    ("world", "parallel", "recompute"),
    [
        (2, ParallelConfig(), "none"),
        (2, ParallelConfig(pp=2), "selective"),
        (1, ParallelConfig(overlap=False), "full"),
    ],
    ids=["dp 2", "pp 2, selective recompute", "full recompute"],
)
def test_layouts(one_rank: tuple[Result, Path], world: int, parallel: ParallelConfig, recompute: str) -> None:
    (loss, gradients, parameters), _ = one_rank
    got = run_dist(step, world=world, args=(parallel, recompute))[0]
    assert got[0] == pytest.approx(loss, rel=PARITY_FP32)
    assert {"layers.0.ffn.router.weight", "layers.2.ffn.experts.gate.weight", "layers.3.ffn.shared_gate.weight"} <= {
        *gradients
    }
    for mine, want in ((got[1], gradients), (got[2], parameters)):
        assert mine.keys() == want.keys()
        for key, values in want.items():
            assert values.any() and relative_error(mine[key], values) < PARITY_FP32, key


def resumed(parallel: ParallelConfig, folder: str) -> dict[str, torch.Tensor]:
    from unimega.training.engine import Engine

    engine = Engine(SPEC, parallel, optimizer_config=OptimizerConfig(lr=1e-2, min_lr=1e-2), seed=5)
    assert engine.resume(folder) is not None
    parameters = engine.gather_parameters()
    engine.close()
    return parameters or {}


def test_a_checkpoint_comes_back_on_another_layout(one_rank: tuple[Result, Path]) -> None:
    (_, _, parameters), folder = one_rank
    got = run_dist(resumed, world=2, args=(ParallelConfig(pp=2), str(folder)))[0]
    assert got.keys() == parameters.keys()
    assert all(torch.equal(got[key], values) for key, values in parameters.items())


def test_the_description_of_a_model_comes_back() -> None:
    assert ModelSpec.from_dict(SPEC.to_dict()) == SPEC
