"""Rows that call flash-attn, torch's varlen kernel and Apex: arguments and choice, on stand-ins with their signatures.

None of them runs on a CPU. What a stand-in computes is plain torch; what it takes is what the package takes.
"""

import dataclasses
import importlib.util
import inspect
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F

from tests.kernels.cases import on_device, shuffled
from unimega import backend
from unimega.batch import Intervals
from unimega.kernels import availability, registry, split_linear
from unimega.kernels.attention import reference

if backend.current().name != "cpu" or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton's interpreter on a CPU", allow_module_level=True)

from unimega.kernels import apex, flash

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
LENGTHS = (5, 9, 2)


def by_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, scale: float) -> torch.Tensor:
    outputs = []
    for start, stop in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        parts = (x[None, start:stop].transpose(1, 2) for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True))
    return torch.cat([out[0].transpose(0, 1) for out in outputs])


class FlashAttn(types.ModuleType):
    """flash-attn 2.7's ``flash_attn_varlen_func``."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls = 0

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.calls += 1
        assert causal and deterministic and not dropout_p
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(LENGTHS)
        assert softmax_scale is not None
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return by_runs(q, k, v, cu_seqlens_q, softmax_scale)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    module = FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def varlen_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every call of torch's kernel, bound to its own signature."""
    signature = inspect.signature(torch.nn.attention.varlen.varlen_attn)
    calls: list[dict[str, Any]] = []

    def varlen_attn(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs).arguments
        calls.append(bound)
        return by_runs(bound["query"], bound["key"], bound["value"], bound["cu_seq_q"], bound["scale"])

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    return calls


def attend(op: Any, dtype: torch.dtype, *, causal: bool = True, width: int = 8, reorder: bool = True) -> Any:
    """Output and gradients."""
    total = sum(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(total, heads, width, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    intervals = on_device(Intervals.of_runs(LENGTHS, both_ways=() if causal else ((1, 4),)), CPU)
    rows, inverse = shuffled(total, CPU) if reorder else (None, None)
    out = op(*leaves, intervals, scale=0.3, rows=rows, inverse=inverse)
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=generator).to(dtype))]


@pytest.mark.parametrize("reorder", [False, True])
def test_flash_attn_is_called_as_it_wants_to_be(flash_attn: FlashAttn, reorder: bool) -> None:
    found = attend(flash.flash_attn, torch.bfloat16, reorder=reorder)
    for mine, wanted in zip(found, attend(reference, torch.bfloat16, reorder=reorder), strict=True):
        torch.testing.assert_close(mine, wanted, atol=0.02, rtol=0.02)
    assert flash_attn.calls == 1


@pytest.mark.parametrize(
    "options", [{"causal": False}, {"dtype": torch.float32}, {"width": 6}], ids=["both ways", "fp32", "odd width"]
)
def test_what_flash_attn_cannot_do_goes_to_triton(flash_attn: FlashAttn, options: dict[str, Any]) -> None:
    options = {"dtype": torch.bfloat16} | options
    found = attend(flash.flash_attn, **options)
    for mine, wanted in zip(found, attend(reference, **options), strict=True):
        torch.testing.assert_close(mine, wanted, atol=0.02, rtol=0.02)
    assert flash_attn.calls == 0


def test_torch_varlen_is_called_as_it_wants_to_be(varlen_calls: list[dict[str, Any]]) -> None:
    found = attend(flash.torch_varlen, torch.bfloat16)
    for mine, wanted in zip(found, attend(reference, torch.bfloat16), strict=True):
        torch.testing.assert_close(mine, wanted, atol=0.02, rtol=0.02)
    (call,) = varlen_calls
    assert (call["max_q"], call["max_k"], call["window_size"], call["enable_gqa"]) == (9, 9, (-1, 0), True)
    attend(flash.torch_varlen, torch.bfloat16, causal=False)
    assert len(varlen_calls) == 1


def test_rows_name_the_package_they_miss() -> None:
    reasons = {
        (op, impl.name): registry.why_not(impl, CUDA)
        for op in ("attention", "rms_norm", "split_linear")
        for impl in registry.implementations(op)
        if impl.name in ("flash-attn", "apex")
    }
    assert reasons == {
        ("attention", "flash-attn"): "flash_attn is not installed",
        ("rms_norm", "apex"): "apex is not installed",
        ("split_linear", "apex"): "fused_weight_gradient_mlp_cuda is not installed",
    }


def test_varlen_wants_a_torch_that_takes_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    (impl,) = (each for each in registry.implementations("attention") if each.name == "torch-varlen")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert registry.why_not(impl, CUDA) == "needs torch 2.13, this is 2.11.0+cu130"


def test_apex_norm_is_called_for_each_modality(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_rms_norm_affine(
        x: torch.Tensor, weight: torch.Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
    ) -> torch.Tensor:
        assert x.is_contiguous()
        assert len(x)
        return F.rms_norm(x, normalized_shape, weight, eps)

    module = types.SimpleNamespace(fused_rms_norm_affine=fused_rms_norm_affine)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", module)
    wanted = registry.resolve("rms_norm", device=CPU, impl="reference")
    x = torch.randn(7, 6, requires_grad=True)
    weights = tuple(torch.randn(6, requires_grad=True) for _ in range(3))
    for counts, own in (((7,), weights[:1]), ((4, 0, 3), weights)):
        for mine, other in zip(
            gradients(apex.rms_norm, x, own, counts), gradients(wanted, x, own, counts), strict=True
        ):
            torch.testing.assert_close(mine, other)


def gradients(op: Any, x: torch.Tensor, weights: tuple[torch.Tensor, ...], counts: tuple[int, ...]) -> Any:
    y = op(x, weights, counts, 1e-5)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *weights))]


def test_addmm_asks_for_fp32() -> None:
    """The call that only CUDA takes, checked by torch's own shape function: on tensors without memory."""
    op = split_linear.addmm
    main = torch.empty(4, 3, device="meta")
    assert op.accumulate_weight is not None
    op.accumulate_weight(
        torch.empty(5, 4, device="meta", dtype=torch.bfloat16),
        torch.empty(5, 3, device="meta", dtype=torch.bfloat16),
        main,
    )
    assert dataclasses.replace(op, accumulate_weight=None) == registry.resolve(
        "split_linear", device=CPU, impl="reference"
    )


@pytest.mark.parametrize(
    ("installed", "reasons"),
    [
        ((), ["transformer_engine is not installed", "apex is not installed", None]),
        (("apex",), ["transformer_engine is not installed", None, "megatron-core takes apex's"]),
        (("transformer_engine", "apex"), [None, *["megatron-core takes transformer-engine's"] * 2]),
    ],
)
def test_the_optimizer_is_the_one_megatron_takes(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], reasons: list[str | None]
) -> None:
    monkeypatch.setattr(availability, "missing", lambda name: None if name in installed else f"{name} is not installed")
    rows = [impl for impl in registry.implementations("adamw") if "cuda" in impl.devices]
    assert [registry.why_not(impl, CUDA) for impl in rows] == reasons
    chosen = [row.impl for row in registry.rows((CUDA,)) if row.op == "adamw" and row.chosen]
    assert chosen == [impl.name for impl, reason in zip(rows, reasons, strict=True) if reason is None]
