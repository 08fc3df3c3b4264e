"""Routed experts beside megatron-core's own, and with the load of all dp ranks."""

from typing import Any

import pytest
import torch

from tests import moe
from tests.distributed.harness import run_dist
from tests.distributed.test_moe_dispatch import shard
from tests.tolerances import PARITY_FP32, relative_error
from unimega.config.experts import ExpertSpec
from unimega.config.schema import ParallelConfig
from unimega.moe.layer import MoE
from unimega.parallel import groups
from unimega.parallel.experts import ExpertLayout
from unimega.parallel.groups import Groups
from unimega.parallel.linear import Layout

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # isort: skip  (after unimega.parallel)
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # isort: skip
from megatron.core.transformer.spec_utils import build_module  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

BASE: dict[str, Any] = {"number": 8, "width": 24, "top_k": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "normalised, balance and z": (
        {"balance": 0.02, "z_loss": 1e-3},
        {"moe_aux_loss_coeff": 0.02, "moe_router_load_balancing_type": "aux_loss", "moe_z_loss_coeff": 1e-3},
    ),
    "not normalised, capacity": (
        {"normalize": False, "capacity": (1.0,)},
        {"moe_router_pre_softmax": True, "moe_expert_capacity_factor": 1.0},
    ),
    "sigmoid, groups, bias, shared": (
        {
            "score": "sigmoid",
            "scale": 1.5,
            "groups": 4,
            "group_topk": 2,
            "top_k": 4,
            "bias_rate": 1e-3,
            "shared_width": 16,
        },
        {
            "moe_router_topk": 4,
            "moe_router_score_function": "sigmoid",
            "moe_router_topk_scaling_factor": 1.5,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_enable_expert_bias": True,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
}


def megatron_layer(options: dict[str, Any], mesh: Groups) -> torch.nn.Module:
    config = TransformerConfig(
        expert_model_parallel_size=mesh.ep.size(),
        num_layers=1,
        hidden_size=moe.WIDTH,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_ffn_hidden_size=24,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        **{
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            **options,
        },
    )
    spec = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    layer = build_module(spec, config=config, layer_number=1, pg_collection=mesh.collection)
    layer.set_layer_number(1)
    return layer


def theirs(layer: torch.nn.Module, of: str, value: Any) -> torch.Tensor:
    """What ``value`` gives of megatron's weights that make one of ours."""
    if of.startswith("experts."):
        name = {"experts.gate_up.weight": "linear_fc1", "experts.down.weight": "linear_fc2"}[of]
        return torch.stack([value(getattr(e, name).weight) for e in layer.experts.local_experts])
    name = {"shared.gate_up.weight": "linear_fc1", "shared.down.weight": "linear_fc2"}.get(of)
    return value(layer.router.weight if name is None else getattr(layer.shared_experts, name).weight)


def beside_megatron(case: str, ep: int) -> dict[str, float]:
    """Relative differences of this rank's output and gradients."""
    mine, options = CASES[case]
    mesh = groups.initialize(ParallelConfig(ep=ep))
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # another test may have left its own
    layer = megatron_layer(options, mesh)
    spec = ExpertSpec(**{**BASE, **mine})
    build = moe.build(
        moe.models.ONE, layout=Layout(mesh.tp, False), experts=ExpertLayout(mesh.ep, mesh.etp, "alltoall")
    )
    made = MoE(build, spec)
    with torch.no_grad():
        whole = moe.make(spec, vocabulary=moe.models.ONE)
        for (name, values), other in zip(made.named_parameters(), whole.parameters(), strict=True):
            values.copy_(shard(name, other, mesh))
            for expert in range(8 // ep) if name.startswith("experts.") else [None]:
                part = slice(None) if expert is None else expert
                target = theirs_parameter(layer, name, expert)
                target.copy_(values[part])
        if made.router.bias is not None:
            made.router.bias.copy_(torch.linspace(-0.2, 0.2, 8))
            layer.router.expert_bias.copy_(made.router.bias)
    call, seed = moe.call(50 - 16 * mesh.ep.rank()), mesh.ep.rank()
    got = moe.gradients(made, moe.tokens(call.order, seed), call)
    x = moe.tokens(call.order, seed)
    output = layer(x[:, None])[0][:, 0]
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    want = {"output": output, "x": x.grad}
    want |= {name: theirs(layer, name, lambda p: p.grad) for name, _ in made.named_parameters()}
    groups.destroy()
    return {name: relative_error(got[name], values) for name, values in want.items()}


def theirs_parameter(layer: torch.nn.Module, of: str, expert: int | None) -> torch.Tensor:
    found: list[torch.Tensor] = []
    theirs(layer, of, lambda p: found.append(p) or p)
    return found[expert or 0]


@pytest.mark.parametrize("case", CASES)
def test_megatrons_own_layer(case: str) -> None:
    errors = run_dist(beside_megatron, world=1, args=(case, 1))[0]
    assert len(errors) >= 5
    assert max(errors.values()) < PARITY_FP32, errors


def all_beside_megatron() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    return {case: beside_megatron(case, 2) for case in CASES}


def test_megatrons_own_layer_over_ep() -> None:
    """Both send rows to their experts by all-to-all, 50 tokens of one rank and 34 of the other."""
    for results in run_dist(all_beside_megatron, world=2):
        for case, errors in results.items():
            assert len(errors) >= 5 and max(errors.values()) < PARITY_FP32, (case, errors)


COUNTS = ((12, 0), (20, 28))
"""Text and vision tokens of each of two ranks."""


def global_balance(over: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the router that the balance loss alone makes, summed over ranks; its loss, likewise)."""
    mesh = groups.initialize(ParallelConfig())
    made = moe.make(ExpertSpec(**BASE, balance=0.5, balance_over=over), dp=mesh.dp)
    call = moe.call(*COUNTS[mesh.dp.rank()], step_tokens=60)
    (made(moe.tokens(call.order, seed=mesh.dp.rank()), call) * 0).sum().backward()
    total = torch.cat([made.router.weight.grad.flatten(), made.take_statistics().balance.reshape(1)])
    torch.distributed.all_reduce(total)
    groups.destroy()
    return total[:-1], total[-1]


def test_the_load_of_all_dp_ranks() -> None:
    """Two ranks of unlike sizes: gradients and loss of one rank that has all their tokens."""
    made = moe.make(ExpertSpec(**BASE, balance=0.5))
    calls = [moe.call(*counts) for counts in COUNTS]
    x = [moe.tokens(call.order, seed=rank).detach() for rank, call in enumerate(calls)]
    parts = [part for m in (0, 1) for part in (x[0].split(COUNTS[0])[m], x[1].split(COUNTS[1])[m])]
    (made(torch.cat(parts), moe.call(32, 28)) * 0).sum().backward()
    want = made.router.weight.grad.flatten()
    gradient, loss = run_dist(global_balance, world=2, args=("global_batch",))[0]
    assert relative_error(gradient, want) < PARITY_FP32
    assert relative_error(loss, made.take_statistics().balance) < PARITY_FP32
    each, _ = run_dist(global_balance, world=2, args=("micro_batch",))[0]
    assert relative_error(each, want) > 0.01
