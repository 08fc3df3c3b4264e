"""Models with routed experts in the engine: every layout gives loss, gradients and updates of one rank.

fp32 on gloo; the cases of a size share one world.
"""

import gc
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests import models
from tests.distributed.harness import run_dist
from tests.tolerances import PARITY_BF16, PARITY_FP32, relative_error
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.schema import OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.timeout(500)

COMMON: dict[str, Any] = {"number": 8, "width": 12, "top_k": 2, "balance": 0.3, "z_loss": 0.05}
SPARSE = LayerSpec(experts=ExpertSpec(**COMMON, shared_width=8, shared_gate=True))
BY_DOCUMENT = LayerSpec(
    experts=ExpertSpec(**COMMON, score="sigmoid", balance_over="document", bias_rate=0.02), norms="split"
)
ONE_SIDED = LayerSpec(experts=ExpertSpec(**COMMON, sets=((1, 0), (2, 1)), bias_rate=0.1))
"""Expert 1 gets every token and 3 to 7 none: with ep 2 and 4 some ranks have nothing to do."""
SPEC = models.spec((SPARSE, LayerSpec(shared_ffn=24), BY_DOCUMENT, ONE_SIDED))
KINDS = ("mixed", "text", "image", "mostly text")
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-2, weight_decay=0.01, clip=0.5, eps=1e-3, schedule="constant")
SP = {"tp": 2, "sequence_parallel": True}


@dataclass(frozen=True)
class Case:
    """A layout of the model."""

    name: str
    world: int = 1
    parallel: ParallelConfig = ParallelConfig(overlap=False)  # noqa: RUF009
    recompute: str = "none"
    kinds: tuple[str, ...] = KINDS
    trainable: tuple[str, ...] = ("*",)
    precision: str = "fp32"


IMAGE = ("image",) * 4
FEW = ("layers.3.*.experts.*", "layers.0.*.router.*")
QUICK = [
    *(Case(f"one rank, {kind} recompute", recompute=kind) for kind in ("moe", "full")),
    Case("ep 2", 2, ParallelConfig(ep=2)),
    Case("ep 2, all-gather", 2, ParallelConfig(ep=2, dispatch="allgather")),
    Case("tp 2, ep 2", 2, ParallelConfig(tp=2, ep=2)),
    Case("tp 2 + sp, ep 2, moe recompute", 2, ParallelConfig(**SP, ep=2), "moe"),
    Case("tp 2, etp 2", 2, ParallelConfig(tp=2, etp=2)),
    Case("pp 2", 2, ParallelConfig(pp=2), "moe"),
    Case("ep 4", 4, ParallelConfig(ep=4)),
    Case("ep 2 x tp 2 + sp", 4, ParallelConfig(**SP, ep=2)),
    Case("ep 2 x pp 2", 4, ParallelConfig(pp=2, ep=2)),
]
MORE = [
    Case("one rank, selective recompute", recompute="selective"),
    Case("dp 2", 2, ParallelConfig()),
    Case("tp 2", 2, ParallelConfig(tp=2)),
    Case("tp 2 + sp, etp 2", 2, ParallelConfig(**SP, etp=2), "selective"),
    Case("pp 2 interleaved", 2, ParallelConfig(pp=2, vpp=2)),
    Case("ep 2, few trained, full recompute", 2, ParallelConfig(ep=2), "full", trainable=FEW),
    Case("ep 2, all image", 2, ParallelConfig(ep=2), kinds=IMAGE),
    Case("tp 2 + sp, ep 2, all image", 2, ParallelConfig(**SP, ep=2), kinds=IMAGE),
    Case("ep 2, expert-dp 2", 4, ParallelConfig(ep=2), "full"),
    Case("ep 2 x tp 2", 4, ParallelConfig(tp=2, ep=2)),
    Case("ep 2 x tp 2, etp 2", 4, ParallelConfig(tp=2, ep=2, etp=2)),
    Case("ep 2 x tp 2 + sp, etp 2, all-gather", 4, ParallelConfig(**SP, ep=2, etp=2, dispatch="allgather")),
    Case("ep 4 x tp 2 + sp, moe recompute", 4, ParallelConfig(**SP, ep=4), "moe"),
    Case("ep 2 x pp 2, few trained", 4, ParallelConfig(pp=2, ep=2), trainable=FEW),
]
BF16 = Case("ep 2, bf16", 2, ParallelConfig(ep=2), precision="bf16")


