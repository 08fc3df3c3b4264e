"""On one CUDA device: csrc/routing.cu, built here by nvcc, gives what its definition says, with no host sync."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import DEFINITIONS, Case
from tests.kernels.test_cuda_routing import EVERY, ROWS, built  # noqa: F401  (a fixture)
from tests.kernels.test_kernels import DEVICE, run
from tests.sync_guard import forbid_syncs
from tests.tolerances import assert_as_good_as
from unimega.kernels import expert_order, topk_routing
from unimega.kernels.cuda import library, routing

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def loaded(built: Path) -> Iterator[None]:  # noqa: F811
    patch = pytest.MonkeyPatch()
    patch.setattr(library, "PLACES", (built,))
    library.library.cache_clear()
    yield
    patch.undo()
    library.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case"), EVERY.values(), ids=EVERY)
def test_matches_definition(op: str, case: Case, dtype: torch.dtype) -> None:
    got = run(ROWS[op], case, dtype)
    low, exact = run(DEFINITIONS[op], case, dtype), run(DEFINITIONS[op], case, dtype, exact=True)
    for i, trio in enumerate(zip(got, low, exact, strict=True)):
        assert_as_good_as(*trio, what=f"{op}, result {i}")


@pytest.mark.parametrize(("tokens", "experts", "k"), [(16384, 128, 8), (4099, 512, 16), (1, 64, 6)])
def test_large_routes_equal_the_reference_and_repeat(tokens: int, experts: int, k: int) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    with forbid_syncs():
        weights, chosen, order = routing.route(logits, k=k)
        again = routing.route(logits, k=k)
    wanted_weights, wanted = topk_routing.reference(logits, k=k)
    wanted_order = expert_order.reference(wanted, experts)
    assert torch.equal(chosen, wanted)
    torch.testing.assert_close(weights, wanted_weights)
    for part in ("offsets", "place", "source"):
        assert torch.equal(getattr(order, part), getattr(wanted_order, part))
        assert torch.equal(getattr(order, part), getattr(again[2], part))
    assert torch.equal(weights, again[0])
