"""What split_linear promises beyond its numbers: who gets a gradient, and which rows are written."""

import torch

from tests.kernels.cases import noise
from unimega import backend
from unimega.kernels import registry
from unimega.kernels.split_linear import SplitLinear

DEVICE = backend.current().device
OPS: SplitLinear = registry.resolve("split_linear", device=DEVICE, impl="reference")
SPANS = ((1, 4), (4, 4), (4, 6))


def test_frozen_weights_cost_nothing_and_absent_ones_get_zeros() -> None:
    dy, x = noise(7, 5).to(DEVICE), noise(7, 3).to(DEVICE)
    first, absent, frozen = OPS.grad_weight(dy, x, SPANS, (True, True, False))
    assert first is not None
    assert absent is not None
    torch.testing.assert_close(first, dy[1:4].T @ x[1:4])
    assert torch.equal(absent, torch.zeros_like(first))
    assert frozen is None
    first, absent, frozen = OPS.grad_bias(dy, SPANS, (True, True, False))
    assert first is not None
    torch.testing.assert_close(first, dy[1:4].sum(0))
    assert absent is not None
    assert not absent.any()
    assert frozen is None


def test_rows_of_no_span_keep_what_they_were() -> None:
    x, weights = noise(7, 3).to(DEVICE), [noise(5, 3, seed=m).to(DEVICE) for m in range(3)]
    out = torch.full((7, 5), 8.0, dtype=torch.float64, device=DEVICE)
    result = OPS.forward(x, SPANS, weights, (None, None, None), out)
    assert result is out
    assert (out[[0, 6]] == 8).all()
    torch.testing.assert_close(out[1:4], x[1:4] @ weights[0].T)
    dx = torch.full((7, 3), 8.0, dtype=torch.float64, device=DEVICE)
    OPS.grad_input(out, SPANS, weights, dx, accumulate=True)
    assert (dx[[0, 6]] == 8).all()


def test_parameters_that_require_gradients_are_taken_as_they_are() -> None:
    x, weight = noise(7, 3).to(DEVICE), noise(5, 3).to(DEVICE).requires_grad_()
    assert not OPS.forward(x, ((0, 7),), (weight,), (None,)).requires_grad
