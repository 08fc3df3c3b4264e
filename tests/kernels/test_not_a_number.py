"""Numbers that are none: no implementation hides them, or goes astray for them."""

import pytest
import torch

from tests.kernels.cases import on_device
from tests.kernels.test_kernels import DEVICE
from unimega.batch import Intervals
from unimega.kernels import registry

KINDS = (-1, 0x7FC00000, 0x3F800000, 0x7F800000, -0x800000)
"""Bits of fp32: two that are no number, 1, and both infinities."""


def every(*ops: str) -> list[object]:
    params = []
    for op in ops:
        for impl in registry.implementations(op):
            reason = registry.why_not(impl, DEVICE)
            marks = pytest.mark.skip(reason=f"{impl.name}: {reason}") if reason else ()
            params.append(pytest.param(op, impl.name, id=f"{op}-{impl.name}", marks=marks))
    return params


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("op", "impl"), every("topk_routing", "route"))
def test_different_experts_are_chosen(op: str, impl: str, groups: int, score: str) -> None:
    """A row that no slot belongs to would send later kernels astray."""
    bits = torch.tensor(KINDS, dtype=torch.int32)
    logits = bits[torch.randint(len(bits), (20, 12), generator=torch.Generator().manual_seed(2))]
    logits[: len(bits)] = bits[:, None]
    function = registry.resolve(op, device=DEVICE, impl=impl)
    for k in (1, 5, 8):
        chosen = function(
            logits.view(torch.float32).to(DEVICE), k=k, score=score, groups=groups, group_topk=min(2, groups)
        )[1]
        assert int(chosen.min()) >= 0 and int(chosen.max()) < 12
        assert bool((chosen.sort(dim=1).values.diff(dim=1) > 0).all())


@pytest.mark.parametrize(("op", "impl"), every("attention"))
def test_a_key_that_is_no_number_is_seen(op: str, impl: str) -> None:
    """By all queries that see it, and by no other run: probabilities of keys that are not seen are zeros."""
    q, k, v = (torch.randn(24, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k[9] = torch.nan
    intervals = on_device(Intervals.of_runs((8, 8, 8)), DEVICE)
    function = registry.resolve(op, device=DEVICE, impl=impl)
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # flash-attn takes 16 bits alone
    tensors = (t.to(DEVICE, dtype) for t in (q, k, v))
    out = function(*tensors, intervals, scale=0.25, rows=None, inverse=None)
    assert out.isnan().any(1).nonzero().flatten().tolist() == list(range(9, 16))