def reference(case: Case) -> Case:
    return Case("one rank", kinds=case.kinds, trainable=case.trainable, precision=case.precision)


def run_cases(some: list[Case]) -> list[dict[str, Any]]:
    found = []
    for case in some:
        found.append(run_case(case))
        gc.collect()  # the groups of a closed engine have 50 threads, until it is freed
    return found


def run_case(case: Case) -> dict[str, Any]:
    """Two steps on micro-batches of unlike make-up: dp ranks see different ones."""
    from unimega import backend
    from unimega.parallel import optimizer
    from unimega.training.engine import Engine

    engine = Engine(
        SPEC,
        case.parallel,
        optimizer_config=OPTIMIZER,
        precision=case.precision,
        recompute=case.recompute,
        trainable=case.trainable,
        bucket_parameters=2000,
    )
    tp, dp = engine.groups.tp, engine.groups.dp
    sp = engine.config.sequence_parallel

    def batches(step: int) -> list[Any]:
        made = [
            models.microbatch(SPEC, kind, 10 * step + n, scale=0.02, tp_rank=tp.rank(), tp=tp.size(), sp=sp)
            for n, kind in enumerate(case.kinds)
        ]
        tokens = sum(models.TOKENS - batch.order.pads for batch in made)
        mine = made[dp.rank() :: dp.size()]
        return [backend.to_device(replace(batch, step_tokens=tokens)) for batch in mine]

    try:
        optimizer.set_lr(engine.optimizer, OPTIMIZER.lr, OPTIMIZER)
        results = engine.forward_backward(batches(0), whole_gradients=True)
        gradients = engine.gather_gradients()
        first = engine.reduce_results(results)
        norm = optimizer.gradient_norm(engine.optimizer)
        optimizer.update(engine.optimizer, norm)
        engine.routed.end_step(applied=True)
        second = engine.step(batches(1), lr=OPTIMIZER.lr)  # compares replicas
        seen = engine.routed.take()
        return {
            "loss": torch.tensor([*first, second.loss, *second.sums]),
            "norm": torch.tensor([norm, second.grad_norm]),
            "gradients": gradients,
            "parameters": engine.gather_parameters(),
            "slots": {layer: (s.tokens, s.slots.tolist(), s.dropped.tolist()) for layer, s in seen.items()},
            "sums": torch.stack([torch.stack([*s.entropy, s.balance, s.z_loss]) for s in seen.values()]),
        }
    finally:
        engine.close()


