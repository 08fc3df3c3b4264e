"""Parameters that know their global tensor, with the marks megatron-core reads.

The marks are attributes of the parameter. Without them gradients and their norm are wrong in silence, so this module
alone sets and reads them; docs/parallelism.md lists them all.

- ``tensor_model_parallel, partition_dim``: a shard; its square counts in the gradient norm on every tp rank, that of an
  unmarked one on tp rank 0 alone;
- ``sequence_parallel``: under sequence parallelism it sees only this rank's rows, so its gradient is summed over tp;
- ``shared_embedding, shared``: the tied table on the first and the last stage (``mark_tied``);
- q/k norms see only this rank's heads: megatron-core finds them by ``q_layernorm`` and ``k_layernorm`` in their names.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn


def parameter(*shape: int, dim: int | None = None, tp: int = 1, on_local_rows: bool = False) -> nn.Parameter:
    """An uninitialised fp32 parameter on the host.

    Args:
        shape: of the global tensor; ``dim`` is divided by ``tp``.
        dim: the sharded dim; None: every tp rank holds the whole.
        on_local_rows: it acts on this rank's rows under sequence parallelism (norms, biases after the reduction).
    """
    local = [size // tp if axis == dim else size for axis, size in enumerate(shape)]
    made = nn.Parameter(torch.empty(local, dtype=torch.float32))
    if dim is None:
        _mark(made, tensor_model_parallel=False, partition_dim=-1, sequence_parallel=on_local_rows)
    else:
        set_tensor_model_parallel_attributes(made, is_parallel=True, dim=dim, stride=1)
    return made


def vocabulary_parameter(rows: int, width: int, *, rows_in_memory: int, tp: int) -> nn.Parameter:
    """[rows_in_memory / tp, width]: this rank's rows of a table that has ``rows`` rows in a file."""
    made = parameter(rows_in_memory, width, dim=0, tp=tp)
    _mark(made, vocabulary_rows=rows)
    return made


def mark_tied(table: nn.Parameter, *, duplicate: bool) -> None:
    """Mark the tied table on the first stage, and on the last as its duplicate.

    ``shared_embedding``, on both, gives it a bucket of its own, so that both stages cut it alike over dp; without it
    they drift apart in silence. ``shared`` keeps the duplicate out of the gradient norm.
    """
    _mark(table, shared_embedding=True)
    if duplicate:
        _mark(table, shared=True)


def sharded_dim(values: torch.Tensor) -> int | None:
    """The dim of a parameter that is cut over tp; None: every tp rank holds the whole.

    Raises:
        AttributeError: the tensor was not made here and carries no marks.
    """
    marked: Any = values
    return marked.partition_dim if marked.tensor_model_parallel else None


def vocabulary_rows(values: torch.Tensor) -> int | None:
    """Rows in a file of a table cut over the vocabulary; None for any other parameter."""
    return getattr(values, "vocabulary_rows", None)


def main_grad(values: torch.Tensor) -> torch.Tensor | None:
    """The accumulated fp32 gradient, which megatron-core's DDP attaches; None for a frozen parameter."""
    marked: Any = values
    return marked.main_grad if values.requires_grad else None


def _mark(values: nn.Parameter, **marks: bool | int) -> None:
    for name, value in marks.items():
        setattr(values, name, value)


def checkpoint_parts(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint stores for one parameter: views of it, by key.

    ``gate_up`` holds [gate; up] of this rank; a checkpoint keeps the two apart so that tp may change. Those of experts,
    [E, 2F, D], are whole on a rank and stay together: a block of a checkpoint is a run of rows of the first dim.
    """
    if ".gate_up." not in name or values.ndim == 3:
        return {name: values}
    gate, up = values.chunk(2, 0)
    return {name.replace(".gate_up.", ".gate."): gate, name.replace(".gate_up.", ".up."): up}
