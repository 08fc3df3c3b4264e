"""How experts may be cut: refused in one line before anything is started."""

from typing import Any

import pytest

from tests import models
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.rules import check_parallel
from unimega.config.schema import ParallelConfig
from unimega.errors import ConfigError


def checked(parallel: dict[str, Any], world_size: int, **experts: Any) -> None:
    spec = ExpertSpec(**{"number": 6, "width": 12, "top_k": 2, **experts})
    layers = (LayerSpec(shared_ffn=24), LayerSpec(experts=spec))
    check_parallel(models.spec(layers), ParallelConfig(**parallel), world_size=world_size)


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        ({"ep": 2}, 2),
        ({"ep": 6}, 6),
        ({"tp": 2, "ep": 2}, 2),
        ({"tp": 2, "etp": 2}, 2),
        ({"tp": 2, "ep": 2, "etp": 2, "pp": 2}, 8),
    ],
)
def test_what_can_be_cut(parallel: dict[str, Any], world_size: int) -> None:
    checked(parallel, world_size)


@pytest.mark.parametrize(
    ("parallel", "world_size", "experts", "line"),
    [
        ({"ep": 0}, 2, {}, "parallel.ep=0: a parallel size is at least 1."),
        ({"etp": 2}, 2, {}, "parallel.etp=2 is neither 1 nor parallel.tp=1. Set it to one of the two."),
        (
            {"ep": 3},
            4,
            {},
            "parallel.ep=3 * etp=1 = 3 does not divide the 4 rank(s) of a pipeline stage (dp=4 * tp=1). "
            "Start a multiple of 3 processes, or pick an ep that divides 4.",
        ),
        (
            {"ep": 2, "tp": 2, "etp": 2},
            2,
            {},
            "parallel.ep=2 * etp=2 = 4 does not divide the 2 rank(s) of a pipeline stage (dp=1 * tp=2). "
            "Start a multiple of 4 processes, or pick an ep that divides 1.",
        ),
        ({"ep": 4}, 4, {}, "parallel.ep=4 does not divide the 6 experts of layer 1. Pick a divisor."),
        (
            {"tp": 2, "etp": 2},
            2,
            {"width": 13},
            "FFN width 13 of the experts of layer 1 is not divisible by parallel.etp=2. Pick a divisor.",
        ),
        (
            {"tp": 2},
            2,
            {"shared_width": 13},
            "shared FFN width 13 of the experts of layer 1 is not divisible by parallel.tp=2. Pick a divisor.",
        ),
    ],
)
def test_what_cannot_be_cut(parallel: dict[str, Any], world_size: int, experts: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(parallel, world_size, **experts)
    assert str(caught.value) == line
