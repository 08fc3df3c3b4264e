"""LoRA on one rank: its keys, what it adds to a linear of any kind, what a frozen base saves, merge and unmerge."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import models, moe
from tests.tolerances import PARITY_FP32, relative_error
from tests.unit.config_cases import MOE, base, enter_empty_folder, line_of
from unimega.config import loader, presets
from unimega.config.experts import ExpertSpec
from unimega.config.lora import has_factors, linears
from unimega.config.model import ModelSpec
from unimega.config.schema import Lora
from unimega.kernels import split_linear
from unimega.moe.experts import Experts
from unimega.parallel import lora
from unimega.parallel.factors import ONE, Fused
from unimega.parallel.linear import Layout, Weights, column_linear, row_linear

LORA = Lora(rank=2, alpha=5.0)
QKV = Fused((2, 1, 1), repeats=2)
"""Two groups of two query heads, a key and a value head."""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    enter_empty_folder(tmp_path, monkeypatch)


# --- keys ----------------------------------------------------------------------------------------------------------

LINES = [
    ({"rank": -1}, "model.lora.rank=-1 is negative. It is at least 1, or 0 for no factors."),
    (
        {"match": ["*.down"]},
        "model.lora.match=('*.down',) without factors: model.lora.rank is 0. Set a rank.",
    ),
    ({"dropout": 0.1}, "model.lora.dropout=0.1 without factors: model.lora.rank is 0. Set a rank."),
    ({"rank": 8, "alpha": -16}, "model.lora.alpha=-16.0 is too small. It is above 0."),
    ({"rank": 8, "dropout": 1.0}, "model.lora.dropout=1.0 is no share. It is at least 0 and below 1."),
    (
        {"rank": 8, "match": []},
        "model.lora.match is empty: no linear would have factors. Name some, or set rank to 0.",
    ),
    (
        {"rank": 8, "match": ["*.attention.*", "*.q_proj"]},
        "model.lora.match='*.q_proj' matches no linear. Linears: layers.*.attention.qkv, layers.*.attention.output, "
        "layers.*.ffn.gate_up, layers.*.ffn.down.",
    ),
    ({"ranks": 8}, "run.toml: unknown key 'model.lora.ranks'. Did you mean 'model.lora.rank'?"),
]


@pytest.mark.parametrize(("keys", "line"), LINES, ids=[line[:40] for _, line in LINES])
def test_mistakes_are_one_line(keys: dict[str, Any], line: str) -> None:
    assert line_of(base(model={"lora": keys})) == line


def test_the_model_keeps_its_factors() -> None:
    keys = {"rank": 4, "match": ["*.experts.*", "layers.1.attention.qkv"]}
    config = loader.from_dict(base(model={**MOE, "shared_expert_width": 8, "lora": keys}))
    spec = presets.model_spec(config.model)
    assert spec.lora == Lora(rank=4, match=("*.experts.*", "layers.1.attention.qkv"))
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    chosen = [name for name in linears(spec.layers) if has_factors(spec.lora, name)]
    assert [name for name in chosen if name.startswith("layers.1.")] == [
        "layers.1.attention.qkv",
        "layers.1.ffn.experts.gate_up",
        "layers.1.ffn.experts.down",
    ]
    assert "layers.1.ffn.shared.down" in linears(spec.layers)
    assert presets.model_spec(loader.from_dict(base(model=MOE)).model).lora is None


# --- linears -------------------------------------------------------------------------------------------------------


class Spy:
    """The definition, that remembers of which weights it computed gradients."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(split_linear.reference, name)

    def grad_weight(self, dy: torch.Tensor, x: torch.Tensor, spans: Any, needs: Any) -> list[torch.Tensor | None]:
        self.made += [(dy.shape[1], x.shape[1]) for needed in needs if needed]
        return split_linear.reference.grad_weight(dy, x, spans, needs)


def weights(dim: int, modalities: tuple[str, ...] | None, fused: Fused, *, seed: int = 0) -> Weights:
    made = Weights(6, 16, modalities=modalities, dim=dim, layout=Layout(moe.Alone(), False), fused=fused)
    made.lora = LORA
    made.adapt(LORA)
    generator = torch.Generator().manual_seed(seed)
    for values in made.parameters():
        values.data.normal_(generator=generator)
    return made


