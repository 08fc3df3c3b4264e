"""What tools/logits.py calls: a world that is left, inputs that are not read again, lines that name their file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests import oracle
from tests.distributed.harness import run_dist
from unimega.config.schema import ParallelConfig
from unimega.errors import DataError
from unimega.hf.inputs import Inputs

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evaluate")
    run_dist(imported, world=1, args=(oracle.whole_folder("unix_mot", place / "hf"), place / "checkpoint"))
    return place / "checkpoint"


def imported(folder: Path, target: Path) -> None:
    oracle.import_folder(folder, target)


def request_of(checkpoint: Path, *, ids: list[int], tp: int = 1, gradients: bool = False) -> Any:
    from unimega.hf.evaluate import Request

    row = np.array([ids], dtype=np.int64)
    return Request(
        checkpoint=str(checkpoint),
        inputs=Inputs(ids=row, documents=np.ones_like(row), targets=None),
        where=Path("gone.npz"),
        gradients=gradients,
        cross_document=None,
        parallel=ParallelConfig(tp=tp),
    )


def answer(checkpoint: Path, tp: int) -> tuple[Any, bool]:
    """On a rank: the logits, and whether the world is still there."""
    from unimega.hf.evaluate import evaluate

    out = evaluate(request_of(checkpoint, ids=[1, 2, 3], tp=tp))
    return None if out is None else out["logits"], dist.is_initialized()


@pytest.mark.parametrize("tp", [1, 2])
def test_leaves_the_world(checkpoint: Path, tp: int) -> None:
    (logits, stays), *others = run_dist(answer, world=tp, args=(checkpoint, tp))
    assert logits.shape == (1, 3, 168) and np.isfinite(logits).all()
    assert not stays
    assert others == [(None, False)] * (tp - 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"ids": [1, 168]}, r"^gone\.npz: input_ids\[0, 1\]=168 is not an id: the model has 168 rows\.$"),
        ({"ids": [1], "gradients": True}, r"^gone\.npz: gradients need 'labels', which are missing\.$"),
    ],
)
def test_refuses(checkpoint: Path, options: dict[str, Any], line: str) -> None:
    from unimega.hf.evaluate import evaluate

    with pytest.raises(DataError, match=line):
        evaluate(request_of(checkpoint, **options))
