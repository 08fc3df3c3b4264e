"""Every axis, for every preset: several ranks give the loss, every gradient and the updated parameters of one rank.

fp32 on gloo. A case trains two steps on four micro-batches of different make-up; the cases of a preset share worlds.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_dist
from tests.models import PRESETS, SKIP, microbatch, random_tensor
from tests.tolerances import PARITY_BF16, PARITY_FP32, relative_error
from unimega.config.schema import OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.timeout(500)

KINDS = ("mixed", "text", "image", "mostly image")
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-2, weight_decay=0.01, clip=0.5, eps=1e-3, schedule="constant")


@dataclass(frozen=True)
class Case:
    """One model under one layout."""

    preset: str
    layout: str = "one rank"
    parallel: ParallelConfig = ParallelConfig(overlap=False)  # noqa: RUF009
    world: int = 1
    recompute: str = "none"
    kinds: tuple[str, ...] = KINDS
    precision: str = "fp32"
    trainable: tuple[str, ...] = ("*",)


def layouts(number: int) -> list[dict[str, Any]]:
    """The table of the parity rule; ``number`` of layers."""
    uneven = (1, number - 2, 0, 1)
    sp = dict(tp=2, sequence_parallel=True)
    return [
        dict(layout="tp 2", world=2, parallel=ParallelConfig(tp=2)),
        dict(layout="tp 2 + sp", world=2, parallel=ParallelConfig(**sp)),
        dict(layout="pp 2", world=2, parallel=ParallelConfig(pp=2)),
        dict(layout="pp 2 interleaved", world=2, parallel=ParallelConfig(pp=2, vpp=2)),
        dict(layout="pp 2 interleaved, uneven", world=2, parallel=ParallelConfig(pp=2, vpp=2, layout=uneven)),
        dict(layout="dp 2", world=2, parallel=ParallelConfig(overlap=False)),
        dict(layout="dp 2 overlapped", world=2, parallel=ParallelConfig()),
        dict(layout="full recompute, tp 2 + sp", world=2, parallel=ParallelConfig(**sp), recompute="full"),
        dict(layout="selective recompute, pp 2", world=2, parallel=ParallelConfig(pp=2), recompute="selective"),
        dict(layout="tp 2 x pp 2", world=4, parallel=ParallelConfig(tp=2, pp=2)),
    ]


RECOMPUTE = [
    dict(layout=f"one rank, {kind} recompute", parallel=ParallelConfig(overlap=False), recompute=kind)
    for kind in ("full", "selective")
]


def all_cases() -> list[Case]:
    cases = [Case(preset, **case) for preset, model in PRESETS.items() for case in layouts(len(model.layers))]
    for case in (*layouts(5)[:2], *layouts(5)[5:8]):
        cases.append(Case("skip", **case))
    for kinds in (("text",) * 4, ("image",) * 4):
        for case in layouts(4)[1:8]:
            cases.append(Case("unix", kinds=kinds, **case | dict(layout=f"{case['layout']}, all {kinds[0]}")))
    four = dict(world=4, layout="tp 2 + sp x dp 2", parallel=ParallelConfig(tp=2, sequence_parallel=True))
    deep = dict(world=4, layout="pp 2 interleaved x dp 2", parallel=ParallelConfig(pp=2, vpp=2))
    cases += [Case(preset, **case) for preset in ("unix tied", "mot") for case in (four, deep)]
    frozen = {"unix": ("*_vision",), "unix tied": ("layers.*",), "mot": ("layers.*", "*layernorm*")}
    for preset, trainable in frozen.items():
        for case in (layouts(4)[1], layouts(4)[2], layouts(4)[6], *layouts(4)[7:9], *RECOMPUTE):
            cases.append(Case(preset, trainable=trainable, **case | dict(layout=f"{case['layout']}, partly frozen")))
    half_tied = ("layers.*", "embedding.weight")
    cases.append(Case("unix tied", trainable=half_tied, **layouts(4)[2] | dict(layout="pp 2, norm frozen")))
    return cases


def model_of(case: Case):
    return SKIP if case.preset == "skip" else PRESETS[case.preset]


def fill(stages, spec, groups, *, seed):
    """Stands in for the engine's initial weights: norms and biases are random too."""
    from unimega.parallel.parts import parts

    with torch.no_grad():
        for stage in stages:
            for name, values in stage.weights():
                values.zero_()
                for part in parts(name, values, groups):
                    part.of(values).copy_(random_tensor(part.key, list(part.shape))[part.window(values)])


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """On every rank of a world: what each case computes (gradients and parameters on rank 0 only)."""
    from unimega.parallel import initialize

    initialize.initialize_weights = fill
    return [run_case(case) for case in cases]


