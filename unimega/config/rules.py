"""What must hold between the keys of a run: one function per rule, and the values that follow from several keys."""

from collections.abc import Callable, Iterator
from pathlib import PurePath

from unimega.config import expert_ranks, model_rules, parameters, presets
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import ParallelConfig, RunConfig, TrainingConfig
from unimega.errors import ConfigError

MAX_WINDOW_TOKENS = 1 << 30
"""Above it the keys that interleave the corpora of a window would leave 62 bits."""


def check(config: RunConfig, *, world_size: int) -> None:
    """Refuse a run that cannot be right, before anything is started.

    Raises:
        ConfigError: the first rule that is broken.
    """
    model_rules.check(config.model)
    check_parallel(presets.model_spec(config.model), config.parallel, world_size=world_size)
    for rule in RULES:
        rule(config)
    _batch(config, world_size)


def check_parallel(model: ModelSpec, parallel: ParallelConfig, *, world_size: int) -> None:
    """The rules on model and ranks alone, also for tools that only load a checkpoint."""
    for rule in (_sizes, _not_built, _sequence_parallel, _virtual_stages):
        rule(parallel)
    _world(parallel, world_size)
    expert_ranks.check(model, parallel, world_size=world_size)
    _heads(model, parallel)
    _ffn_widths(model, parallel)
    _skip(model, parallel)
    layout(parallel, len(model.layers))


def data_parallel_size(parallel: ParallelConfig, *, world_size: int) -> int:
    """Ranks that hold the same part of the model."""
    return world_size // (parallel.tp * parallel.cp * parallel.pp)


def microbatches_per_step(training: TrainingConfig, parallel: ParallelConfig, *, world_size: int) -> int:
    """Micro-batches of one rank in one step."""
    dp = data_parallel_size(parallel, world_size=world_size)
    return training.global_batch_packs // (training.micro_batch_packs * dp)


