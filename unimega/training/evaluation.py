"""Cross-entropy on held-out corpora."""

from collections.abc import Mapping
from typing import Any

from unimega import backend
from unimega.data.loader import Loader, Place
from unimega.data.plan import DataPlan
from unimega.training.engine import Engine


def evaluate(engine: Engine, plans: Mapping[str, DataPlan], place: Place) -> dict[str, Any]:
    """``evaluation/CORPUS/loss_MODALITY``: the mean over every document of a corpus. Collective over the world."""
    names = engine.spec.modalities
    record: dict[str, Any] = {}
    for corpus, plan in plans.items():
        counts, totals = [0] * len(names), [0.0] * len(names)
        loader = Loader(plan, place, [1.0] * len(names), last_step=plan.num_steps(place.global_batch_packs))
        try:
            for batch in loader:
                _, *sums = engine.evaluate([backend.to_device(b) for b in batch.microbatches])
                totals = [a + b for a, b in zip(totals, sums, strict=True)]
                counts = [a + b for a, b in zip(counts, batch.targets, strict=True)]
        finally:
            loader.close()
        for name, total, count in zip(names, totals, counts, strict=True):
            if count:
                record[f"evaluation/{corpus}/loss_{name}"] = total / count
    return record
