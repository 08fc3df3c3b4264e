"""Initial weights that do not depend on the layout: each global tensor is drawn from its own name."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch

from unimega.config.model import ModelSpec
from unimega.parallel.groups import Groups
from unimega.parallel.parameter import is_expert
from unimega.parallel.parts import Part, parts
from unimega.parallel.pipeline import PipelineStage


def initialize_weights(
    stages: Sequence[PipelineStage],
    spec: ModelSpec,
    groups: Groups,
    *,
    seed: int,
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill all parameters: norms 1, biases 0, matrices normal with the standard deviations of ``spec``; LoRA as PEFT.

    Every rank draws the global tensor and keeps its part, so any layout starts from the same numbers; of experts, each
    of which has a name of its own, it draws those it holds. With ``init_vision = "text"`` the split weights of other
    modalities are drawn from text's name. ``only``: parameters that are filled, by name.
    """
    with torch.no_grad():
        for stage in stages:
            for name, values in stage.weights():
                if not only(name):
                    continue
                values.zero_()  # biases, B of LoRA, and rows that the vocabulary is padded with
                for part in parts(name, values, groups):
                    _fill(part, values, spec, seed)


def _fill(part: Part, values: torch.Tensor, spec: ModelSpec, seed: int) -> None:
    key, mine = part.key, part.of(values)
    if "norm" in key:
        mine.fill_(1.0)
        return
    if ".bias" in key or ".lora_b" in key:
        return
    if spec.init_vision == "text":
        for other in spec.modalities[1:]:
            key = key.removesuffix(f"_{other}") + f"_{spec.modalities[0]}" if key.endswith(f"_{other}") else key
    if not is_expert(values):
        mine.copy_(draw(key, part.shape, spec, seed=seed)[part.window(values)])
        return
    held, *within = part.window(values)
    for number in range(held.start, held.stop):
        whole = _draw(f"{key}.{number}", part.shape[1:], spec, seed)
        mine[number - held.start].copy_(whole[tuple(within)])


def draw(key: str, shape: Sequence[int], spec: ModelSpec, *, seed: int) -> torch.Tensor:
    """The initial values of a matrix: fp32, whole, on the host; a function of ``seed``, ``key`` and ``shape`` alone.

    Of experts, [E, ...], each is drawn by itself: ``initialize_weights`` gives every rank those that it holds.
    """
    if ".experts." in key:
        return torch.stack([_draw(f"{key}.{number}", shape[1:], spec, seed) for number in range(shape[0])])
    return _draw(key, shape, spec, seed)


def _draw(key: str, shape: Sequence[int], spec: ModelSpec, seed: int) -> torch.Tensor:
    if ".lora_a" in key:
        bound = shape[-1] ** -0.5
        return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator(seed, key))
    return torch.empty(tuple(shape)).normal_(std=deviation(key, spec), generator=generator(seed, key))


def deviation(key: str, spec: ModelSpec) -> float:
    """Standard deviation of the initial values of a matrix."""
    if key.startswith("embedding"):
        return spec.init_embedding
    if key.startswith("head"):
        return spec.init_head
    if ".output." in key or ".down." in key:
        return spec.init_linear / math.sqrt(2 * len(spec.layers))
    return spec.init_linear


def generator(seed: int, key: str) -> torch.Generator:
    """What draws a tensor: a function of the two alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
