"""The layer of routed experts against transformers' blocks, at its borders, and without a host sync."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from tests import moe
from tests.sync_guard import forbid_syncs
from tests.tolerances import relative_error
from unimega.config.experts import ExpertSpec
from unimega.layers.context import Call
from unimega.moe import capacity
from unimega.moe.layer import MoE
from unimega.moe.router import Routing
from unimega.moe.rows import of_rank

TRANSFORMERS = 3e-5
SIZES = {"hidden_size": moe.WIDTH, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "num_experts": 8}


def qwen3(normalize: bool) -> tuple[ExpertSpec, nn.Module]:
    block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**SIZES, norm_topk_prob=normalize, experts_implementation="eager"))
    return ExpertSpec(number=8, width=24, top_k=3, normalize=normalize), block


def mixtral() -> tuple[ExpertSpec, nn.Module]:
    config = MixtralConfig(hidden_size=moe.WIDTH, intermediate_size=24, num_experts_per_tok=2, num_local_experts=8)
    return ExpertSpec(number=8, width=24, top_k=2), MixtralSparseMoeBlock(config)


def qwen2() -> tuple[ExpertSpec, nn.Module]:
    config = Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=40, norm_topk_prob=False)
    spec = ExpertSpec(number=8, width=24, top_k=3, normalize=False, shared_width=40, shared_gate=True)
    return spec, Qwen2MoeSparseMoeBlock(config)


def deepseek() -> tuple[ExpertSpec, nn.Module]:
    config = DeepseekV3Config(
        hidden_size=moe.WIDTH, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
        topk_group=2, n_shared_experts=2, routed_scaling_factor=1.5, norm_topk_prob=True,
    )  # fmt: skip
    spec = ExpertSpec(
        number=8, width=24, top_k=3, score="sigmoid", scale=1.5, groups=4, group_topk=2, bias_rate=1e-3, shared_width=48
    )
    return spec, DeepseekV3MoE(config)


def names_of(block: nn.Module) -> dict[str, tuple[str, ...]]:
    """Our parameter -> theirs, several if ours holds them one under the other."""
    shared = "shared_experts" if hasattr(block, "shared_experts") else "shared_expert"
    return {
        "router.weight": ("gate.weight",),
        "experts.gate_up.weight": ("experts.gate_up_proj",),
        "experts.down.weight": ("experts.down_proj",),
        "shared.gate_up.weight": (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
        "shared.down.weight": (f"{shared}.down_proj.weight",),
        "shared_gate.weight": ("shared_expert_gate.weight",),
    }


@pytest.mark.parametrize(
    "kind", [lambda: qwen3(True), lambda: qwen3(False), mixtral, qwen2, deepseek],
    ids=["qwen3 normalised", "qwen3 not normalised", "mixtral", "qwen2 shared gate", "deepseek v3"],
)  # fmt: skip
def test_transformers(kind: object) -> None:
    spec, block = kind()
    made = moe.make(spec)
    theirs, names = dict(block.named_parameters()), names_of(block)
    with torch.no_grad():
        for name, values in made.named_parameters():
            parts = [theirs[other] for other in names[name]]
            for part, own in zip(parts, values.split([len(p) for p in parts]), strict=True):
                part.copy_(own)
        if made.router.bias is not None:
            made.router.bias.copy_(torch.linspace(-0.3, 0.3, 8))
            block.gate.e_score_correction_bias.copy_(made.router.bias)
    call = moe.call(40, 23)
    got = moe.gradients(made, moe.tokens(call.order), call)
    x = moe.tokens(call.order)
    output = block(x[None])[0]
    output.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    want = {"output": output, "x": x.grad}
    want |= {name: torch.cat([theirs[other].grad for other in names[name]]) for name, _ in made.named_parameters()}
    for name, values in want.items():
        assert relative_error(got[name], values) < TRANSFORMERS, name


def plain(made: MoE, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Every expert on every token, weighed by a dense matrix."""
    dense = x.new_zeros(len(x), made.spec.number + 1).scatter_add(1, routing.experts.long(), routing.weights)
    gate, up = torch.einsum("td,efd->tef", x, made.experts.gate_up.weight).chunk(2, dim=-1)
    y = torch.einsum("tef,edf->ted", nn.functional.silu(gate) * up, made.experts.down.weight)
    return torch.einsum("ted,te->td", y, dense[:, :-1])


def assert_plain(made: MoE, call: Call) -> None:
    x = moe.tokens(call.order)
    got = moe.gradients(made, x, call)
    made.zero_grad()
    x.grad = None
    output = plain(made, x, made.router(x, call.order, of_rank(call.order)))
    output.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    want = {"output": output, "x": x.grad, **{name: values.grad for name, values in made.named_parameters()}}
    for name, values in want.items():
        assert got[name].isfinite().all(), name
        torch.testing.assert_close(got[name], values, rtol=3e-5, atol=3e-6, msg=name)


@pytest.mark.parametrize(
    ("counts", "pads"), [((40, 23), 0), ((40, 23), 6), ((1,), 0), ((1, 0), 3), ((0, 17), 5), ((30, 0), 2), ((0, 0), 4)]
)
def test_any_make_up(counts: tuple[int, ...], pads: int) -> None:
    vocabulary = moe.models.ONE if len(counts) == 1 else moe.models.TWO
    made = moe.make(ExpertSpec(number=5, width=12, top_k=2), vocabulary=vocabulary)
    assert_plain(made, moe.call(*counts, pads=pads))


