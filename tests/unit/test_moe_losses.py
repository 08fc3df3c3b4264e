"""Losses of the router against formulas written down again, token by token."""

import pytest
import torch

import unimega.parallel  # noqa: F401  (before megatron)
from tests import moe
from unimega.config.experts import ExpertSpec
from unimega.layers.context import Call
from unimega.moe import losses
from unimega.moe.rows import of_rank

from megatron.core.transformer.moe import moe_utils  # isort: skip


def real(call: Call) -> torch.Tensor:
    """Rows that are no pads."""
    return torch.cat([torch.arange(len(call.order.document))[those] for those in of_rank(call.order).spans])


def aux_gradient(spec: ExpertSpec, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, router weight, gradient of the router that the losses alone make)."""
    made = moe.make(spec)
    x = moe.tokens(call.order).detach()
    (made(x, call) * 0).sum().backward()
    return x, made.router.weight.detach().clone().requires_grad_(), made.router.weight.grad


def test_uni_moe_gating_and_loss() -> None:
    """DeepSpeed's top-2 gating as seeds run it, with noise off: first choices alone make the load."""
    spec = ExpertSpec(number=8, width=8, top_k=2, balance=0.01, balance_counts="first")
    call = moe.call(40, 24)
    x, weight, got = aux_gradient(spec, call)
    p = torch.softmax(x @ weight.T, dim=1)
    mask1 = torch.nn.functional.one_hot(p.argmax(1), 8)
    mask2 = torch.nn.functional.one_hot(p.masked_fill(mask1.bool(), -1).argmax(1), 8)
    loss = (p.mean(0) * mask1.float().mean(0)).mean() * 8 * 8
    (0.01 * loss).backward()
    torch.testing.assert_close(got, weight.grad, rtol=3e-5, atol=1e-8)
    made = moe.make(spec)
    routing = made.router(x, call.order, of_rank(call.order))
    w1, w2 = (p * mask1).sum(1), (p * mask2).sum(1)
    assert torch.equal(routing.experts.long(), torch.stack((mask1.argmax(1), mask2.argmax(1)), 1))
    torch.testing.assert_close(routing.weights, torch.stack((w1, w2), 1) / (w1 + w2)[:, None])
    made(x, call)
    torch.testing.assert_close(made.take_statistics().balance / 64, loss.detach())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_and_z_as_megatron_computes_them(score: str) -> None:
    spec = ExpertSpec(number=6, width=8, top_k=3, score=score, balance=0.02, z_loss=0.003)
    call = moe.call(20, 30, pads=9)
    x, weight, got = aux_gradient(spec, call)
    logits = (x @ weight.T)[real(call)]
    if score == "softmax":
        scores, chosen = logits.softmax(1), logits.topk(3).indices
    else:
        scores, chosen = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True), logits.topk(3).indices
    slots = torch.bincount(chosen.flatten(), minlength=6)
    loss = moe_utils.switch_load_balancing_loss_func(scores, slots, 50, 3, 6, 0.02)
    loss = loss + moe_utils.z_loss_func(logits, 0.003)
    loss.backward()
    torch.testing.assert_close(got, weight.grad, rtol=3e-5, atol=1e-8)


def test_each_document_by_itself() -> None:
    spec = ExpertSpec(number=6, width=8, top_k=2, score="sigmoid", balance=0.5, balance_over="document")
    call = moe.call(25, 35, pads=9, documents=3)
    x, weight, got = aux_gradient(spec, call)
    logits = x @ weight.T
    scores = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    total = torch.zeros(())
    for number in range(3):
        own = torch.nonzero(call.order.document == number).flatten()
        assert len(own) == 20
        load = torch.bincount(logits[own].topk(2).indices.flatten(), minlength=6) / 40
        total = total + len(own) * 6 * (load * scores[own].mean(0)).sum()
    (0.5 * total / 60).backward()
    torch.testing.assert_close(got, weight.grad, rtol=3e-5, atol=1e-8)


def test_micro_batches_are_divided_once() -> None:
    """Gradients of two micro-batches of 10 and 50 tokens: those of each alone, weighed by its tokens."""
    spec = ExpertSpec(number=6, width=8, top_k=2, balance=0.5, z_loss=0.1)
    small, large = moe.call(10), moe.call(50)
    whole = sum(aux_gradient(spec, moe.call(n, step_tokens=60))[2] for n in (10, 50))
    parts = [aux_gradient(spec, call)[2] * (n / 60) for call, n in ((small, 10), (large, 50))]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_a_step_of_pads_alone_has_no_loss() -> None:
    spec = ExpertSpec(number=6, width=8, top_k=2, balance=0.5, z_loss=0.1, balance_over="document")
    assert not aux_gradient(spec, moe.call(0, 0, pads=7))[2].any()


def test_even_loads_have_balance_one() -> None:
    call = moe.call(8)
    scores = torch.full((8, 4), 0.25)
    assert losses.balance_sum(scores, torch.tensor([4, 4, 4, 4]), of_rank(call.order)).item() / 8 == 1.0
    assert losses.balance_sum(scores, torch.zeros(4, dtype=torch.int64), of_rank(call.order)).item() == 0.0


def test_attached_losses_leave_values_alone() -> None:
    carrier, loss = torch.randn(3, requires_grad=True), torch.randn((), requires_grad=True)
    out = losses.attach(carrier, 7 * loss)
    assert torch.equal(out, carrier)
    (out * 2).sum().backward()
    assert carrier.grad.tolist() == [2.0, 2.0, 2.0] and loss.grad.item() == 7.0


def test_losses_of_weight_zero_add_nothing() -> None:
    call = moe.call(20)
    made = moe.make(ExpertSpec(number=6, width=8, top_k=2))
    x = moe.tokens(call.order)
    made.router.weight.data *= 1e20  # the z-loss of this is infinite
    (made(x, call) * 0).sum().backward()
    assert made.router.weight.grad.isfinite().all()
