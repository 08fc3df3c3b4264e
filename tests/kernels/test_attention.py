"""What attention promises beyond its numbers: runs do not touch each other, and nothing of T x T is made."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cases import noise, on_device, shuffled
from tests.tolerances import NEIGHBOURS, relative_error
from unimega import backend
from unimega.batch import Intervals
from unimega.kernels import attention as attention_module
from unimega.kernels import registry
from unimega.kernels.attention import _batches, _plan

DEVICE = backend.current().device
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def attend(
    x: torch.Tensor, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any
) -> list[torch.Tensor]:
    """Output and gradients of q, k, v, all [T, ...] in attention order; x: [T, (h + 2k) N]."""
    attention = registry.resolve("attention", device=DEVICE, impl="reference")
    intervals = on_device(Intervals.of_runs(lengths, **options), DEVICE)
    sizes = (HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH)
    parts = x.to(DEVICE, dtype).split(sizes, dim=1)
    leaves = [t.reshape(len(x), -1, WIDTH).detach().requires_grad_() for t in parts]
    out = attention(*leaves, intervals, scale=0.3, rows=None, inverse=None)
    return [out, *torch.autograd.grad(out, leaves, out.detach() + 1)]


@pytest.mark.parametrize("options", [{}, {"both_ways": ((2, 4), (27, 29))}], ids=["causal", "both ways"])
def test_contents_of_other_runs_do_not_matter_at_all(options: dict[str, Any]) -> None:
    lengths, own = (5, 21, 3, 19, 4), slice(26, 29)
    x, y = noise(52, 64), noise(52, 64, seed=1)
    y[own] = x[own]
    for mine, other in zip(attend(x, lengths, **options), attend(y, lengths, **options), strict=True):
        assert torch.equal(mine[own], other[own])
        assert not torch.equal(mine, other)


def test_a_run_of_nans_stays_alone() -> None:
    x = noise(29, 64)
    x[5:26] = torch.nan
    for result in attend(x, (5, 21, 3)):
        assert result[:5].isfinite().all()
        assert result[26:].isfinite().all()


def test_sizes_of_other_runs_hardly_matter() -> None:
    x = noise(60, 64)
    alone = attend(x[20:37], (17,))
    for lengths in ((20, 17, 23), (2, 18, 17, 1, 22), (20, 17)):
        among = attend(x[: sum(lengths)], lengths)
        for mine, want in zip(among, alone, strict=True):
            assert relative_error(mine[20:37], want) <= NEIGHBOURS


def test_nothing_of_t_by_t_is_made() -> None:
    lengths = (37, 41) * 8
    total = sum(lengths)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                assert not isinstance(t, torch.Tensor) or t.numel() < total * total, func
            return out

    with Watch():
        attend(noise(total, 64), lengths)


@pytest.mark.parametrize("options", [{}, {"both_ways": ((2, 4), (27, 29))}], ids=["causal", "both ways"])
def test_keys_of_every_head_are_those_of_its_group(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (5, 21, 3, 19, 4)
    grouped = attend(noise(52, 64), lengths, **options)
    monkeypatch.setattr(attention_module, "_takes_groups", lambda query, mask: False)
    for mine, want in zip(attend(noise(52, 64), lengths, **options), grouped, strict=True):
        assert relative_error(mine, want) <= NEIGHBOURS


def test_groups_go_to_flash_attention_alone() -> None:
    on_gpu = {dtype: torch.empty(1, 4, 3, 8, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bfloat16)}
    mask = torch.ones(3, 3, dtype=torch.bool)
    assert attention_module._takes_groups(on_gpu[torch.bfloat16], None)
    assert not attention_module._takes_groups(on_gpu[torch.bfloat16], mask)
    assert not attention_module._takes_groups(on_gpu[torch.float32], None)
    assert attention_module._takes_groups(torch.ones(1, 4, 3, 8), mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"both_ways": ((2, 4), (27, 29))}], ids=["causal", "both ways"])
def test_a_gpu_keeps_no_scores(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The kernel that makes them is forbidden: torch raises where it would need it."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        attend(noise(52, 64), (5, 21, 3, 19, 4), dtype=dtype, **options)


def test_backward_through_a_gather_that_is_not_padded() -> None:
    rows, inverse = shuffled(9, DEVICE)
    attention = registry.resolve("attention", device=DEVICE, impl="reference")
    intervals = on_device(Intervals.of_runs((9,)), DEVICE)
    q = noise(9, HEADS, WIDTH).float().to(DEVICE).requires_grad_()
    plain = attention(q, q, q, intervals, scale=1.0, rows=None, inverse=None)
    moved = attention(q, q, q, intervals, scale=1.0, rows=rows, inverse=inverse)
    assert torch.equal(moved, plain[inverse.long()])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((7,), ((1, 7),)),
        ((7, 7), ((2, 7),)),
        ((3, 0, 5, 4), ((3, 5),)),
        ((2, 600, 3), ((1, 600), (2, 3))),
        ((600, 2, 300), ((1, 600), (1, 2), (1, 300))),  # nothing to gain: runs stay where they are
    ],
)
def test_runs_are_batched(lengths: tuple[int, ...], expected: tuple[tuple[int, int], ...]) -> None:
    plan = _plan(lengths, True, torch.device("cpu"))
    assert plan.batches == expected
    if plan.places is not None:
        assert plan.gather is not None
        assert torch.equal(plan.gather[plan.places], torch.arange(sum(lengths)))


def test_every_run_is_in_one_batch() -> None:
    sizes = torch.randint(1, 200, (50,), generator=torch.Generator().manual_seed(0)).numpy()
    batches = _batches(sizes)
    assert sum(runs for runs, _ in batches) == len(sizes)
    assert [longest for _, longest in batches] == sorted((longest for _, longest in batches), reverse=True)
    assert batches[0][1] == sizes.max()
