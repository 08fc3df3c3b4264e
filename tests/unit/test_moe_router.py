"""The router: choices against other people's routers, expert sets, pads, noise, bias."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tests import moe
from tests.models import THREE
from unimega.config.experts import ExpertSpec
from unimega.moe.router import Router, balanced_bias, noisy_top2
from unimega.moe.rows import of_rank


def router(experts: ExpertSpec, **rest: object) -> Router:
    return moe.make(experts, **rest).router


def dense(weights: torch.Tensor, experts: torch.Tensor, number: int) -> torch.Tensor:
    """[t, E + 1] with the weights in their experts' columns: the order of choices no longer shows."""
    return torch.zeros(len(weights), number + 1).scatter_add(1, experts.long(), weights)


@pytest.mark.parametrize("normalize", [True, False])
def test_deepseek_v3(normalize: bool) -> None:
    spec = ExpertSpec(
        number=16, width=8, top_k=4, score="sigmoid", normalize=normalize, scale=2.5, groups=4, group_topk=2,
        bias_rate=1e-3,
    )  # fmt: skip
    ours = router(spec)
    assert ours.bias is not None
    ours.bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(3)) * 0.2)
    config = DeepseekV3Config(
        hidden_size=moe.WIDTH, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=normalize,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(ours.bias)
    call = moe.call(60)
    x = moe.tokens(call.order)
    got = ours(x, call.order, of_rank(call.order))
    _, weights, experts = theirs(x)
    torch.testing.assert_close(dense(got.weights, got.experts, 16), dense(weights, experts, 16), rtol=1e-6, atol=1e-7)
    unbiased = router(ExpertSpec(number=16, width=8, top_k=4, score="sigmoid"))(x, call.order, of_rank(call.order))
    assert (unbiased.experts.sort().values != got.experts.sort().values).any()  # groups and bias did something


def test_modalities_use_their_experts_alone() -> None:
    sets = ((0, 1, 2, 5), (2, 3, 5), (5, 4))
    ours = router(ExpertSpec(number=6, width=8, top_k=2, sets=sets), vocabulary=THREE)
    call = moe.call(30, 20, 10)
    x = moe.tokens(call.order)
    got = ours(x, call.order, of_rank(call.order))
    for rows, allowed in zip(got.experts.split(call.order.counts), sets, strict=True):
        assert set(rows.flatten().tolist()) == set(allowed)
    whole = torch.nn.functional.linear(x, ours.weight)
    for rows, logits, allowed in zip(
        got.weights.split(call.order.counts), whole.split(call.order.counts), sets, strict=True
    ):
        best = logits[:, list(allowed)].softmax(1).topk(2).values
        torch.testing.assert_close(rows, best / best.sum(1, keepdim=True))
    got.weights[:, 0].sum().backward()
    assert ours.weight.grad is not None and ours.weight.grad.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("counts", [(9, 7), (9, 0), (0, 7), (0, 0)])
def test_pads_have_no_expert(counts: tuple[int, ...]) -> None:
    ours = router(ExpertSpec(number=4, width=8, top_k=2))
    call = moe.call(*counts, pads=5)
    pads = slice(counts[0], counts[0] + 5)
    x = moe.tokens(call.order)
    got = ours(x, call.order, of_rank(call.order))
    assert (got.experts[pads] == 4).all() and (got.weights[pads] == 0).all()
    others = torch.cat((got.experts[: pads.start], got.experts[pads.stop :]))
    assert len(others) == sum(counts) and (others < 4).all()
    got.weights.square().sum().backward()
    assert x.grad is not None and (x.grad[pads] == 0).all()


def test_noise_moves_the_second_choice_in_training_only() -> None:
    ours = router(ExpertSpec(number=8, width=8, top_k=2, noise=True))
    plain = router(ExpertSpec(number=8, width=8, top_k=2))
    call = moe.call(200)
    x = moe.tokens(call.order)
    first, second = ours(x, call.order, of_rank(call.order)), ours(x, call.order, of_rank(call.order))
    assert torch.equal(first.experts[:, 0], second.experts[:, 0])
    assert not torch.equal(first.experts[:, 1], second.experts[:, 1])
    assert (first.experts[:, 0] != first.experts[:, 1]).all()
    ours.eval()
    assert torch.equal(
        ours(x, call.order, of_rank(call.order)).experts, plain(x, call.order, of_rank(call.order)).experts
    )
    assert torch.equal(
        ours(x, call.order, of_rank(call.order)).weights, ours(x, call.order, of_rank(call.order)).weights
    )


def test_the_second_of_noisy_choices_follows_the_softmax_of_the_others() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 3.0]]).expand(20000, 4)
    gumbel = -torch.empty(20000, 4).exponential_(generator=torch.Generator().manual_seed(1)).log()
    weights, experts = noisy_top2(logits, gumbel, moe.make(ExpertSpec(number=4, width=8, top_k=2)).router.op)
    assert (experts[:, 0] == 3).all()
    share = torch.stack([(experts[:, 1] == e).float().mean() for e in range(4)])
    want = torch.cat((logits[0, :3].softmax(0), torch.zeros(1)))
    assert (share - want).abs().max() < 0.015  # four standard deviations of 20000 draws
    clean = logits.softmax(1).gather(1, experts.long())
    torch.testing.assert_close(weights, clean / clean.sum(1, keepdim=True))


def test_bias_moves_towards_even_loads() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    got = balanced_bias(bias, torch.tensor([2**24 + 1, 2**24, 2**24 - 1, 2**24]), 0.25)
    assert got.tolist() == [0.25, 0.0, -0.25, 0.0]


def test_bias_balances_a_skewed_router() -> None:
    ours = router(ExpertSpec(number=8, width=8, top_k=2, score="sigmoid", bias_rate=0.02))
    call = moe.call(500)
    x = moe.tokens(call.order).detach() + 0.5
    loads = []
    for _ in range(60):
        slots = torch.bincount(ours(x, call.order, of_rank(call.order)).experts.flatten(), minlength=8)
        ours.bias = balanced_bias(ours.bias, slots, 0.02)
        loads.append(slots.max().item() / 125)
    assert loads[0] > 1.5 and max(loads[-10:]) < 1.25


def test_bias_stays_fp32() -> None:
    ours = router(ExpertSpec(number=4, width=8, top_k=2, bias_rate=1e-3))
    ours.bias += 1.0001
    ours.to(dtype=torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    assert ours.bias.dtype == torch.float32 and (ours.bias == torch.tensor(1.0001)).all()
    call = moe.call(5)
    assert ours(moe.tokens(call.order).bfloat16(), call.order, of_rank(call.order)).weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 5}, "top_k=5"),
        ({"groups": 3}, "groups=3"),
        ({"groups": 2, "top_k": 3}, "top_k=3"),
        ({"sets": ((0, 1), (2,))}, "fewer than top_k=2"),
        ({"sets": ((0, 1), (2, 4))}, "from 0 to 3"),
        ({"capacity": (1.0, 0.0)}, "not positive"),
        ({"noise": True, "score": "sigmoid"}, "noise is for two experts"),
        ({"shared_gate": True}, "shared_width"),
    ],
)
def test_impossible_experts(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExpertSpec(**{"number": 4, "width": 8, "top_k": 2, **changes})


@pytest.mark.parametrize("changes", [{"sets": ((0, 1),)}, {"capacity": (1.0,)}])
def test_lists_have_an_entry_for_each_modality(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="1 entries for 2 modalities"):
        moe.make(ExpertSpec(number=4, width=8, top_k=2, **changes))
