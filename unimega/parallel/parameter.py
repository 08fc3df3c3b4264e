"""Parameters that know their global tensor, with the marks megatron-core reads.

Without these marks gradients and their norm are wrong in silence (specs/mcore.md 2.5, 2.6):

- ``tensor_model_parallel, partition_dim``: a shard; its square counts in the gradient norm on every tp rank, an unmarked
  one on tp rank 0 alone;
- ``sequence_parallel``: under sequence parallelism it sees only this rank's rows, so its gradient is summed over tp;
- q/k norms see only this rank's heads: megatron-core finds them by ``q_layernorm`` and ``k_layernorm`` in their names.
"""

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
        made.tensor_model_parallel, made.partition_dim = False, -1
        made.sequence_parallel = on_local_rows
    else:
        set_tensor_model_parallel_attributes(made, is_parallel=True, dim=dim, stride=1)
    return made


def checkpoint_parts(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint stores for one parameter: views of it, by key.

    ``gate_up`` holds [gate; up] of this rank; a checkpoint keeps the two apart so that tp may change.
    """
    if ".gate_up." not in name:
        return {name: values}
    gate, up = values.chunk(2, 0)
    return {name.replace(".gate_up.", ".gate."): gate, name.replace(".gate_up.", ".up."): up}
