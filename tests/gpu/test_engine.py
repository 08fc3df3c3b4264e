"""On one CUDA device: the numbers of the CPU, for every preset, with no host sync in forward or backward."""

import datetime
from collections.abc import Iterator

import pytest
import torch

from tests.distributed.harness import run_dist
from tests.distributed.test_parity import KINDS, OPTIMIZER, Case, fill, run_cases
from tests.models import PRESETS, microbatch
from tests.sync_guard import forbid_syncs
from tests.tolerances import GPU_FP32, relative_error
from unimega import backend
from unimega.config.schema import ParallelConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    import torch.distributed as dist

    torch.backends.cuda.matmul.allow_tf32 = False
    backend.current().init_process_group(timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_equal_the_cpu_without_a_sync(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from unimega.parallel import initialize
    from unimega.training.engine import Engine

    monkeypatch.setattr(initialize, "initialize_weights", fill)
    expected = run_dist(run_cases, world=1, args=([Case(name)],))[0][0]
    engine = Engine(PRESETS[name], ParallelConfig(overlap=False), optimizer_config=OPTIMIZER)
    try:
        batches = [
            backend.to_device(microbatch(PRESETS[name], kind, seed, scale=1 / 90)) for seed, kind in enumerate(KINDS)
        ]
        engine.forward_backward(batches)  # the first call of a kernel may load it
        with forbid_syncs():
            engine.forward_backward(batches)
        found = engine.gather_gradients()
        assert found is not None
        for key, wanted in expected["gradients"].items():
            assert relative_error(found[key], wanted) <= GPU_FP32, key
    finally:
        engine.close()
