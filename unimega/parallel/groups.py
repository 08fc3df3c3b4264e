"""Process groups as one value that is handed down; nothing of ours reads a global."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from unimega.config.schema import ParallelConfig


@dataclass(frozen=True)
class Groups:
    """The axes of the mesh [pp, dp, cp, tp] (tp fastest), and of [pp, expert_dp, ep, etp], as seen from this rank."""

    tp: dist.ProcessGroup
    """Ranks that share one layer's weights."""
    pp: dist.ProcessGroup
    """Ranks that hold the stages of one copy of the model."""
    dp: dist.ProcessGroup
    """Ranks that hold the same weights and see different packs (cp is 1 until it is built)."""
    ep: dist.ProcessGroup
    """Ranks that share a layer's experts."""
    etp: dist.ProcessGroup
    """Ranks that share the width of each expert."""
    expert_dp: dist.ProcessGroup
    """Ranks that hold the same part of the same experts and see different tokens."""
    collection: ProcessGroupCollection
    """The same and more in megatron-core's form, for its own calls."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's pipeline ends here, where losses and logits are."""
        return self.pp.rank() == self.pp.size() - 1


def initialize(parallel: ParallelConfig, *, seed: int = 1) -> Groups:
    """Cut the world into groups. Collective over the world; needs an initialised default process group.

    megatron-core's own globals are set as well: some of its functions take no group as an argument.
    """
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=parallel.timeout_minutes,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    _seed(seed, collection)
    return Groups(
        tp=collection.tp,
        pp=collection.pp,
        dp=collection.dp_cp,
        ep=collection.ep,
        etp=collection.expt_tp,
        expert_dp=collection.expt_dp,
        collection=collection,
    )


def _seed(seed: int, collection: ProcessGroupCollection) -> None:
    """Random states for dropout and noise: others on each dp rank and stage.

    The default one is equal on tp ranks, for rows that all of them have; megatron-core's trackers hold one for what tp
    cuts, and one for rows of experts, which without etp differ by tp rank too.
    """
    apart = collection.dp_cp.rank() * collection.pp.size() + collection.pp.rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1_000_000 * apart, etp_rank=collection.tp.rank())


def destroy() -> None:
    """Close the groups, so that another mesh can be made in the same world.

    megatron-core forgets its own only: each of about 20 would keep the connections and, with gloo, the threads it has.
    """
    made: list[dist.ProcessGroup] = []
    for value in vars(parallel_state).values():
        for group in value if isinstance(value, list) else [value]:
            if isinstance(group, dist.ProcessGroup) and group is not dist.group.WORLD and group not in made:
                made.append(group)
    parallel_state.destroy_model_parallel()
    for group in made:
        dist.destroy_process_group(group)
