"""Cross-entropy over a vocabulary that is cut over ranks, and what it does not compute."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_dist
from tests.kernels.cases import linear_cross_entropy as definition
from tests.kernels.cases import noise
from tests.tolerances import assert_as_good_as
from unimega.kernels import compiled as helper
from unimega.kernels import linear_cross_entropy_cpu as cpu
from unimega.kernels import registry

CPU = torch.device("cpu")
ROWS, WIDTH = 11, 6
needs_extension = pytest.mark.skipif(helper.softmax is None, reason="unimega._softmax is not compiled")
IMPLEMENTATIONS = ["reference", "cpu", pytest.param("cpp", marks=needs_extension)]


def inputs(vocabulary: int, local: int) -> tuple[torch.Tensor, ...]:
    """x, the weight with its padding, labels (the first and last id among them), weights of tokens."""
    labels = torch.arange(ROWS, dtype=torch.int32) * 3 % vocabulary
    labels[0], labels[1] = vocabulary - 1, 0
    return noise(ROWS, WIDTH).float(), noise(2 * local, WIDTH).float(), labels, noise(ROWS, seed=1).abs().float()


def on_a_rank(vocabulary: int, local: int) -> tuple[torch.Tensor, ...]:
    op = registry.resolve("linear_cross_entropy", device=CPU)
    x, weight, labels, token_weights = inputs(vocabulary, local)
    start = dist.get_rank() * local
    mine = weight[start : start + local].clone().requires_grad_()
    x.requires_grad_()
    results = []
    for rows in (ROWS, 0):
        loss, ce = op(
            x[:rows], mine, labels[:rows], token_weights[:rows],
            group=dist.group.WORLD, vocab_start=start, vocab_rows=vocabulary, chunk=4,
        )  # fmt: skip
        dx, dw = torch.autograd.grad(loss * 0.5, (x, mine))
        results += [loss.detach(), ce, dx, dw]
    return tuple(results)


@pytest.mark.parametrize(
    ("vocabulary", "local"), [(13, 7), (8, 4), (5, 5)], ids=["padding", "even", "a rank of padding"]
)
def test_two_ranks_equal_one(vocabulary: int, local: int) -> None:
    first, second = run_dist(on_a_rank, world=2, args=(vocabulary, local))
    exact, low = (whole(vocabulary, local, dtype) for dtype in (torch.float64, torch.float32))
    for mine in (first, second):
        assert_as_good_as(mine[0], low[0], exact[0], what="loss")
        assert_as_good_as(mine[1], low[1], exact[1], what="ce")
        assert mine[4] == 0
        assert mine[5].shape == (0,)
        assert not mine[6].any()
        assert not mine[7].any()
    assert_as_good_as(first[2] + second[2], low[2], exact[2], what="dx, summed over ranks")
    assert_as_good_as(torch.cat((first[3], second[3])), low[3], exact[3], what="dweight")
    assert not torch.cat((first[3], second[3]))[vocabulary:].any()


def whole(vocabulary: int, local: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, weight, labels, token_weights = (t.to(dtype) if t.is_floating_point() else t for t in inputs(vocabulary, local))
    loss, ce = definition(
        x.requires_grad_(), weight.requires_grad_(), labels, token_weights,
        group=None, vocab_start=0, vocab_rows=vocabulary,
    )  # fmt: skip
    return loss, ce, *torch.autograd.grad(loss * 0.5, (x, weight))


class Products(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize(("x_needs", "weight_needs", "products"), [(0, 0, 1), (1, 0, 2), (0, 1, 2), (1, 1, 3)])
@pytest.mark.parametrize("gradients", [True, False], ids=["train", "no_grad"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_computes_only_the_gradients_that_are_needed(
    impl: str, x_needs: int, weight_needs: int, products: int, gradients: bool
) -> None:
    x, weight, labels, token_weights = inputs(13, 7)
    x.requires_grad_(bool(x_needs))
    weight.requires_grad_(bool(weight_needs))
    op = registry.resolve("linear_cross_entropy", device=CPU, impl=impl)
    with Products() as seen, torch.set_grad_enabled(gradients):
        loss, ce = op(x, weight, labels, token_weights, group=None, vocab_start=0, vocab_rows=13, chunk=4)
    assert seen.count == 3 * (products if gradients else 1)  # three chunks
    assert loss.requires_grad == (gradients and products > 1)
    assert not ce.requires_grad


def test_logits_are_never_whole() -> None:
    x, weight = noise(64, 4).float().requires_grad_(), noise(100, 4).float().requires_grad_()
    labels, token_weights = torch.zeros(64, dtype=torch.int32), torch.ones(64)
    op = registry.resolve("linear_cross_entropy", device=CPU, impl="reference")
    with Products() as seen:
        loss, _ = op(x, weight, labels, token_weights, group=None, vocab_start=0, vocab_rows=100, chunk=8)
        loss.backward()
    assert seen.largest == 800


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(impl: str) -> None:
    x, weight, labels, token_weights = inputs(13, 7)
    x, weight = (x * 1e3).requires_grad_(), weight.requires_grad_()
    op = registry.resolve("linear_cross_entropy", device=CPU, impl=impl)
    loss, _ = op(x, weight, labels, token_weights, group=None, vocab_start=0, vocab_rows=13)
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_no_number_is_one(impl: str, dtype: torch.dtype) -> None:
    x, weight, labels, token_weights = inputs(13, 7)
    x[4, 0] = torch.nan
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype)
    op = registry.resolve("linear_cross_entropy", device=CPU, impl=impl)
    loss, ce = op(x, weight, labels, token_weights, group=None, vocab_start=0, vocab_rows=13)
    (dx,) = torch.autograd.grad(loss, x)
    assert ce.isnan().nonzero().flatten().tolist() == [4]
    assert dx.isnan().any(1).nonzero().flatten().tolist() == [4]


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_passes_equal_those_in_torch(dtype: torch.dtype, threads: int) -> None:
    """Far more logits than a thread is worth, columns that no vector and no thread divides, labels at both ends."""
    rows, columns, before = 1500, 203, torch.get_num_threads()
    logits = (20 * noise(rows, columns)).to(dtype)
    logits[:, 5] = -torch.inf
    logits[7, 5] = 3.0
    labels = torch.arange(columns) * 37 % (2 * rows) - rows // 2
    labels[:4] = torch.tensor((-1, 0, rows - 1, rows))
    lse, slope, hit = logits.float().logsumexp(0), noise(columns).abs().float(), noise(columns, seed=1).float()
    top, total = torch.full((columns,), torch.finfo(torch.float32).min), torch.zeros(columns)
    torch.set_num_threads(threads)
    try:
        for part in logits.split((400, 700, 400)):
            cpu.compiled_statistics(part, top, total)
        guarded, wide = (torch.full((rows + 2, columns), 7.0, dtype=t) for t in (dtype, torch.float32))
        cpu.compiled_gradient(logits, guarded[1:-1], labels, lse, slope, hit)
        cpu.compiled_gradient(logits.float(), wide[1:-1], labels, lse, slope, hit)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(top, logits.float().amax(0))
    torch.testing.assert_close(total.double(), (logits.double() - top).exp().sum(0), rtol=6e-7, atol=0)
    assert torch.equal(guarded, wide.to(dtype)), "bf16 is fp32, rounded to the nearest"
    assert bool((guarded[[0, -1]] == 7).all())
    expected = torch.empty_like(wide[1:-1])
    cpu.gradient(logits.float(), expected, labels, lse, slope, hit)
    torch.testing.assert_close(wide[1:-1], expected, rtol=1e-6, atol=1e-30)