def test_an_expert_without_tokens_and_one_with_all() -> None:
    made = moe.make(ExpertSpec(number=5, width=12, top_k=2, balance=0.0))
    call = moe.call(30, 20)
    with torch.no_grad():
        made.router.weight[1] = 0.0
        made.router.weight[3] = 0.0
        made.router.weight[3, 0], made.router.weight[1, 0] = 50.0, -50.0
    x = moe.tokens(call.order)
    x.data[:, 0] = 1.0
    routing = made.router(x, call.order, of_rank(call.order))
    assert (routing.experts == 3).any(dim=1).all() and not (routing.experts == 1).any()
    got = moe.gradients(made, x, call)
    assert torch.equal(made.take_statistics().slots[:, [1, 3]], torch.tensor([[0, 30], [0, 20]]))
    torch.testing.assert_close(got["output"], plain(made, x, routing), rtol=3e-5, atol=3e-6)
    for name in ("experts.gate_up.weight", "experts.down.weight"):
        assert not got[name][1].any() and got[name][3].any(), name


def test_a_huge_factor_drops_nothing() -> None:
    spec = ExpertSpec(number=4, width=12, top_k=2, capacity=(1e30, 1e308))
    made = moe.make(spec)
    call = moe.call(41, 20, pads=3)
    whole = of_rank(call.order)
    routing = made.router(moe.tokens(call.order), call.order, whole)
    _, experts, dropped = capacity.drop(routing, spec, whole, whole, made.expert_order)
    assert torch.equal(experts, routing.experts) and dropped.tolist() == [0, 0]


def test_modalities_have_their_own_room() -> None:
    spec = ExpertSpec(number=4, width=12, top_k=2, capacity=(0.5, 1.0))
    made = moe.make(spec)
    call = moe.call(41, 20, pads=3)
    x = moe.tokens(call.order)
    routing = made.router(x, call.order, of_rank(call.order))
    whole = of_rank(call.order)
    weights, experts, dropped = capacity.drop(routing, spec, whole, whole, made.expert_order)
    for number, (those, tokens, room) in enumerate(zip(whole.spans, (41, 20), (11, 10), strict=True)):
        assert capacity.room(spec, number, tokens) == room
        lost = 0
        for expert in range(4):
            slots = [(w, i) for i, w in enumerate(routing.weights[those].flatten().tolist())
                     if routing.experts[those].flatten()[i] == expert]  # fmt: skip
            stay = {i for _, i in sorted(slots, key=lambda slot: (-slot[0], slot[1]))[:room]}
            lost += len(slots) - len(stay)
            got = {i for i, e in enumerate(experts[those].flatten().tolist()) if e == expert}
            assert got == stay
        assert dropped[number] == lost > 0
    kept = experts < 4
    assert torch.equal(weights[kept], routing.weights[kept]) and not weights[~kept].any()
    got = made(x, call)
    torch.testing.assert_close(
        got, plain(made, x, replace(routing, weights=weights, experts=experts)), rtol=3e-5, atol=3e-6
    )
    assert torch.equal(made.take_statistics().dropped, dropped)


def test_statistics_count_what_has_gradients() -> None:
    made = moe.make(ExpertSpec(number=4, width=12, top_k=2, z_loss=1e-3))
    call = moe.call(30, 12, pads=5)
    x = moe.tokens(call.order)
    with torch.no_grad():
        made(x, call)
    made.eval()
    made(x, call)
    assert made.take_statistics() is None
    made.train()
    made(x, call)
    other = moe.call(3, 44)
    made(x, other)
    seen = made.take_statistics()
    assert made.take_statistics() is None
    first, second = made.router(x, call.order, of_rank(call.order)), made.router(x, other.order, of_rank(other.order))
    assert seen.tokens == (33, 56) and seen.slots.sum(1).tolist() == [66, 112] and seen.dropped.tolist() == [0, 0]
    parts = [(first, slice(0, 30)), (second, slice(0, 3)), (first, slice(35, 47)), (second, slice(3, 47))]
    for m in (0, 1):
        own = parts[2 * m : 2 * m + 2]
        chosen = torch.cat([routing.experts[those].flatten() for routing, those in own])
        assert torch.equal(seen.slots[m], torch.bincount(chosen, minlength=4))
        p = torch.cat([routing.logits[those] for routing, those in own]).softmax(1)
        torch.testing.assert_close(seen.entropy[m], -(p * p.log()).sum())


FULL = ExpertSpec(
    number=8, width=12, top_k=2, score="sigmoid", scale=1.5, bias_rate=1e-3, capacity=(1.0, 1.2), balance=0.01,
    z_loss=1e-3, shared_width=16, shared_gate=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        replace(FULL, balance_over="document", groups=4, group_topk=2),
        replace(FULL, sets=((0, 1, 2, 3), (3, 4, 5, 6, 7)), balance_counts="first"),
        ExpertSpec(number=8, width=12, top_k=2, noise=True, balance=0.01),
    ],
    ids=["all", "documents, groups", "sets, first", "noise"],
)
def test_no_host_sync(spec: ExpertSpec) -> None:
    made = moe.make(spec)
    call = moe.call(40, 20, pads=4, documents=3)
    x = moe.tokens(call.order)
    dy = torch.randn(x.shape)
    with forbid_syncs():
        made(x, call).backward(dy)
        made(x, call).backward(dy)
    assert made.take_statistics().tokens == (80, 40)
    assert all(values.grad.isfinite().all() for values in made.parameters())


def test_evaluation_repeats_bit_for_bit() -> None:
    made = moe.make(replace(FULL, capacity=()))
    made.eval()
    call = moe.call(40, 20, pads=4)
    x = moe.tokens(call.order)
    assert torch.equal(made(x, call), made(x, call))
