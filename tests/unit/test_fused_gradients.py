"""Weight gradients that a GEMM adds to main grads itself, under megatron-core's DDP; and whose FusedAdam is used."""

import datetime
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import unimega.parallel  # noqa: F401  (before megatron)
from unimega import backend
from unimega.kernels import apex, split_linear
from unimega.kernels.adamw import AdamW
from unimega.parallel import repairs
from unimega.parallel.linear import Layout, Weights, column_linear, row_linear

if backend.current().name != "cpu":
    pytest.skip("runs megatron-core on the CPU", allow_module_level=True)

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

COUNTS = (5, 0, 3)


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    backend.current().init_process_group(timeout=datetime.timedelta(seconds=60))
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class Apex(types.ModuleType):
    """``wgrad_gemm_accum_fp32(input, d_output, d_weight)``, which adds in place."""

    def __init__(self) -> None:
        super().__init__("fused_weight_gradient_mlp_cuda")
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, x: torch.Tensor, d_output: torch.Tensor, d_weight: torch.Tensor) -> None:
        self.calls += 1
        assert x.is_contiguous()
        assert d_output.is_contiguous()
        assert d_weight.is_contiguous()
        assert x.dtype == d_output.dtype == torch.bfloat16
        assert d_weight.dtype == torch.float32
        assert len(x)
        d_weight += d_output.float().t() @ x.float()


class Pair(torch.nn.Module):
    """A frozen linear, a column linear of one weight a modality, one of them frozen, and a shared row linear."""

    def __init__(self, gemms: Any, layout: Layout) -> None:
        super().__init__()
        self.gemms, self.layout = gemms, layout
        self.first = Weights(8, 8, modalities=None, dim=0, layout=layout)
        self.into = Weights(8, 12, modalities=("text", "vision", "audio"), dim=0, layout=layout)
        self.out = Weights(12, 8, modalities=None, dim=1, layout=layout)
        generator = torch.Generator().manual_seed(0)
        for values in self.parameters():
            with torch.no_grad():
                values.copy_(torch.randn(values.shape, generator=generator))
        self.first.weight.requires_grad_(False)
        self.into.weight_audio.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (x,) = column_linear(x, self.first(COUNTS), self.layout, self.gemms)
        (hidden,) = column_linear(x, self.into(COUNTS), self.layout, self.gemms)
        return row_linear((hidden,), self.out(COUNTS), sum(COUNTS), self.layout, self.gemms)


def main_grads(gemms: Any, dtype: torch.dtype, *, overlap: bool) -> dict[str, torch.Tensor]:
    """After two micro-batches."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=dtype == torch.bfloat16)
    module = Pair(gemms, Layout(dist.group.WORLD, False)).to(dtype)  # type: ignore[arg-type]
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
        ),
        module,
    )
    ddp.zero_grad_buffer()
    for number in range(2):
        x = torch.randn(sum(COUNTS), 8, generator=torch.Generator().manual_seed(number)).to(dtype)
        if overlap and number == 0:
            with ddp.no_sync():
                ddp(x).float().square().sum().backward()
        else:
            ddp(x).float().square().sum().backward()
    ddp.finish_grad_sync()
    return {name: p.main_grad.clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("overlap", [False, True])
def test_main_grads_are_those_of_the_reference(world: None, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    fake = Apex()
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", fake)
    found = main_grads(apex.split_linear, torch.bfloat16, overlap=overlap)
    assert fake.calls == 2 * 2  # two micro-batches; text and the row linear: vision has no rows, the others are frozen
    wanted = main_grads(split_linear.reference, torch.bfloat16, overlap=overlap)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=0.02, atol=0.02 * float(wanted[name].abs().max() + 1e-9))
    assert not found["into.weight_vision"].any()
    assert all(grad.any() for name, grad in found.items() if "vision" not in name)


def test_fp32_weights_are_left_to_the_reference(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", fake := Apex())
    found = main_grads(apex.split_linear, torch.float32, overlap=False)
    wanted = main_grads(split_linear.reference, torch.float32, overlap=False)
    assert fake.calls == 0
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class FusedAdam:
    """Apex's or TransformerEngine's, as megatron-core imports it."""


@pytest.mark.parametrize("number", [0, 1])
def test_fused_adam_is_used_where_it_runs(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    repair = repairs.REPAIRS[number]
    module = types.SimpleNamespace(
        Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True
    )
    monkeypatch.setattr(backend.current(), "runs_apex", True)
    assert not repair.needed(module)  # megatron-core's choice stands
    monkeypatch.setattr(backend.current(), "runs_apex", False)
    assert repair.needed(module)
    repair.apply(module)
    assert module.Adam is AdamW
    assert not repair.needed(module)
    if repair.name == "optimizer state":
        assert (module.USING_TE_OPTIMIZER, module.USING_APEX_OPTIMIZER) == (False, True)
