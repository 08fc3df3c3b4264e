"""Where each tensor of this rank lies in the global one: what megatron-core's checkpoints need to be free of layouts.

Keys are parameter names (``parts``); the weights of experts are [E, F, D] for gate and up, [E, D, F] for down. The
state of the optimizer is cut over dp, or expert_dp, in flat ranges of this rank's shard: such a range of a matrix is at
most three boxes (the end of a row, whole rows, the start of a row), of the weights of experts at most five, twice as
many where it holds gate and up, so it is described, written and read where it lies.
Nothing is gathered, and any tp, ep, etp, pp, vpp, layout and dp can read it.

megatron-core's own ``fully_reshardable`` gathers 12 bytes per parameter on every rank, and in 0.16.1 stores shifted
states if buckets are padded: it cuts with offsets that count the padding out of a copy without. Its ``dp_reshardable``
loads under another dp only. Neither is used.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer

from unimega.parallel.groups import Groups
from unimega.parallel.parts import copies, parts, whole_over
from unimega.parallel.pipeline import PipelineStage

Form = Literal["reshardable", "fast"]
STATE_PREFIX = "optimizer."
"""Of all keys that are no weights: ``{param, exp_avg, exp_avg_sq}.KEY``, ``fast.RANK...``, ``rng.RANK...`` after it."""


@dataclass(frozen=True)
class Fragment:
    """What this dp rank's optimizer holds of one parameter: elements [start, end) of its flat shard."""

    name: str
    parameter: torch.Tensor
    duplicate: bool
    start: int
    end: int
    states: dict[str, torch.Tensor]
    """[end - start] each: exp_avg, exp_avg_sq and, if the parameter is not fp32 itself, param (the master weight)."""


def sharded_weights(stages: Sequence[PipelineStage], groups: Groups) -> list[ShardedTensor]:
    """This rank's weights as views of the parameters; of their dp copies each is written by one rank, in turns."""
    made = []
    loads = {group: [0] * group.size() for group in (groups.dp, groups.expert_dp)}
    for stage in stages:
        for name, values in stage.stored():
            same = copies(values, groups)
            for part in parts(name, values, groups):
                block = part.of(values.detach())
                writer = loads[same].index(min(loads[same]))
                loads[same][writer] += block.numel()
                copy = (same.rank() - writer) % same.size()
                replica = _replica(values, groups, duplicate=_is_duplicate(stage, name), copy=copy)
                made.append(_tensor(part.key, block, part.shape, part.offset, replica))
    return made


def sharded_optimizer(
    optimizer: MegatronOptimizer, stages: Sequence[PipelineStage], groups: Groups, *, form: Form
) -> list[ShardedTensor]:
    """This rank's share of the optimizer's state, as views of it."""
    made = []
    for fragment in fragments(optimizer, stages):
        for state, values in fragment.states.items():
            if form == "fast":
                made.append(_own(f"fast.{dist.get_rank()}.{state}.{fragment.name}", values))
            else:
                made += _blocks(fragment, state, values, groups)
    return made


def sharded_rng(states: dict[str, torch.Tensor]) -> list[ShardedTensor]:
    """Random number generators of this rank, which no other can use."""
    return [_own(f"rng.{dist.get_rank()}.{name}", state) for name, state in states.items()]


def fragments(optimizer: MegatronOptimizer, stages: Sequence[PipelineStage]) -> Iterator[Fragment]:
    """What megatron-core's distributed optimizer holds here, parameter by parameter; absent moments are made, as 0."""
    names = {id(values): (stage, name) for stage in stages for name, values in stage.weights()}
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if inner.is_stub_optimizer:  # nothing to train on this rank
            continue
        for parameter, (group, place) in inner.model_param_group_index_map.items():
            master = inner.optimizer.param_groups[group]["params"][place]
            state: dict[str, torch.Tensor] = inner.optimizer.state[master]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(master)
            states = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            if parameter.dtype != torch.float32:
                states["param"] = master
            stage, name = names[id(parameter)]
            range_ = inner._get_model_param_range_map(parameter)["param"]
            flat = {key: values.detach().view(-1) for key, values in states.items()}
            yield Fragment(name, parameter, _is_duplicate(stage, name), range_.start, range_.end, flat)


def global_shapes(stages: Sequence[PipelineStage], groups: Groups) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of the model by key. Collective over pp and tp."""
    mine = {part.key: part.shape for s in stages for name, v in s.stored() for part in parts(name, v, groups)}
    for group in (groups.tp, groups.pp):
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        mine = {key: shape for shapes in everyone for key, shape in shapes.items()}
    return mine


def boxes(start: int, end: int, shape: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, end) of a tensor as boxes of it, (offset, shape), in order."""
    if len(shape) == 1:
        return [((start,), (end - start,))] if start < end else []
    found, inner = [], math.prod(shape[1:])
    while start < end:
        row, within = divmod(start, inner)
        if within or end - start < inner:
            stop = min(inner, within + end - start)
            found += [((row, *offset), (1, *size)) for offset, size in boxes(within, stop, shape[1:])]
            start += stop - within
        else:
            rows = (end - start) // inner
            found.append(((row, *(0 for _ in shape[1:])), (rows, *shape[1:])))
            start += rows * inner
    return found


def _blocks(fragment: Fragment, state: str, values: torch.Tensor, groups: Groups) -> list[ShardedTensor]:
    """The boxes of one state in the global tensors."""
    replica = _replica(fragment.parameter, groups, duplicate=fragment.duplicate, copy=0)
    found = parts(fragment.name, fragment.parameter, groups)
    made, taken = [], 0
    for place, size in boxes(fragment.start, fragment.end, fragment.parameter.shape):
        box = values[taken : taken + math.prod(size)].view(size)
        taken += box.numel()
        for part in found:
            within = place[part.axis] - part.first
            start, end = max(0, -within), min(size[part.axis], part.size - within)
            if start >= end:
                continue
            inner = [within + start if axis == part.axis else at for axis, at in enumerate(place)]
            offset = tuple(a + b for a, b in zip(part.offset, inner, strict=True))
            block = box.narrow(part.axis, start, end - start)
            made.append(_tensor(f"{STATE_PREFIX}{state}.{part.key}", block, part.shape, offset, replica))
    return made


def _own(name: str, values: torch.Tensor) -> ShardedTensor:
    """A flat tensor of this rank alone."""
    return _tensor(STATE_PREFIX + name, values, tuple(values.shape), (0,), (0, 0, 0))


def _tensor(
    key: str, values: torch.Tensor, shape: tuple[int, ...], offset: tuple[int, ...], replica: tuple[int, int, int]
) -> ShardedTensor:
    # no axis_fragmentations: cuts may be unequal; torch checks at every save that they do not overlap or leave holes
    return ShardedTensor(
        key, values, values.dtype, tuple(values.shape), shape, offset, axis_fragmentations=None, replica_id=replica
    )


def _replica(values: torch.Tensor, groups: Groups, *, duplicate: bool, copy: int) -> tuple[int, int, int]:
    """Which copy of a weight this is; (0, 0, 0) is written."""
    whole = whole_over(values, groups)
    return int(duplicate), 0 if whole is None else whole.rank(), copy


def _is_duplicate(stage: PipelineStage, name: str) -> bool:
    """The tied table lies on the last stage as well."""
    return name == "embedding.weight" and not stage.pre_process
