"""Data parallelism and the distributed optimizer of megatron-core, set up once."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from unimega.config.parameters import matches
from unimega.config.schema import OptimizerConfig
from unimega.parallel.pipeline import PipelineStage


def freeze(stages: Sequence[PipelineStage], patterns: Sequence[str]) -> None:
    """Leave only parameters that match a pattern trainable. Before DDP wraps the stages."""
    for stage in stages:
        for name, values in stage.weights():
            values.requires_grad_(values.requires_grad and matches(name, patterns))


def wrap(
    stages: Sequence[nn.Module],
    config: TransformerConfig,
    *,
    overlap: bool,
    bucket_parameters: int | None = None,
    on_computed: Callable[[], None] | None = None,
) -> list[DistributedDataParallel]:
    """Give every stage gradient buffers that are summed over dp, fp32 whatever the parameters are.

    Gradients are sums: the loss is divided by the global sum of weights beforehand, on the host, so nothing is averaged
    and megatron-core's token counts (integers, read back once a step) are not used.

    Args:
        overlap: reduce-scatter gradients during backward and gather parameters during the next forward.
        bucket_parameters: parameters per reduce-scatter; None: megatron-core's choice (40 million or more).
        on_computed: called when a step's last backward of this rank is done, before it waits for other dp ranks.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_parameters,
    )
    wrapped = [
        DistributedDataParallel(config, ddp, stage, disable_bucketing=number > 0) for number, stage in enumerate(stages)
    ]
    config.no_sync_func = None
    if overlap:
        config.no_sync_func = [stage.no_sync for stage in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync

    def finalize(
        model: list[nn.Module], num_tokens: Any = None, pg_collection: Any = None, force_all_reduce: bool = False
    ) -> None:
        if on_computed is not None:
            on_computed()
        finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)

    config.finalize_model_grads_func = finalize
    return wrapped


def release(wrapped: Sequence[DistributedDataParallel]) -> None:
    """End a model's life: hooks of its parameters, DDP and optimizer hold each other through C++, unseen by Python."""
    for stage in wrapped:
        stage.grad_accs.clear()
        stage.config.grad_scale_func = stage.config.no_sync_func = stage.config.finalize_model_grads_func = None


def make_optimizer(
    wrapped: Sequence[DistributedDataParallel], config: TransformerConfig, optimizer: OptimizerConfig, *, overlap: bool
) -> MegatronOptimizer:
    """AdamW with its state cut over dp; fp32 masters if parameters are bf16.

    No weight decay on vectors (norms, biases). ``max_lr`` of a group carries its rate: ``set_lr`` writes the learning
    rates, before the first step too (megatron-core only stores what it is given).
    """
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
    )
    overrides = get_standard_config_overrides(settings)
    for factor in sorted({rate.factor for rate in optimizer.rates}):
        key = ParamKey(
            with_name_predicate=ParamWithNamePredicate(name=f"rate {factor}", fn=_has_rate(wrapped, optimizer, factor))
        )
        overrides[key] = {"max_lr": optimizer.lr * factor}
    made = get_megatron_optimizer(settings, list(wrapped), config_overrides=overrides, use_gloo_process_groups=False)
    config.grad_scale_func = made.scale_loss
    return made


def _has_rate(
    wrapped: Sequence[DistributedDataParallel], optimizer: OptimizerConfig, factor: float
) -> Callable[[nn.Parameter, str], bool]:
    """Whether the first of ``rates`` that matches a parameter has this factor."""
    names = {id(values): name for stage in wrapped for name, values in stage.module.weights()}

    def matches(values: nn.Parameter, _: str) -> bool:
        name = names[id(values)]
        return next((rate.factor for rate in optimizer.rates if fnmatchcase(name, rate.match)), None) == factor

    return matches


def set_lr(optimizer: MegatronOptimizer, lr: float, base: OptimizerConfig) -> None:
    """Write learning rate and weight decay into every group; ``lr`` is the schedule's value for a rate of 1."""
    for group in optimizer.param_groups:
        maximum = group.get("max_lr")
        group["lr"] = lr * (maximum / base.lr if maximum is not None else 1.0)
        group["weight_decay"] = base.weight_decay * group.get("wd_mult", 1.0)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Norm of the gradients of all ranks, before clipping; inf or NaN if one of them is. The host sync of a step.

    Afterwards the gradients are where ``update`` takes them from.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip to the largest norm and update: megatron-core's ``step`` from where ``gradient_norm`` ended.

    That one updates whatever the norm is: one infinite gradient would make a NaN of every weight.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def settle_parameters(wrapped: Sequence[DistributedDataParallel], *, overlap: bool) -> None:
    """Finish parameter gathers that wait for the next forward, so that parameters can be read."""
    if overlap:
        for stage in wrapped:
            stage.disable_forward_pre_hook()
            stage.enable_forward_pre_hook()
