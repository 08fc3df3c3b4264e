"""The guard catches what it must, and lets through what does not wait."""

from collections.abc import Callable

import pytest
import torch

from tests.sync_guard import HostSync, forbid_syncs

X = torch.arange(4.0)
MASK = X > 1


@pytest.mark.parametrize(
    "sync",
    [
        lambda: X.sum().item(),
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.numpy(),
        lambda: int(X[0]),
        lambda: bool(MASK.any()),
        lambda: X[MASK],
        lambda: X.clone().__setitem__(MASK, torch.ones(2)),
        lambda: X.nonzero(),
        lambda: X.masked_select(MASK),
        lambda: X.unique(),
        lambda: torch.equal(X, X),
        lambda: X.repeat_interleave(torch.ones(4, dtype=torch.long)),
    ],
)
def test_catches(sync: Callable[[], object]) -> None:
    with pytest.raises(HostSync), forbid_syncs():
        sync()


class Reader(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


def test_catches_in_backward() -> None:
    y = Reader.apply(X.clone().requires_grad_())
    with pytest.raises(HostSync), forbid_syncs():
        y.sum().backward()


@pytest.mark.parametrize(
    "harmless",
    [
        lambda: X[torch.tensor([2, 0])],
        lambda: torch.where(MASK, X, 0),
        lambda: X.masked_fill(MASK, 0.0),
        lambda: X.index_select(0, torch.tensor([1])),
        lambda: X.repeat_interleave(2),
        lambda: X.split((1, 3)),
    ],
)
def test_lets_through(harmless: Callable[[], object]) -> None:
    with forbid_syncs():
        harmless()