Results = dict[Case, dict[str, Any]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    """Of the selected cases and their references; a size of world runs its cases one after another."""
    selected = [item.callspec.params["case"] for item in request.session.items if "case" in _parameters(item)]
    every = list(dict.fromkeys([Case("one rank"), *map(reference, selected), *selected]))
    found: Results = {}
    for world in (1, 2, 4):
        mine = [case for case in every if case.world == world]
        for part in (mine[i : i + 12] for i in range(0, len(mine), 12)):  # a world keeps the groups of all its engines
            found.update(zip(part, run_dist(run_cases, world=world, args=(part,))[0], strict=True))
    return found


def _parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if item.module.__name__ == __name__ and hasattr(item, "callspec") else {}


@pytest.mark.parametrize(
    "case",
    [*(pytest.param(case, id=case.name) for case in QUICK)]
    + [pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in MORE],
)
def test_equals_one_rank(results: Results, case: Case) -> None:
    got, expected = results[case], results[reference(case)]
    for what in ("loss", "norm", "sums"):
        assert relative_error(got[what], expected[what]) <= PARITY_FP32, what
    assert got["slots"] == expected["slots"]
    for what in ("gradients", "parameters"):
        assert got[what].keys() == expected[what].keys()
        for key, wanted in expected[what].items():
            if not wanted.any():
                assert not got[what][key].any(), f"{what} of {key} should be zero"
            assert relative_error(got[what][key], wanted) <= PARITY_FP32, f"{what} of {key}"


@pytest.mark.parametrize("case", [pytest.param(BF16, id=BF16.name)])
def test_bf16_keeps_fp32_main_gradients(results: Results, case: Case) -> None:
    """Rows travel unrounded; sums over ranks are fp32, in another order."""
    got, expected = results[case], results[reference(case)]
    for key, wanted in expected["gradients"].items():
        assert wanted.dtype == torch.float32
        assert relative_error(got["gradients"][key], wanted) <= PARITY_BF16, key


def test_the_reference_is_what_it_should_be(results: Results) -> None:
    """An expert with all tokens, others with none, biases that moved with the loads of both steps, clipping."""
    got = results[Case("one rank")]
    tokens, slots, _ = got["slots"][3]
    assert all(tokens) and [row[1] for row in slots] == list(tokens) and not any(any(row[3:]) for row in slots)
    assert got["norm"].min() > OPTIMIZER.clip
    gradients, bias = got["gradients"], got["parameters"]["layers.3.ffn.router.bias"]
    assert gradients["layers.3.ffn.experts.gate.weight"].shape == (8, 12, 32)
    for expert in range(8):
        assert gradients["layers.3.ffn.experts.down.weight"][expert].any() == (expert < 3)
        assert gradients["layers.0.ffn.experts.up.weight"][expert].any()
    assert bias[1] == pytest.approx(-0.2) and torch.allclose(bias[3:], torch.full((5,), 0.2))


GUARDED = {
    1: [("none", ParallelConfig(overlap=False)), ("moe", ParallelConfig(overlap=False))],
    2: [
        ("none", ParallelConfig(ep=2)),
        ("moe", ParallelConfig(ep=2, dispatch="allgather")),
        ("none", ParallelConfig(**SP, ep=2)),
        ("none", ParallelConfig(tp=2, etp=2)),
    ],
}


def reads_of(layouts: list[tuple[str, ParallelConfig]]) -> list[list[str]]:
    """On a rank: what each layout reads on the host in forward, backward and the move of the biases."""
    from tests.sync_guard import forbid_syncs
    from unimega import backend
    from unimega.training.engine import Engine

    found = []
    for recompute, parallel in layouts:
        engine = Engine(SPEC, parallel, optimizer_config=OPTIMIZER, recompute=recompute)
        tp, sp = engine.groups.tp, engine.config.sequence_parallel
        made = [models.microbatch(SPEC, kind, 1, tp_rank=tp.rank(), tp=tp.size(), sp=sp) for kind in ("mixed", "image")]
        batches = [backend.to_device(replace(batch, step_tokens=100)) for batch in made]
        with forbid_syncs() as allowed:
            engine.forward_backward(batches)
            engine.routed.end_step(applied=True)
        found.append(list(allowed))
        engine.close()
    return found


@pytest.mark.parametrize("world", GUARDED)
def test_no_host_sync_but_for_split_sizes(world: int) -> None:
    """Raises where the host waits; of an all-to-all it reads the sizes, once for a layer and micro-batch."""
    layers = sum(layer.experts is not None for layer in SPEC.layers)
    for reads in run_dist(reads_of, world=world, args=(GUARDED[world],)):
        for (_, parallel), some in zip(GUARDED[world], reads, strict=True):
            once = parallel.ep > 1 and parallel.dispatch == "alltoall"
            assert some == ["unimega.backend.base.HostCopy.read"] * (2 * layers if once else 0), parallel