def run_case(case: Case) -> dict[str, Any]:
    from unimega import backend
    from unimega.parallel.optimizer import set_lr
    from unimega.training.engine import Engine

    model = model_of(case)
    engine = Engine(
        model,
        case.parallel,
        optimizer_config=OPTIMIZER,
        precision=case.precision,
        recompute=case.recompute,
        trainable=case.trainable,
        bucket_parameters=2000,
    )
    try:
        tp, dp = engine.groups.tp, engine.groups.dp
        share = len(case.kinds) // dp.size()

        def batches(step: int):
            made = [
                microbatch(
                    model,
                    kind,
                    100 * step + number,
                    scale=1 / 90,
                    tp_rank=tp.rank(),
                    tp=tp.size(),
                    sp=case.parallel.sequence_parallel,
                )
                for number, kind in enumerate(case.kinds)
            ]
            return [backend.to_device(batch) for batch in made[dp.rank() * share : (dp.rank() + 1) * share]]

        set_lr(engine.optimizer, OPTIMIZER.lr, OPTIMIZER)
        results = engine.forward_backward(batches(0), whole_gradients=True)
        gradients = engine.gather_gradients()
        first = engine.reduce_results(results)
        _, norm, _ = engine.optimizer.step()
        second = engine.step(batches(1), lr=OPTIMIZER.lr)  # compares replicas
        engine.check_replicas()
        return dict(
            loss=torch.tensor([*first, second.loss, *second.sums]),
            norm=torch.tensor([float(norm), second.grad_norm]),
            gradients=gradients,
            parameters=engine.gather_parameters(),
        )
    finally:
        engine.close()


@functools.cache
def results(preset: str) -> dict[Case, dict[str, Any]]:
    """All cases of a preset and their references, one world per size."""
    cases = [case for case in all_cases() if case.preset == preset]
    references = list(dict.fromkeys(reference(case) for case in cases))
    found: dict[Case, dict[str, Any]] = {}
    for world in (1, 2, 4):
        mine = [case for case in cases if case.world == world]
        mine = [*references, *mine] if world == 1 else mine
        for part in (mine[i : i + 12] for i in range(0, len(mine), 12)):  # a world keeps the groups of all its engines
            found.update(zip(part, run_dist(run_cases, world=world, args=(part,))[0], strict=True))
    return found


def reference(case: Case) -> Case:
    return Case(case.preset, kinds=case.kinds, trainable=case.trainable)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.preset} | {case.layout}")
def test_equals_one_rank(case: Case) -> None:
    found = results(case.preset)
    compare(found[case], found[reference(case)], PARITY_FP32)


def compare(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for what in ("loss", "norm"):
        assert relative_error(got[what], expected[what]) <= tolerance, what
    for what in ("gradients", "parameters"):
        assert got[what].keys() == expected[what].keys()
        for key, wanted in expected[what].items():
            if not wanted.any():
                assert not got[what][key].any(), f"{what} of {key} should be zero"
            assert relative_error(got[what][key], wanted) <= tolerance, f"{what} of {key}"


@pytest.mark.parametrize(
    "two, tolerance",
    [
        (Case("unix", world=2, parallel=ParallelConfig()), PARITY_FP32),
        (Case("unix", world=2, parallel=ParallelConfig(tp=2, sequence_parallel=True)), PARITY_BF16),
        (Case("mot", world=2, parallel=ParallelConfig(pp=2), recompute="full"), PARITY_BF16),
    ],
    ids=["dp 2", "tp 2 + sp", "pp 2, full recompute"],
)
def test_bf16_keeps_fp32_main_gradients(two: Case, tolerance: float) -> None:
    """dp 2 sums the same bf16 products in fp32: equal but for the order; tp rounds partial sums to bf16 in between."""
    one, two = Case(two.preset, precision="bf16"), replace(two, precision="bf16")
    expected, got = (run_dist(run_cases, world=case.world, args=([case],))[0][0] for case in (one, two))
    for key, wanted in expected["gradients"].items():
        assert wanted.dtype == torch.float32
        assert relative_error(got["gradients"][key], wanted) <= tolerance, key
