"""The check that holds our rows to torch-npu's documentation refuses calls that schemas and meta kernels let pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.npu import simulation
from tests.kernels.npu.contracts import CONTRACTS, Refused
from tests.kernels.npu.simulation import SCHEMAS

if not simulation.install():
    pytest.skip("torch-npu has defined its own operators", allow_module_level=True)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def triangle(dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.ones(2048, 2048).triu(1).to(dtype)


def attention(**changes: Any) -> Call:
    kwargs = {"atten_mask": triangle(), "sparse_mode": 3, "actual_seq_qlen": [2, 6], "actual_seq_kvlen": [2, 6]}
    q, layout = changes.pop("q", zeros(6, 4, 8)), changes.pop("layout", "TND")
    k, heads = changes.pop("k", zeros(6, 2, 8)), changes.pop("heads", 4)
    return (q, k, k, heads, layout), kwargs | changes


def rotary(**changes: Any) -> Call:
    angles = changes.pop("angles", zeros(1, 6, 1, 8))
    return (changes.pop("x", zeros(1, 6, 4, 8)), angles, angles), changes


def gemm(**changes: Any) -> Call:
    kwargs = {"group_list": torch.tensor([2, 6]), "split_item": 2, "group_type": 0, "group_list_type": 0}
    return ([changes.pop("x", zeros(6, 8))], [changes.pop("w", zeros(2, 8, 5))]), kwargs | changes


def permute(**changes: Any) -> Call:
    return (zeros(3, 8), changes.pop("indices", torch.arange(6).view(3, 2))), changes


def unpermute(**changes: Any) -> Call:
    places = changes.pop("places", torch.arange(6).int())
    return (zeros(6, 8), places), {"probs": zeros(3, 2)} | changes


def gating(**changes: Any) -> Call:
    return (zeros(3, 12), changes.pop("k", 2)), changes


RIGHT: dict[str, Call] = {
    "npu_fusion_attention": attention(),
    "npu_rms_norm": ((zeros(3, 8), zeros(8)), {"epsilon": 1e-5}),
    "npu_rms_norm_backward": ((zeros(3, 8), zeros(3, 8), zeros(8), zeros(3, 1)), {}),
    "npu_rotary_mul": rotary(),
    "npu_swiglu": ((zeros(3, 8),), {"dim": -1}),
    "npu_grouped_matmul": gemm(),
    "npu_moe_token_permute": permute(),
    "npu_moe_token_unpermute": unpermute(),
    "npu_moe_gating_top_k": gating(),
}

bf16, whole = torch.bfloat16, {"actual_seq_qlen": [6], "actual_seq_kvlen": [6]}
WRONG: list[tuple[str, str, Callable[[], Call]]] = [
    ("npu_fusion_attention", "layout", lambda: attention(layout="BSND")),
    ("npu_fusion_attention", "heads of q", lambda: attention(heads=8)),
    ("npu_fusion_attention", "heads of k", lambda: attention(k=zeros(6, 3, 8))),
    ("npu_fusion_attention", "dtypes", lambda: attention(k=zeros(6, 2, 8, dtype=bf16))),
    ("npu_fusion_attention", "fp64", lambda: attention(q=zeros(6, 4, 8).double(), k=zeros(6, 2, 8).double())),
    ("npu_fusion_attention", "no mask", lambda: attention(atten_mask=None)),
    ("npu_fusion_attention", "mask that shows", lambda: attention(atten_mask=~triangle())),
    ("npu_fusion_attention", "mask of the run", lambda: attention(atten_mask=triangle()[:6, :6])),
    ("npu_fusion_attention", "mask in fp32", lambda: attention(atten_mask=triangle(torch.float32))),
    ("npu_fusion_attention", "no lengths", lambda: attention(actual_seq_qlen=None, actual_seq_kvlen=None)),
    ("npu_fusion_attention", "leading 0", lambda: attention(actual_seq_qlen=[0, 6], actual_seq_kvlen=[0, 6])),
    ("npu_fusion_attention", "lengths, not ends", lambda: attention(actual_seq_qlen=[2, 4], actual_seq_kvlen=[2, 4])),
    ("npu_fusion_attention", "lengths of k", lambda: attention(actual_seq_kvlen=[3, 6])),
    ("npu_fusion_attention", "row without a key", lambda: attention(
        sparse_mode=1, atten_mask=torch.ones(6, 6, dtype=torch.bool), **whole)),
    ("npu_rms_norm", "dtypes", lambda: ((zeros(3, 8, dtype=bf16), zeros(8)), {})),
    ("npu_rms_norm", "width", lambda: ((zeros(3, 8), zeros(4)), {})),
    ("npu_rms_norm", "no rows", lambda: ((zeros(0, 8), zeros(8)), {})),
    ("npu_rms_norm_backward", "rms of another shape", lambda: ((zeros(3, 8), zeros(3, 8), zeros(8), zeros(3)), {})),
    ("npu_rotary_mul", "3 dims", lambda: rotary(x=zeros(6, 4, 8), angles=zeros(6, 1, 8))),
    ("npu_rotary_mul", "half of the angles", lambda: rotary(angles=zeros(1, 6, 1, 4))),
    ("npu_rotary_mul", "dtypes", lambda: rotary(x=zeros(1, 6, 4, 8, dtype=bf16))),
    ("npu_rotary_mul", "angles themselves", lambda: rotary(angles=zeros(1, 6, 1, 8) + 3)),
    ("npu_rotary_mul", "mode", lambda: rotary(rotary_mode="quarter")),
    ("npu_swiglu", "odd", lambda: ((zeros(3, 7),), {})),
    ("npu_grouped_matmul", "int32 groups", lambda: gemm(group_list=torch.tensor([2, 6]).int())),
    ("npu_grouped_matmul", "groups do not fill", lambda: gemm(group_list=torch.tensor([2, 5]))),
    ("npu_grouped_matmul", "leading 0", lambda: gemm(group_list=torch.tensor([0, 2, 6]))),
    ("npu_grouped_matmul", "weights not transposed", lambda: gemm(w=zeros(2, 5, 8))),
    ("npu_grouped_matmul", "x transposed", lambda: gemm(x=zeros(8, 6).t())),
    ("npu_grouped_matmul", "dtypes", lambda: gemm(w=zeros(2, 8, 5, dtype=bf16))),
    ("npu_grouped_matmul", "one output each", lambda: gemm(split_item=0)),
    ("npu_grouped_matmul", "no group type", lambda: gemm(group_type=None)),
    ("npu_grouped_matmul", "one count", lambda: gemm(
        w=zeros(1, 8, 5), group_list=torch.tensor([6]), group_list_type=1)),
    ("npu_moe_token_permute", "negative", lambda: permute(indices=torch.arange(6).view(3, 2) - 1)),
    ("npu_moe_token_permute", "flat", lambda: permute(indices=torch.arange(6))),
    ("npu_moe_token_permute", "padded", lambda: permute(padded_mode=True)),
    ("npu_moe_token_unpermute", "int64", lambda: unpermute(places=torch.arange(6))),
    ("npu_moe_token_unpermute", "twice", lambda: unpermute(places=torch.zeros(6).int())),
    ("npu_moe_token_unpermute", "no weights", lambda: unpermute(probs=None)),
    ("npu_moe_gating_top_k", "k", lambda: gating(k=5, group_count=3, k_group=1)),
    ("npu_moe_gating_top_k", "bias", lambda: gating(bias=zeros(12, dtype=bf16))),
    ("npu_moe_gating_top_k", "small groups", lambda: gating(group_count=6, k_group=2)),
]  # fmt: skip


def test_every_operator_has_a_contract_and_a_kernel() -> None:
    names = {schema.partition("(")[0] for schema in SCHEMAS}
    assert names == set(CONTRACTS) == set(RIGHT) == {*simulation.DIFFERENTIABLE, *simulation.OTHERS}
    assert names == {name for name, *_ in WRONG}


@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_pass(name: str) -> None:
    args, kwargs = RIGHT[name]
    getattr(torch.ops.npu, name)(*args, **kwargs)


@pytest.mark.parametrize(("name", "call"), [(n, c) for n, _, c in WRONG], ids=[f"{n}-{what}" for n, what, _ in WRONG])
def test_wrong_calls_are_refused(name: str, call: Callable[[], Call]) -> None:
    args, kwargs = call()
    with pytest.raises(Refused):
        getattr(torch.ops.npu, name)(*args, **kwargs)
