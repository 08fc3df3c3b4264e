"""Every implementation of every op against the definition: outputs, gradients, no sync, frozen inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.canaries import guarded_buffers
from tests.kernels.cases import CASES, DEFINITIONS, Case
from tests.sync_guard import forbid_syncs
from tests.tolerances import assert_as_good_as
from unimega import backend
from unimega.kernels import registry

DEVICE = backend.current().device
DTYPES = (torch.float32, torch.bfloat16)


EVERY = {
    f"{op}-{impl.name}-{case.name}": (op, impl, case)
    for op in registry.ops()
    for impl in registry.implementations(op)
    for case in CASES.get(op, ())
}


def every_case(wanted: Callable[[str], bool] = lambda name: True) -> list[Any]:
    """Parameters (op, impl, case), those that cannot run here skipped with their reason."""
    params = []
    for name, (op, impl, case) in EVERY.items():
        reason = registry.why_not(impl, DEVICE)
        marks = pytest.mark.skip(reason=f"{impl.name}: {reason}") if reason else ()
        if wanted(name):
            params.append(pytest.param(op, impl.name, case, id=name, marks=marks))
    return params


def spaced(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second of a buffer of NaNs."""
    buffer = t.new_full((*t.shape, 2), torch.nan)
    buffer[..., 0] = t
    return buffer[..., 0]


def run(
    op: Any, case: Case, dtype: torch.dtype, *, exact: bool = False, wanted: int | None = None
) -> list[torch.Tensor]:
    """Outputs, then gradients of all leaves or of one; ``exact``: in fp64, with the numbers rounded to ``dtype``."""

    def prepare(t: torch.Tensor) -> torch.Tensor:
        t = t.to(DEVICE).to(dtype)
        t = t.double() if exact else t
        return spaced(t) if case.strided else t.clone()

    leaves = [prepare(t).requires_grad_(wanted in (None, i)) for i, t in enumerate(case.leaves)]
    outputs = case.call(op, leaves)
    differentiable = [out for out in outputs if out.requires_grad]
    if not differentiable:
        return list(outputs)
    generator = torch.Generator().manual_seed(1)
    incoming = [
        prepare(torch.randn(out.shape, generator=generator, dtype=torch.float64)).to(out.dtype)
        for out in differentiable
    ]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    return [*outputs, *torch.autograd.grad(differentiable, leaves, incoming)]  # raises if a gradient is None


def test_every_op_has_cases() -> None:
    assert set(CASES) == set(DEFINITIONS) == set(registry.ops())
    assert all(CASES.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "impl", "case"), every_case())
def test_matches_definition(op: str, impl: str, case: Case, dtype: torch.dtype) -> None:
    function = registry.resolve(op, device=DEVICE, impl=impl)
    with guarded_buffers():
        got = run(function, case, dtype)
    low, exact = run(DEFINITIONS[op], case, dtype), run(DEFINITIONS[op], case, dtype, exact=True)
    for i, trio in enumerate(zip(got, low, exact, strict=True)):
        assert got[i].dtype == low[i].dtype
        assert_as_good_as(*trio, what=f"{op}, result {i}")


@pytest.mark.parametrize(("op", "impl", "case"), every_case(lambda name: "-reference-" in name))
def test_fp64_stays_fp64(op: str, impl: str, case: Case) -> None:
    got = run(registry.resolve(op, device=DEVICE, impl=impl), case, torch.float64)
    want = run(DEFINITIONS[op], case, torch.float64)
    for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
        assert mine.dtype == torch.float64
        assert_as_good_as(mine, exact, exact, what=f"{op}, result {i}")


INTERPRETED = DEVICE.type == "cpu"
"""Triton runs in its interpreter, which reads memory as it goes."""


@pytest.mark.parametrize(("op", "impl", "case"), every_case(lambda name: not (INTERPRETED and "-triton-" in name)))
def test_never_waits_for_the_device(op: str, impl: str, case: Case) -> None:
    function = registry.resolve(op, device=DEVICE, impl=impl)
    calls = Calls()

    def guarded(*args: Any, **kwargs: Any) -> Any:
        with forbid_syncs():
            return calls.remember(function(*args, **kwargs))

    if op in ("split_linear", "adamw"):  # what is resolved is no function
        with forbid_syncs():
            case.call(function, case.leaves)
        return
    case.call(guarded, [t.to(DEVICE).float().requires_grad_() for t in case.leaves])
    ones = [torch.ones_like(out) for out in calls.outputs]
    if ones:
        with forbid_syncs():
            torch.autograd.backward(calls.outputs, ones)


class Calls:
    """Keeps what a guarded call returned."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []

    def remember(self, result: Any) -> Any:
        results = result if isinstance(result, tuple) else (result,)
        self.outputs = [out for out in results if isinstance(out, torch.Tensor) and out.requires_grad]
        return result


def _frozen(name: str) -> bool:
    return name.endswith(("empty modality", "padded vocabulary", "strided", "empty expert")) and not name.startswith(
        ("split_linear", "adamw")
    )


@pytest.mark.parametrize(("op", "impl", "case"), every_case(_frozen))
def test_frozen_inputs_change_nothing_else(op: str, impl: str, case: Case) -> None:
    function = registry.resolve(op, device=DEVICE, impl=impl)
    whole = run(function, case, torch.float32)
    for i in range(len(case.leaves)):
        alone = run(function, case, torch.float32, wanted=i)
        outputs = len(alone) - 1
        for mine, want in zip(alone, [*whole[:outputs], whole[outputs + i]], strict=True):
            assert torch.equal(mine, want)
