"""Initial weights that do not depend on the layout: each global tensor is drawn from its own name."""

import hashlib
import math
from collections.abc import Sequence

import torch

from unimega.config.model import ModelSpec
from unimega.parallel.groups import Groups
from unimega.parallel.parameter import checkpoint_parts, sharded_dim, vocabulary_rows
from unimega.parallel.pipeline import PipelineStage


def initialize_weights(stages: Sequence[PipelineStage], spec: ModelSpec, groups: Groups, *, seed: int) -> None:
    """Fill all parameters: norms 1, biases 0, matrices normal with the standard deviations of ``spec``.

    Every rank draws the global tensor and keeps its part, so any tp, pp and dp start from the same numbers. With
    ``init_vision = "text"`` the split weights of other modalities are drawn from text's name.
    """
    with torch.no_grad():
        for stage in stages:
            for name, values in stage.weights():
                for key, part in checkpoint_parts(name, values).items():
                    _fill(key, part, values, spec, groups, seed)


def _fill(key: str, part: torch.Tensor, parameter: torch.Tensor, spec: ModelSpec, groups: Groups, seed: int) -> None:
    if "norm" in key:
        part.fill_(1.0)
        return
    if ".bias" in key:
        part.zero_()
        return
    tp, dim = groups.tp, sharded_dim(parameter)
    shape = list(part.shape)
    if dim is not None:
        shape[dim] *= tp.size()
    rows = vocabulary_rows(parameter)
    if rows is not None:
        shape[0] = rows
    if spec.init_vision == "text":
        for other in spec.modalities[1:]:
            key = key.removesuffix(f"_{other}") + f"_{spec.modalities[0]}" if key.endswith(f"_{other}") else key
    whole = draw(key, shape, spec, seed=seed)
    if rows is not None:
        start = tp.rank() * part.shape[0]
        mine = whole[start : start + part.shape[0]]
        part.zero_()
        part[: len(mine)] = mine
    else:
        part.copy_(whole if dim is None else whole.chunk(tp.size(), dim)[tp.rank()])


def draw(key: str, shape: Sequence[int], spec: ModelSpec, *, seed: int) -> torch.Tensor:
    """The initial values of a matrix: fp32, whole, on the host; a function of ``seed``, ``key`` and ``shape`` alone."""
    return torch.empty(tuple(shape)).normal_(std=deviation(key, spec), generator=_generator(seed, key))


def deviation(key: str, spec: ModelSpec) -> float:
    """Standard deviation of the initial values of a matrix."""
    if key.startswith("embedding"):
        return spec.init_embedding
    if key.startswith("head"):
        return spec.init_head
    if ".output." in key or ".down." in key:
        return spec.init_linear / math.sqrt(2 * len(spec.layers))
    return spec.init_linear


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
