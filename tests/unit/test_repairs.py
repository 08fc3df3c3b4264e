"""What megatron-core lacks without TransformerEngine and Apex, repair by repair, and the AdamW that it gets."""

import copy
import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import unimega.parallel  # noqa: F401  (before megatron)
from unimega import backend
from unimega.kernels.adamw import AdamW
from unimega.parallel import repairs

if backend.current().name != "cpu":
    pytest.skip("runs megatron-core on the CPU", allow_module_level=True)

import megatron.core.optimizer as optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

without_te = pytest.mark.skipif(megatron_random.HAVE_TE, reason="TransformerEngine is installed: nothing to repair")


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    backend.current().init_process_group(timeout=datetime.timedelta(seconds=60))
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class Small(torch.nn.Module):
    """Two parameters and what megatron's DDP and optimizer look at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def build(*, bf16: bool = False) -> tuple[Any, Any]:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=bf16)
    model = Small().to(torch.bfloat16 if bf16 else torch.float32)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    settings = optimizer.OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.1, adam_eps=1e-3, bf16=bf16, use_distributed_optimizer=True
    )
    return ddp, optimizer.get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False)


def only(opt: Any) -> Any:
    """The one distributed optimizer of a model without experts."""
    (one,) = opt.chained_optimizers
    return one


def train(ddp: Any, opt: Any, steps: int, *, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
        ddp.zero_grad_buffer()
        opt.zero_grad()
        loss = ddp(x.to(next(ddp.parameters()).dtype)).float().square().sum()
        loss.backward()
        ddp.finish_grad_sync()
        opt.step()
        losses.append(loss.detach().tolist())
    return losses


def test_all_repairs_are_listed_and_were_needed() -> None:
    assert repairs.install() == tuple(repair.name for repair in repairs.REPAIRS)
    if not megatron_random.HAVE_TE:
        assert sorted(repairs.applied()) == sorted(repair.name for repair in repairs.REPAIRS)  # each once


def test_a_repair_that_is_not_needed_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repairs, "_applied", [])
    for repair in repairs.REPAIRS:
        module = {
            "megatron.core.optimizer": optimizer,
            "megatron.core.optimizer.distrib_optimizer": distrib_optimizer,
        }.get(repair.module)
        if module is not None:  # repaired, so it says that it needs nothing
            repairs._repair(module, repair=repair)
    assert repairs.applied() == ()


@without_te
def test_optimizer_class_is_ours(world: None) -> None:
    _, opt = build()
    assert type(only(opt).optimizer) is AdamW
    assert optimizer.USING_PYTORCH_OPTIMIZER is False


@without_te
@pytest.mark.parametrize("bf16", [False, True])
def test_optimizer_state_survives(world: None, bf16: bool) -> None:
    """Save and load as a checkpoint does; the third and fourth step are those of an uninterrupted run, bit for bit."""
    ddp, opt = build(bf16=bf16)
    train(ddp, opt, 2)
    weights = copy.deepcopy(ddp.module.state_dict())
    state = copy.deepcopy(opt.state_dict())
    moments = [only(opt)._get_main_param_and_optimizer_states(p) for p in ddp.parameters()]
    moments = [{key: tensor.detach().clone() for key, tensor in tensors.items()} for tensors in moments]
    assert all(set(tensors) == {"param", "exp_avg", "exp_avg_sq"} for tensors in moments)
    groups = state["optimizer"]["param_groups"]
    assert [group["step"] for group in groups] == [2] * len(groups)
    assert all(type(group["step"]) is int for group in groups)
    expected = train(ddp, opt, 2, start=2)

    other, again = build(bf16=bf16)
    other.module.load_state_dict(weights)
    again.load_state_dict(state)
    with torch.no_grad():
        for p, tensors in zip(other.parameters(), moments, strict=True):
            only(again)._set_main_param_and_optimizer_states(p, tensors)
    assert train(other, again, 2, start=2) == expected
    for a, b in zip(ddp.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@without_te
def test_router_gating_in_fp32() -> None:
    """NameError: te_general_gemm."""
    x = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    y = moe_utils.router_gating_linear(x, weight, None, torch.float32)
    y.sum().backward()
    torch.testing.assert_close(y, x.float() @ weight.float().t())
    assert x.grad is not None
    assert weight.grad is not None


@without_te
def test_checkpoint_without_output() -> None:
    """NameError: FP8GlobalStateManager."""
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)
    (x.tanh() @ weight).square().sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None

    checkpoint = megatron_random.CheckpointWithoutOutput()
    assert checkpoint.fp8 is False
    assert megatron_random.CheckpointWithoutOutput(fp8=None).fp8 is False
    assert megatron_random.CheckpointWithoutOutput(fp8="e4m3").fp8 is True
    middle = checkpoint.checkpoint(torch.tanh, x)
    y = middle @ weight
    checkpoint.discard_output_and_register_recompute(y)
    y.square().sum().backward()
    assert torch.equal(x.grad, expected)


# AdamW ----------------------------------------------------------------------


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((7, 5), (3,), (), (0, 4))]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": params[2:], "betas": (0.8, 0.9), "eps": 1e-6},
        {"params": []},
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_equals_torch(fused: bool) -> None:
    ours, theirs = parameters(), parameters()
    a = AdamW(groups_of(ours), lr=3e-3, weight_decay=0.02)
    b = torch.optim.AdamW(groups_of(theirs), lr=3e-3, weight_decay=0.02, fused=fused)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for mine, reference in zip(ours, theirs, strict=True):
        if fused:
            assert torch.equal(mine, reference)
        else:
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)
    assert [group["step"] for group in a.param_groups] == [10, 10, 10]


def test_equals_torch_adam_without_decoupled_decay() -> None:
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, lr=1e-2, weight_decay=0.3, adam_w_mode=False), torch.optim.Adam(theirs, 1e-2, weight_decay=0.3)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


def test_state_dict_round_trip(tmp_path: Any) -> None:
    whole, cut = parameters(), parameters()
    a, b = AdamW(groups_of(whole)), AdamW(groups_of(cut))
    for step in range(6):
        set_gradients(whole, step)
        a.step()
        set_gradients(cut, step)
        b.step()
        if step == 2:
            torch.save(b.state_dict(), tmp_path / "state.pt")
            b = AdamW(groups_of(cut), lr=9.0)
            b.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert all(torch.equal(p, q) for p, q in zip(whole, cut, strict=True))
    assert [type(group["step"]) for group in b.param_groups] == [int] * 3
    assert {key for state in b.state.values() for key in state} == {"exp_avg", "exp_avg_sq"}


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    opt = AdamW(params, weight_decay=0.5)
    set_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    opt.step()
    assert torch.equal(params[1], before)
    assert params[1] not in opt.state


def test_mixed_dtypes_in_a_group() -> None:
    mixed, alone = [*parameters(), *parameters(torch.bfloat16)], parameters(torch.bfloat16)
    set_gradients(mixed[:4], 0)
    set_gradients(mixed[4:], 0)
    set_gradients(alone, 0)
    AdamW(mixed, lr=0.1).step()
    AdamW(alone, lr=0.1).step()
    assert all(torch.equal(p, q) for p, q in zip(mixed[4:], alone, strict=True))


def test_closure() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = AdamW([param], lr=0.1)

    def closure() -> float:
        loss = param.square().sum()
        loss.backward()
        return loss.detach().tolist()

    assert opt.step(closure) == 3.0
    assert (param < 1).tolist() == [True] * 3
