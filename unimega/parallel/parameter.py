"""Parameters that know their global tensor, with the marks megatron-core reads.

The marks are attributes of the parameter. Without them gradients and their norm are wrong in silence, so this module
alone sets and reads them; docs/parallelism.md lists them all.

- ``tensor_model_parallel, partition_dim``: a shard; its square counts in the gradient norm on every tp rank, that of an
  unmarked one on tp rank 0 alone;
- ``sequence_parallel``: under sequence parallelism it sees only this rank's rows, so its gradient is summed over tp;
- ``allreduce = False``: of experts; its gradient is summed, its optimizer state cut, over expert_dp in place of dp;
- ``shared_embedding, shared``: the tied table on the first and the last stage (``mark_tied``);
- q/k norms see only this rank's heads: megatron-core finds them by ``q_layernorm`` and ``k_layernorm`` in their names.
"""

from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

Axis = Literal["tp", "ep", "etp"]
"""Of the mesh, that a dim of a parameter is cut over."""


def parameter(*shape: int, dim: int | None = None, tp: int = 1, on_local_rows: bool = False) -> nn.Parameter:
    """An uninitialised fp32 parameter on the host.

    Args:
        shape: of the global tensor; ``dim`` is divided by ``tp``.
        dim: the sharded dim; None: every tp rank holds the whole.
        on_local_rows: it acts on this rank's rows under sequence parallelism (norms, biases after the reduction).
    """
    made = _empty(shape, {} if dim is None else {dim: tp})
    if dim is None:
        _mark(made, tensor_model_parallel=False, partition_dim=-1, sequence_parallel=on_local_rows)
    else:
        set_tensor_model_parallel_attributes(made, is_parallel=True, dim=dim, stride=1)
    return made


def expert_parameter(*shape: int, dim: int | None, ep: int = 1, etp: int = 1) -> nn.Parameter:
    """An uninitialised fp32 parameter of a layer's experts, on the host.

    Args:
        shape: of the global tensor, [E, ...]; the first dim is divided by ``ep``, ``dim`` by ``etp``.
        dim: the dim that etp cuts, not the first; None: every etp rank holds the whole.
    """
    made = _empty(shape, {0: ep} if dim is None else {0: ep, dim: etp})
    # without etp, ranks of tp hold other experts or see other rows: each counts in the norm
    set_tensor_model_parallel_attributes(
        made, is_parallel=dim is not None or etp == 1, dim=-1 if dim is None else dim, stride=1
    )
    _mark(made, allreduce=False)
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


def is_expert(values: torch.Tensor) -> bool:
    """Whether it is a parameter of experts, with copies over expert_dp in place of dp."""
    return not getattr(values, "allreduce", True)


def cuts(values: torch.Tensor) -> dict[int, Axis]:
    """The dims of a parameter that are cut, and over what; none of a buffer.

    Raises:
        AttributeError: the parameter was not made here and carries no marks.
    """
    if not isinstance(values, nn.Parameter):
        return {}
    marked: Any = values
    dim = marked.partition_dim
    if is_expert(values):
        return {0: "ep"} if dim < 0 else {0: "ep", dim: "etp"}
    return {dim: "tp"} if marked.tensor_model_parallel else {}


def vocabulary_rows(values: torch.Tensor) -> int | None:
    """Rows in a file of a table cut over the vocabulary; None for any other parameter."""
    return getattr(values, "vocabulary_rows", None)


def main_grad(values: torch.Tensor) -> torch.Tensor | None:
    """The accumulated fp32 gradient, which megatron-core's DDP attaches; None for a frozen parameter or a buffer."""
    marked: Any = values
    return marked.main_grad if values.requires_grad else None


def _empty(shape: tuple[int, ...], divided: dict[int, int]) -> nn.Parameter:
    local = [size // divided.get(axis, 1) for axis, size in enumerate(shape)]
    return nn.Parameter(torch.empty(local, dtype=torch.float32))


def _mark(values: nn.Parameter, **marks: bool | int) -> None:
    for name, value in marks.items():
        setattr(values, name, value)
