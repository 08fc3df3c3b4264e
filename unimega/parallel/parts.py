"""What of the global tensors lies on this rank: initial values, checkpoints and tools all go by it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from unimega.parallel.groups import Groups
from unimega.parallel.parameter import cuts, is_expert, vocabulary_rows


@dataclass(frozen=True)
class Part:
    """A slice of a parameter's (or buffer's) shard that is one block of the global tensor ``key``."""

    key: str
    axis: int
    """Of the slice."""
    first: int
    """Where it starts in the shard."""
    size: int
    shape: tuple[int, ...]
    """Of the global tensor."""
    offset: tuple[int, ...]
    """Of the block in it."""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The block, a view of the shard or of a tensor of its shape."""
        return values.narrow(self.axis, self.first, self.size)

    def window(self, values: torch.Tensor) -> tuple[slice, ...]:
        """Where the block of a shard lies in the global tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.of(values).shape, strict=True))


def parts(name: str, values: torch.Tensor, groups: Groups) -> list[Part]:
    """The blocks that a shard consists of; none if it holds added rows alone.

    ``gate_up`` holds [gate; up] of this rank, along the dim of outputs; a checkpoint keeps the two apart so that tp and
    etp may change. Rows that were added to make the vocabulary divide by tp are in no block.
    """
    cut = {dim: getattr(groups, axis) for dim, axis in cuts(values).items()}
    axis, keys = 0, [name]
    if ".gate_up." in name:
        axis = max(0, values.ndim - 2)
        keys = [name.replace(".gate_up.", f".{half}.") for half in ("gate", "up")]
    size = values.shape[axis] // len(keys)
    found = []
    for number, key in enumerate(keys):
        shape = [size if dim == axis else length for dim, length in enumerate(values.shape)]
        offset, mine = [0] * values.ndim, size
        for dim, group in cut.items():
            offset[dim] = group.rank() * shape[dim]
            shape[dim] *= group.size()
        if (rows := vocabulary_rows(values)) is not None:
            shape[0] = rows
            mine = max(0, min(size, rows - offset[0]))
        if mine:
            found.append(Part(key, axis, number * size, mine, tuple(shape), tuple(offset)))
    return found


def copies(values: torch.Tensor, groups: Groups) -> dist.ProcessGroup:
    """Ranks that hold the same shard; megatron-core cuts its optimizer state over them."""
    return groups.expert_dp if is_expert(values) else groups.dp


def whole_over(values: torch.Tensor, groups: Groups) -> dist.ProcessGroup | None:
    """Ranks of a tp (or etp) group that each hold all of what they could share; None: it is cut."""
    if is_expert(values):
        return None if "etp" in cuts(values).values() else groups.etp
    return None if cuts(values) else groups.tp


def is_first_copy(values: torch.Tensor, groups: Groups) -> bool:
    """Whether no rank before this one, in its stage, holds the same."""
    whole = whole_over(values, groups)
    return copies(values, groups).rank() == 0 and (whole is None or whole.rank() == 0)
