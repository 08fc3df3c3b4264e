"""Rule 1: a document's logits do not depend on its neighbours in the pack, in any layer kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.distributed.harness import run_dist
from tests.models import PRESETS, SKIP
from tests.tolerances import NEIGHBOURS_LOGITS
from unimega.batch import make_microbatch
from unimega.config.model import ModelSpec
from unimega.config.schema import ParallelConfig

MODELS = PRESETS | {"skip": SKIP}
OWN = 12
"""Tokens of the document that is watched."""


def document(model: ModelSpec, length: int, seed: int, like: np.ndarray | None = None) -> np.ndarray:
    """Random ids; with ``like`` every place keeps that document's modality."""
    rng = np.random.default_rng(seed)
    vocabulary = model.vocabulary
    modality = rng.integers(0, len(vocabulary.names), length) if like is None else vocabulary.modality_of(like)
    sizes = np.asarray(vocabulary.codes)[modality]
    return np.asarray(vocabulary.starts)[modality] + rng.integers(0, np.where(modality == 0, 5, sizes))


def pack(model: ModelSpec, documents: list[np.ndarray], pads: int):
    tokens = np.concatenate([*documents, np.zeros(pads, dtype=int)])
    number = np.concatenate([np.full(len(d), i + 1) for i, d in enumerate(documents)] + [np.zeros(pads, dtype=int)])
    return make_microbatch(
        tokens,
        modality=np.where(number > 0, model.vocabulary.modality_of(tokens), 0),
        document=number,
        labels=tokens,
        loss_weights=(number > 0).astype(float),
        modalities=len(model.modalities),
        step_tokens=np.count_nonzero(number),
        cross_document=model.cross_document,
    )


def packs(model: ModelSpec) -> dict[str, tuple[object, int]]:
    """Micro-batches that hold one document among different neighbours, and where it starts."""
    mine, before, after = document(model, OWN, 1), document(model, 20, 2), document(model, 15, 3)
    other, last = document(model, 20, 4, like=before), document(model, 15, 5, like=after)
    return {
        "reference": (pack(model, [before, mine, after], 5), 20),
        "other contents": (pack(model, [other, mine, last], 5), 20),
        "other sizes": (pack(model, [after, before[:1], mine, before[:9]], 3), 16),
        "alone": (pack(model, [mine], 0), 0),
        "alone with pads": (pack(model, [mine], 40), 0),
    }


def logits_of(names: list[str], cross_document: bool) -> list[dict[str, torch.Tensor]]:
    """On a rank: the watched document's logits among each set of neighbours, per model."""
    from tests.distributed.test_parity import fill
    from unimega import backend
    from unimega.parallel import initialize
    from unimega.training.engine import Engine

    initialize.initialize_weights = fill
    found = []
    for name in names:
        model = replace(MODELS[name], cross_document=cross_document)
        engine = Engine(model, ParallelConfig(), optimizer_config=None)
        mine = {}
        for what, (batch, start) in packs(model).items():
            (logits,) = engine.logits([backend.to_device(batch)])
            mine[what] = logits[torch.from_numpy(batch.order.inverse).long()][start : start + OWN]
        found.append(mine)
        engine.close()
    return found


@pytest.fixture(scope="module")
def isolated() -> dict[str, dict[str, torch.Tensor]]:
    return dict(zip(MODELS, run_dist(logits_of, world=1, args=(list(MODELS), False))[0], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_do_not_matter(name: str, isolated) -> None:
    reference, others = isolated[name]["reference"], isolated[name]
    assert torch.equal(others["other contents"], reference)
    for what in ("other sizes", "alone", "alone with pads"):
        error = (others[what] - reference).abs().max() / reference.abs().max()
        assert error <= NEIGHBOURS_LOGITS, what


def test_cross_document_leaks_by_design() -> None:
    (found,) = run_dist(logits_of, world=1, args=(["unix"], True))[0]
    assert not torch.allclose(found["other contents"], found["reference"], atol=1e-3)