def run(made: Weights, x: torch.Tensor, counts: tuple[int, ...], gemms: Any = split_linear.reference) -> torch.Tensor:
    if made.dim == 0:
        return column_linear(x, made(counts), made.layout, gemms)[0]
    return row_linear((x,), made(counts), sum(counts), made.layout, gemms)


def projections(fused: Fused, outputs: int) -> list[list[int]]:
    """The rows of each projection in a fused weight, counted by hand."""
    unit = outputs // (fused.repeats * sum(fused.sizes))
    found: list[list[int]] = [[] for _ in fused.sizes]
    row = 0
    for _ in range(fused.repeats):
        for which, size in enumerate(fused.sizes):
            found[which] += range(row, row + size * unit)
            row += size * unit
    return found


def defined(made: Weights, x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Modality by modality, projection by projection, as PEFT adapts separate linears."""
    parts = []
    split = len(made.suffixes) > 1
    for suffix, rows in zip(made.suffixes, x.split(counts) if split else (x,), strict=True):
        weight, a, b = (getattr(made, f"{name}{suffix}") for name in ("weight", "lora_a", "lora_b"))
        y = torch.empty(len(rows), len(weight))
        for which, those in enumerate(projections(made.fused, len(weight))):
            own_a = a[which * LORA.rank : (which + 1) * LORA.rank]
            y[:, those] = rows @ weight[those].T + LORA.alpha / LORA.rank * (rows @ own_a.T @ b[those].T)
        parts.append(y)
    return torch.cat(parts)


@pytest.mark.parametrize("counts", [(3, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("modalities", [None, ("text", "vision")], ids=["shared", "split"])
@pytest.mark.parametrize(("dim", "fused"), [(0, QKV), (0, Fused((1, 1))), (0, ONE), (1, ONE)])
def test_a_linear_equals_the_definition(
    dim: int, fused: Fused, modalities: tuple[str, ...] | None, counts: tuple[int, ...]
) -> None:
    made = weights(dim, modalities, fused)
    dy = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (run, defined):
        x = torch.randn(sum(counts), 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        made.zero_grad()
        y = function(made, x, counts)
        y.backward(dy)
        found.append([y.detach(), x.grad, *(values.grad.clone() for values in made.parameters())])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < PARITY_FP32


@pytest.mark.parametrize("dim", [0, 1], ids=["column", "row"])
def test_a_frozen_base_computes_no_gradient_of_its_weights(dim: int) -> None:
    made, spy = weights(dim, ("text", "vision"), ONE), Spy()
    x = torch.randn(7, 6).requires_grad_()
    run(made, x, (3, 4), spy).sum().backward()
    assert (16, 6) in spy.made
    spy.made.clear()
    for name, values in made.named_parameters():
        values.requires_grad_("lora_" in name)
    run(made, x, (3, 4), spy).sum().backward()
    assert sorted(set(spy.made)) == [(2, 6), (16, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_added(dtype: torch.dtype) -> None:
    made = weights(0, ("text", "vision"), QKV).to(dtype)
    before = {name: values.detach().clone() for name, values in made.named_parameters()}
    x = torch.randn(7, 6, dtype=dtype)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        added = run(made, x, (3, 4))
        lora.merge([made])
        lora.merge([made])  # once is enough
        merged = run(made, x, (3, 4))
        assert made((3, 4))[0].factors is None
        assert relative_error(merged.float(), added.float()) < 4 * eps
        assert not torch.equal(made.weight_text, before["weight_text"])
        lora.unmerge([made])
        lora.unmerge([made])
        again = run(made, x, (3, 4))
    for name, values in made.named_parameters():
        largest = max(before[name].abs().max(), merged.abs().max()).item()
        assert (values.float() - before[name].float()).abs().max() <= eps * largest, name
    assert relative_error(again.float(), added.float()) < 8 * eps


def test_dropout_is_for_training_alone() -> None:
    made = weights(0, None, ONE)
    made.lora = replace(LORA, dropout=0.5)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    made.eval()
    assert relative_error(run(made, x, (400,)), defined(made, x, (400,))) < PARITY_FP32
    made.train()
    torch.manual_seed(0)
    first, second = run(made, x, (400,)), run(made, x, (400,))
    torch.manual_seed(0)
    assert torch.equal(run(made, x, (400,)), first)
    assert not torch.equal(first, second)
    plain = F.linear(x, made.weight)  # which never sees a dropped value
    many = torch.stack([run(made, x, (400,)) - plain for _ in range(200)])
    want = defined(made, x, (400,)) - plain
    assert (many.mean(0) - want).abs().max() < 0.35 * want.abs().max()
    assert relative_error(many.mean((0, 1)), want.mean(0)) < 0.2


# --- experts -------------------------------------------------------------------------------------------------------

EXPERTS = ExpertSpec(number=5, width=6, top_k=2)


def experts_defined(made: Experts, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Token by token, as Uni-MoE writes an expert: g, u and y each have factors of their own."""
    scale, r = LORA.alpha / LORA.rank, LORA.rank
    gate_up, down = made.gate_up, made.down
    out = []
    for token, row in enumerate(x):
        total = torch.zeros_like(row)
        for slot, e in enumerate(chosen[token].tolist()):
            if e == EXPERTS.number:
                continue
            wg, wu = gate_up.weight[e].chunk(2)
            ag, au = gate_up.lora_a[e][:r], gate_up.lora_a[e][r:]
            bg, bu = gate_up.lora_b[e].chunk(2)
            g = wg @ row + scale * bg @ (ag @ row)
            u = wu @ row + scale * bu @ (au @ row)
            h = F.silu(g) * u
            total = total + weights[token, slot] * (down.weight[e] @ h + scale * down.lora_b[e] @ (down.lora_a[e] @ h))
        out.append(total)
    return torch.stack(out)


def test_experts_equal_the_definition() -> None:
    made = Experts(moe.build(models.ONE), EXPERTS)
    lora.adapt(made, LORA)
    generator = torch.Generator().manual_seed(0)
    for values in made.parameters():
        values.data.normal_(std=0.3, generator=generator)
    layer = moe.make(EXPERTS, vocabulary=models.ONE)
    chosen = torch.tensor([[0, 1], [1, 4], [5, 5], [4, 0], [1, 5]], dtype=torch.int32)  # 5: none; nobody takes 2 and 3
    found = []
    for function in (made, experts_defined):
        x = torch.randn(5, moe.WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        share = torch.rand(5, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
        made.zero_grad()
        if function is made:
            y = made(x, share, layer.expert_order(chosen, EXPERTS.number))
        else:
            y = experts_defined(made, x, share, chosen)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
        found.append([y.detach(), x.grad, share.grad, *(values.grad.clone() for values in made.parameters())])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < PARITY_FP32
    lora.merge([made])
    share = share.detach()
    with torch.no_grad():
        merged = made(x, share, layer.expert_order(chosen, EXPERTS.number))
    assert relative_error(merged, found[0][0]) < PARITY_FP32


def test_frozen_experts_compute_no_gradient_of_their_weights() -> None:
    made = Experts(moe.build(models.ONE), EXPERTS)
    lora.adapt(made, LORA)
    seen = []
    gemm = made.gemm

    def spied(x: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(values.shape[1:]), values.requires_grad))
        return gemm(x, values, offsets)

    made.gemm = spied
    for name, values in made.named_parameters():
        values.data.normal_(std=0.3)
        values.requires_grad_("lora_" in name)
    order = moe.make(EXPERTS, vocabulary=models.ONE).expert_order(torch.tensor([[0, 1]], dtype=torch.int32), 5)
    made(torch.randn(1, moe.WIDTH), torch.ones(1, 2), order).sum().backward()
    assert seen[0] == ((12, 32), False) and seen[3] == ((32, 6), False)
    assert all(needs for _, needs in seen[1:3] + seen[4:])
    assert made.gate_up.weight.grad is None and made.gate_up.lora_a.grad is not None
