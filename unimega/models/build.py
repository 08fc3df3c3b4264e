"""The one place that turns ``LayerSpec``s into modules."""

import torch
import torch.distributed as dist

from unimega.layers.attention import Attention
from unimega.layers.block import Block
from unimega.layers.context import Build
from unimega.layers.ffn import FFN
from unimega.layers.norm import AddNorm, Norm
from unimega.models.stage import Stage
from unimega.moe.layer import MoE
from unimega.parallel import lora
from unimega.parallel.groups import Groups


def build_block(build: Build, index: int, *, dp: dist.ProcessGroup) -> Block:
    """Layer ``index`` of the model, uninitialised, on the host; ``dp``: ranks that see other packs."""
    layer = build.spec.layers[index]
    split = layer.norms == "split"
    return Block(
        index,
        attention_norm=Norm(build, split=split),
        attention=Attention(build, layer),
        ffn_norm=AddNorm(build, split=split),
        ffn=FFN(build, layer) if layer.experts is None else MoE(build, layer.experts, dp=dp),
        recompute_ffn=build.moe_recompute and layer.experts is not None,
    )


def build_stages(
    build: Build,
    *,
    config: object,
    groups: Groups,
    layers_per_stage: tuple[int, ...],
    recompute_blocks: bool,
    dtype: torch.dtype,
) -> list[Stage]:
    """The virtual stages of this rank, initialised by nobody yet.

    Args:
        config: megatron-core's.
        layers_per_stage: layers of every virtual stage of the pipeline, bottom up; stage k is on pp rank k % pp.
        dtype: of the parameters.
    """
    pp, rank = groups.pp.size(), groups.pp.rank()
    stages = []
    for virtual, number in enumerate(range(rank, len(layers_per_stage), pp)):
        first = sum(layers_per_stage[:number])
        stage = Stage(
            build,
            config,
            blocks=[build_block(build, i, dp=groups.dp) for i in range(first, first + layers_per_stage[number])],
            is_first=number == 0,
            is_last=number == len(layers_per_stage) - 1,
            virtual=virtual if len(layers_per_stage) > pp else None,
            recompute_blocks=recompute_blocks,
        )
        lora.adapt(stage, build.spec.lora)
        stages.append(stage.to(dtype=dtype))
    return stages
