"""Nothing in forward or backward makes the host wait for the device: every preset, layout, make-up of a micro-batch."""

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.harness import run_dist
from tests.models import PRESETS, SKIP, microbatch
from unimega.config.schema import Lora, OptimizerConfig, ParallelConfig

LAYOUTS = {
    "one rank": (1, ParallelConfig(overlap=False), "none"),
    "selective": (1, ParallelConfig(overlap=False), "selective"),
    "tp 2 + sp, full recompute": (2, ParallelConfig(tp=2, sequence_parallel=True), "full"),
    "tp 2": (2, ParallelConfig(tp=2), "none"),
    "pp 2 interleaved": (2, ParallelConfig(pp=2, vpp=2), "none"),
}
MODELS = PRESETS | {"skip": SKIP, "lora": replace(PRESETS["share"], lora=Lora(rank=2))}
"""Without dropout: under tp megatron-core compares random states for it, which lie on the host on any device."""


def forward_backward(names: list[str], parallel: ParallelConfig, recompute: str) -> dict[str, str]:
    """On a rank: what each model did that waits, by name; the models are tried with a text-only micro-batch too."""
    from tests.sync_guard import HostSync, forbid_syncs
    from unimega import backend
    from unimega.training.engine import Engine

    found = {}
    for name in names:
        engine = Engine(MODELS[name], parallel, optimizer_config=OptimizerConfig(), recompute=recompute)
        tp = engine.groups.tp
        batches = [
            backend.to_device(
                microbatch(MODELS[name], kind, 1, tp_rank=tp.rank(), tp=tp.size(), sp=engine.config.sequence_parallel)
            )
            for kind in ("mixed", "text")
        ]
        try:
            with forbid_syncs():
                engine.forward_backward(batches)
        except HostSync as sync:
            found[name] = str(sync)
        engine.close()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_host_sync(layout: str) -> None:
    world, parallel, recompute = LAYOUTS[layout]
    names = [name for name in MODELS if name != "skip" or parallel.pp == 1]
    for found in run_dist(forward_backward, world=world, args=(names, parallel, recompute)):
        assert not found


def planted(recompute: str, place: str) -> list[str]:
    """On a rank: what may be planted in the first norm of an engine without being seen."""
    from tests.sync_guard import HostSync, forbid_syncs
    from tests.unit.test_sync_guard import SYNCS, PlantInBackward, in_forward
    from unimega import backend
    from unimega.layers.norm import Norm
    from unimega.training.engine import Engine

    plant = {"forward": in_forward, "backward": PlantInBackward.apply}[place]
    missed = []
    for name, sync in SYNCS.items():
        parallel = ParallelConfig(overlap=False)
        engine = Engine(PRESETS["unix"], parallel, optimizer_config=OptimizerConfig(), recompute=recompute)
        batch = backend.to_device(microbatch(PRESETS["unix"], "mixed", 1))
        norm: Any = next(module for module in engine.stages[0].modules() if isinstance(module, Norm))
        norm.forward = lambda x, counts, of=norm.forward, sync=sync: of(plant(x, sync), counts)
        try:
            with forbid_syncs():
                engine.forward_backward([batch])
            missed.append(name)
        except HostSync:
            pass
        finally:
            engine.close()
    return missed


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_the_guard_sees_what_is_planted(recompute: str, place: str) -> None:
    """A forward that is recomputed waits the second time only."""
    assert run_dist(planted, world=1, args=(recompute, place)) == [[]]