def layout(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Layers of each virtual stage from the bottom up; stage s belongs to pp rank s % pp.

    ``auto`` is as even as can be; the rest goes to the middle: the ends have the embedding and the head.
    """
    stages = parallel.pp * parallel.vpp
    if parallel.layout == "auto":
        if num_layers < stages:
            raise ConfigError(
                f"parallel.layout='auto': model.num_layers={num_layers} is less than the {stages} virtual stages of "
                f"parallel.pp={parallel.pp} * parallel.vpp={parallel.vpp}. "
                "Use fewer stages, or list the layers (0 is allowed)."
            )
        least, over = divmod(num_layers, stages)
        first = (stages - over) // 2
        return tuple(least + (first <= stage < first + over) for stage in range(stages))
    given = list(parallel.layout)
    if len(given) != stages:
        raise ConfigError(
            f"parallel.layout={given} has {len(given)} entries, but there are {stages} virtual stages "
            f"(parallel.pp={parallel.pp} * parallel.vpp={parallel.vpp}). Give one number per virtual stage."
        )
    if min(given) < 0 or sum(given) != num_layers:
        raise ConfigError(
            f"parallel.layout={given} holds {sum(given)} layers, but model.num_layers={num_layers}. "
            "The entries are at least 0 and sum to num_layers."
        )
    return parallel.layout


def _sizes(parallel: ParallelConfig) -> None:
    for name in ("tp", "pp", "vpp", "cp", "ep", "etp"):
        if (size := getattr(parallel, name)) < 1:
            raise ConfigError(f"parallel.{name}={size}: a parallel size is at least 1.")


def _not_built(parallel: ParallelConfig) -> None:
    if parallel.cp > 1:
        raise ConfigError(f"parallel.cp={parallel.cp}: context parallelism is not built yet. Set parallel.cp = 1.")


def _sequence_parallel(parallel: ParallelConfig) -> None:
    """megatron-core raises on it, deep inside its own configuration."""
    if parallel.sequence_parallel and parallel.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs parallel.tp > 1: it shares tokens inside a tp group. "
            "Set it to false or raise parallel.tp."
        )


def _virtual_stages(parallel: ParallelConfig) -> None:
    if parallel.vpp > 1 and parallel.pp == 1:
        raise ConfigError(
            f"parallel.vpp={parallel.vpp} needs parallel.pp > 1. Set parallel.vpp = 1 or raise parallel.pp."
        )


def _world(parallel: ParallelConfig, world_size: int) -> None:
    size = parallel.tp * parallel.pp * parallel.cp
    if world_size % size:
        raise ConfigError(
            f"parallel.tp={parallel.tp} * pp={parallel.pp} * cp={parallel.cp} = {size} does not divide the "
            f"{world_size} rank(s) of this run. "
            f"Start a multiple of {size} with torchrun --nproc-per-node, or change the sizes."
        )


def _heads(model: ModelSpec, parallel: ParallelConfig) -> None:
    if parallel.tp > model.kv_heads:
        raise ConfigError(
            f"parallel.tp={parallel.tp} is more than model.kv_heads={model.kv_heads}: sharing a KV head between ranks "
            f"is not built yet. Use a tp of at most {model.kv_heads}."
        )
    for name in ("heads", "kv_heads"):
        if (heads := getattr(model, name)) % parallel.tp:
            raise ConfigError(
                f"model.{name}={heads} is not divisible by parallel.tp={parallel.tp}. "
                "Pick a tp that divides heads and kv_heads."
            )


def _ffn_widths(model: ModelSpec, parallel: ParallelConfig) -> None:
    for number, width in _widths(model.layers):
        if width % parallel.tp:
            raise ConfigError(
                f"FFN width {width} of layer {number} is not divisible by parallel.tp={parallel.tp}. "
                "Pick a tp that divides model.ffn_width and the other FFN widths."
            )


def _widths(layers: tuple[LayerSpec, ...]) -> Iterator[tuple[int, int]]:
    for number, layer in enumerate(layers):
        for width in (*layer.ffn, layer.shared_ffn):
            yield number, width


def _skip(model: ModelSpec, parallel: ParallelConfig) -> None:
    if model.skip is not None and parallel.pp > 1:
        raise ConfigError(
            f"model.skip_from={model.skip[0]} with parallel.pp={parallel.pp}: the skip connection does not cross "
            "pipeline stages. Set parallel.pp = 1 or model.skip_from = -1."
        )


def _batch(config: RunConfig, world_size: int) -> None:
    training, parallel = config.training, config.parallel
    dp = data_parallel_size(parallel, world_size=world_size)
    if training.global_batch_packs % (training.micro_batch_packs * dp):
        raise ConfigError(
            f"training.global_batch_packs={training.global_batch_packs} is not divisible by training.micro_batch_packs="
            f"{training.micro_batch_packs} * dp={dp}. Pick a multiple of {training.micro_batch_packs * dp}."
        )
    number = microbatches_per_step(training, parallel, world_size=world_size)
    if parallel.vpp > 1 and number % parallel.pp:
        raise ConfigError(
            f"parallel.vpp={parallel.vpp}: {number} micro-batches per step are not divisible by parallel.pp="
            f"{parallel.pp}, as the interleaved schedule needs. "
            f"Pick a training.global_batch_packs that is a multiple of {training.micro_batch_packs * dp * parallel.pp}."
        )


def _tokens(config: RunConfig) -> None:
    tokens = config.data.pack_length * config.training.micro_batch_packs
    if config.parallel.sequence_parallel and tokens % config.parallel.tp:
        raise ConfigError(
            f"data.pack_length={config.data.pack_length} * training.micro_batch_packs="
            f"{config.training.micro_batch_packs} = {tokens} tokens are not divisible by parallel.tp="
            f"{config.parallel.tp}, as sequence_parallel needs. Change the pack length."
        )


AT_LEAST = (
    ("data.pack_length", 2),
    ("data.row_separator", 0),
    ("data.seed", 0),
    ("optimizer.min_lr", 0),
    ("optimizer.weight_decay", 0),
    ("optimizer.clip", 0),
    ("optimizer.warmup_steps", 0),
    ("training.steps", 1),
    ("training.global_batch_packs", 1),
    ("training.micro_batch_packs", 1),
    ("training.seed", 0),
    ("training.evaluate_every_steps", 0),
    ("training.max_skipped_steps", 0),
    ("checkpoint.every_steps", 0),
    ("checkpoint.every_minutes", 0),
    ("checkpoint.keep", 1),
    ("logging.every_steps", 1),
)


def _at_least(config: RunConfig) -> None:
    for key, least in AT_LEAST:
        section, name = key.split(".")
        if (value := getattr(getattr(config, section), name)) < least:
            raise ConfigError(f"{key}={value} is too small. It is at least {least}.")


def _positive(config: RunConfig) -> None:
    for name in ("lr", "eps"):
        if (value := getattr(config.optimizer, name)) <= 0:
            raise ConfigError(f"optimizer.{name}={value} is too small. It is above 0.")


def _betas(config: RunConfig) -> None:
    for i, beta in enumerate(config.optimizer.betas):
        if not 0 <= beta < 1:
            raise ConfigError(f"optimizer.betas[{i}]={beta} is out of range. It is at least 0 and below 1.")


def _rates(config: RunConfig) -> None:
    for i, rate in enumerate(config.optimizer.rates):
        if rate.factor < 0:
            raise ConfigError(f"optimizer.rates[{i}].factor={rate.factor} is negative. Use 0 or more.")


def _patterns(config: RunConfig) -> None:
    if not config.training.trainable:
        raise ConfigError(
            'training.trainable=[] trains nothing. Give patterns of parameter names; ["*"] is all of them.'
        )
    spec = presets.model_spec(config.model)
    parameters.check_patterns(spec, trainable=config.training.trainable, rates=config.optimizer.rates)


def _recompute(config: RunConfig) -> None:
    layers = presets.model_spec(config.model).layers
    if config.training.recompute == "moe" and all(layer.experts is None for layer in layers):
        raise ConfigError(
            "training.recompute='moe': the model has no routed experts to run again. Use none, selective or full."
        )


def _schedule(config: RunConfig) -> None:
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.schedule != "constant" and optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}. "
            "Lower min_lr, e.g. to a tenth of lr."
        )
    if not 0 < optimizer.decay_share <= 1:
        raise ConfigError(f"optimizer.decay_share={optimizer.decay_share} is out of range. It is above 0, at most 1.")
    if optimizer.warmup_steps > steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is more than training.steps={steps}. Shorten the warm-up."
        )


def _timeout(config: RunConfig) -> None:
    if config.parallel.timeout_minutes <= 0:
        raise ConfigError(f"parallel.timeout_minutes={config.parallel.timeout_minutes} is too small. It is above 0.")


def _profile(config: RunConfig) -> None:
    if config.logging.profile is None:
        return
    first, last = config.logging.profile
    if not 1 <= first <= last:
        raise ConfigError(
            f"logging.profile={[first, last]} is out of range. "
            "Give the first and the last step to trace, counted from 1."
        )
    if first > config.training.steps:
        raise ConfigError(
            f"logging.profile={[first, last]} begins after training.steps={config.training.steps}: nothing would be "
            "traced. Give earlier steps."
        )


def _sources(config: RunConfig) -> None:
    if not config.data.train:
        raise ConfigError('data.train=[] names no corpus. Give at least one table such as { path = "corpus/a" }.')
    for i, source in enumerate(config.data.train):
        if source.weight <= 0:
            raise ConfigError(f"data.train[{i}].weight={source.weight} is too small. It is above 0.")
        if source.epochs is None and any(other.epochs is not None for other in config.data.train):
            raise ConfigError(f"data.train[{i}] has no epochs, another source has. Give epochs to all or to none.")
        if source.epochs is not None and source.epochs <= 0:
            raise ConfigError(f"data.train[{i}].epochs={source.epochs} is too small. It is above 0.")
        if source.epochs is not None and source.weight != 1.0:
            raise ConfigError(
                f"data.train[{i}] has weight={source.weight} and epochs={source.epochs}. Remove one of the two."
            )


def _evaluation(config: RunConfig) -> None:
    seen: dict[str, str] = {}
    for path in config.data.evaluation:
        name = PurePath(path).name
        if name in seen:
            raise ConfigError(
                f"data.evaluation: '{seen[name]}' and '{path}' are both named '{name}'. "
                "The name stands in the metrics; rename one."
            )
        seen[name] = path


def _initial(config: RunConfig) -> None:
    if config.checkpoint.initial and config.model.init_vision != "random":
        raise ConfigError(
            f"model.init_vision={config.model.init_vision!r} has no effect with checkpoint.initial="
            f"{config.checkpoint.initial!r}: all weights come from there. Remove one of the two."
        )


def _directories(config: RunConfig) -> None:
    for key, section in (("checkpoint", config.checkpoint), ("logging", config.logging)):
        if not section.directory:
            raise ConfigError(f"{key}.directory='' names no folder. Give one of the run's own, e.g. runs/a/{key}.")


def _ratios(config: RunConfig) -> None:
    for name in ("t2i_ratio", "unconditional_ratio"):
        if not 0 <= (value := getattr(config.data, name)) <= 1:
            raise ConfigError(f"data.{name}={value} is out of range. It is a share between 0 and 1.")


def _window(config: RunConfig) -> None:
    data = config.data
    if data.window_tokens < data.pack_length:
        raise ConfigError(
            f"data.window_tokens={data.window_tokens} is less than data.pack_length={data.pack_length}. "
            "A window holds many packs."
        )
    if data.window_tokens > MAX_WINDOW_TOKENS:
        raise ConfigError(f"data.window_tokens={data.window_tokens} is too large. It is at most {MAX_WINDOW_TOKENS}.")


def _loss_weights(config: RunConfig) -> None:
    weights, names = config.training.loss_weights, presets.modalities(config.model)
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(
                f"training.loss_weights.{name}: the model has no such modality. Modalities: {', '.join(names)}."
            )
        if weight < 0:
            raise ConfigError(f"training.loss_weights.{name}={weight} is negative. Use 0 or more.")
    if not any(weights.get(name, 1.0) for name in names):
        raise ConfigError("training.loss_weights are all 0: nothing is learned. Give one modality a weight above 0.")


RULES: tuple[Callable[[RunConfig], None], ...] = (
    _at_least,
    _positive,
    _betas,
    _rates,
    _patterns,
    _recompute,
    _schedule,
    _timeout,
    _profile,
    _sources,
    _evaluation,
    _initial,
    _directories,
    _ratios,
    _window,
    _loss_weights,
    _tokens,
)
