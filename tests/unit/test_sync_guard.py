"""The guard catches what it must, wherever it is planted, and lets through what does not wait."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.sync_guard import METHODS, MOVES, HostSync, forbid_syncs
from unimega import backend
from unimega.backend import redirection

ONE = torch.ones(1, dtype=torch.long)
ELSEWHERE = torch.ones(2, device="meta")
"""As a tensor of a device: a copy of it to the host is seen before it fails."""

SYNCS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "np.asarray": lambda x: np.asarray(x.detach()),
    "to cpu": lambda x: x.to("cpu"),
    "to device cpu": lambda x: x.to(device=torch.device("cpu")),
    "to cpu and dtype": lambda x: x.to("cpu", torch.float64),
    "type": lambda x: x.type("torch.DoubleTensor"),
    "type of a class": lambda x: x.type(torch.DoubleTensor),
    "to like": lambda x: ELSEWHERE.to(x),
    "copy": lambda x: torch.empty(2).copy_(ELSEWHERE),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 1).any()),
    "if": lambda x: 1 if (x > 1).any() else 0,
    "range": lambda x: range(x.sum().long()),
    "format": lambda x: f"{x.sum()}",
    "number as an index": lambda x: x[x.sum().long() * 0],
    "mask as an index": lambda x: x[x > 1],
    "assignment through a mask": lambda x: x.clone().__setitem__(x > 1, x[:1]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "unique of any": lambda x: torch._unique(x),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: torch.bincount(ONE),
    "histc": lambda x: x.histc(3),
    "isin": lambda x: torch.isin(x, x),
    "to_sparse": lambda x: x.to_sparse(),
    "inv": lambda x: torch.linalg.inv(torch.eye(2)),
    "repeat_interleave": lambda x: x[:1].repeat_interleave(ONE),
}
"""By name: what makes the host wait for a tensor of any shape with a first element."""


class PlantInBackward(torch.autograd.Function):
    """The identity, with something that is called on the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, planted: Callable[[torch.Tensor], object]) -> torch.Tensor:
        ctx.planted = planted
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.planted(grads[0])
        return grads[0], None


def in_forward(x: torch.Tensor, planted: Callable[[torch.Tensor], object]) -> torch.Tensor:
    """The identity. Where a forward will be recomputed, only the second one calls ``planted``."""
    if torch.is_grad_enabled():
        planted(x)
    return x * 1


RECOMPUTE: dict[str, Callable[..., torch.Tensor]] = {
    "kept": lambda function, *args: function(*args),
    "recomputed": lambda function, *args: checkpoint(function, *args, use_reentrant=True),
    "recomputed by hooks": lambda function, *args: checkpoint(function, *args, use_reentrant=False),
}


@pytest.mark.parametrize("start", [torch.Tensor.backward, torch.autograd.backward], ids=["method", "function"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("place", [in_forward, PlantInBackward.apply], ids=["forward", "backward"])
def test_catches(place: Callable[..., torch.Tensor], recompute: str, start: Callable[[torch.Tensor], None]) -> None:
    def step(planted: Callable[[torch.Tensor], object]) -> None:
        x = torch.arange(4.0).requires_grad_()
        start(RECOMPUTE[recompute](place, x, planted).sum())

    missed = []
    for name, sync in SYNCS.items():
        try:
            with forbid_syncs():
                step(sync)
        except HostSync as error:
            assert "makes the host wait" in str(error)
        else:
            missed.append(name)
    assert not missed
    with forbid_syncs():
        step(torch.relu)


@pytest.mark.parametrize(
    "harmless",
    [
        lambda x: x[torch.tensor([2, 0])],
        lambda x: torch.where(x > 1, x, 0),
        lambda x: x.masked_fill(x > 1, 0.0),
        lambda x: x.index_select(0, torch.tensor([1])),
        lambda x: x.repeat_interleave(2),
        lambda x: x.split((1, 3)),
        lambda x: x.to(torch.float64),
        lambda x: x.to(x),
        lambda x: x.type(torch.float64),
        lambda x: x.type(),
        lambda x: x.to(ELSEWHERE.device),
        lambda x: torch.empty(4).copy_(x),
        lambda x: torch.from_numpy(np.ones(2)).to(x.device, non_blocking=True),
    ],
)
def test_lets_through(harmless: Callable[[torch.Tensor], object]) -> None:
    with forbid_syncs():
        harmless(torch.arange(4.0))


def test_what_may_read_is_told_apart_by_its_place() -> None:
    """The copy that the all-to-all of rows waits for; what it brought cannot be read by anyone else."""
    values = torch.tensor([[3, 0], [1, 2]])
    with forbid_syncs() as allowed:
        copy = backend.current().to_host(values)
        assert not allowed
        assert copy.read() == [[3, 0], [1, 2]]
        assert allowed == ["unimega.backend.base.HostCopy.read"]
        with pytest.raises(HostSync):
            copy._values.tolist()


def test_leaves_no_trace() -> None:
    before = {name: vars(torch.Tensor).get(name) for name in METHODS + MOVES}
    with pytest.raises(HostSync), forbid_syncs(), forbid_syncs():
        torch.ones(1).tolist()
    assert {name: vars(torch.Tensor).get(name) for name in METHODS + MOVES} == before
    x = torch.ones(1)
    assert x.tolist() == [1.0] and bool(x) and x.cpu().numpy() == 1.0
    assert x.to("cpu", torch.float64).type() == "torch.DoubleTensor"


def test_calls_from_megatron_are_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU redirects by the caller's module is so under the guard, and for nobody else."""
    original = torch.Tensor.type
    monkeypatch.setattr(torch.Tensor, "type", redirection._for_megatron(original, lambda *_: "redirected"))
    of_megatron = eval("lambda x: x.type()", {"__name__": "megatron.core.anything"})
    with forbid_syncs(), forbid_syncs():
        assert of_megatron(ONE) == "redirected"
        assert ONE.type() == "torch.LongTensor"
