"""A step of training with every Triton row chosen equals the step with references."""

import os
from dataclasses import replace

import pytest
import torch

from tests.distributed.harness import run_dist
from tests.models import PRESETS, microbatch
from tests.tolerances import PARITY_FP32, relative_error
from unimega.config.experts import ExpertSpec
from unimega.config.layer import moe
from unimega.config.schema import OptimizerConfig, ParallelConfig
from unimega.kernels import availability, registry

EXPERTS = moe((True,), experts=ExpertSpec(number=5, width=6, top_k=2, shared_width=4), ffn=8)


def step(
    name: str, layers: int, implementation: str, tp: int
) -> tuple[float, float, dict[str, torch.Tensor], list[str]]:
    """Loss, gradient norm and parameters after a step; the ops whose row of that name was chosen."""
    from unimega import backend
    from unimega.training.engine import Engine

    rows = {op: {impl.name for impl in registry.implementations(op)} for op in registry.ops()}
    chosen = {op: implementation for op, names in rows.items() if implementation in names}
    parallel = ParallelConfig(overlap=False, tp=tp, sequence_parallel=tp > 1)
    spec = replace(PRESETS["dense"], layers=EXPERTS) if name == "moe" else PRESETS[name]
    engine = Engine(
        replace(spec, layers=spec.layers[:layers]),
        parallel,
        optimizer_config=OptimizerConfig(lr=1e-2, min_lr=1e-2, eps=1e-3),
        kernels=chosen,
    )
    made = microbatch(engine.spec, "mixed", 3, scale=0.02, tp_rank=engine.groups.tp.rank(), tp=tp, sp=tp > 1)
    result = engine.step([backend.to_device(made)], lr=1e-2)
    parameters = engine.gather_parameters()
    engine.close()
    return result.loss, result.grad_norm, parameters or {}, sorted(chosen)


@pytest.mark.skipif(os.environ.get(availability.INTERPRET) != "1", reason="the interpreter is off")
@pytest.mark.skipif(availability.missing("triton") is not None, reason="triton is not installed")
@pytest.mark.parametrize(("name", "layers", "tp"), [("unix", 2, 1), ("dense", 1, 2), ("moe", 1, 1)])
def test_a_step_on_triton_equals_the_reference(name: str, layers: int, tp: int) -> None:
    loss, norm, parameters, _ = run_dist(step, world=tp, args=(name, layers, "reference", tp))[0]
    mine = run_dist(step, world=tp, args=(name, layers, "triton", tp))[0]
    assert {"attention", "rms_norm", "add_rms_norm", "swiglu", "qkv_prepare", "linear_cross_entropy"} <= {*mine[3]}
    assert {"topk_routing", "expert_order", "expert_ffn"} <= {*mine[3]}
    assert mine[0] == pytest.approx(loss, rel=PARITY_FP32)
    assert mine[1] == pytest.approx(norm, rel=PARITY_FP32)
    for key, want in parameters.items():
        assert relative_error(mine[2][key], want) <= PARITY_FP32, key
