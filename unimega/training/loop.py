"""A run from its configuration to its last checkpoint, and on from there."""

import datetime
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch.distributed as dist

from unimega import backend, log
from unimega.config import loader as config_loader
from unimega.config import presets
from unimega.config.schema import DataConfig, RunConfig
from unimega.data.corpus import Source, vision_ids
from unimega.data.plan import DataPlan, Recipe
from unimega.errors import UnimegaError
from unimega.kernels import registry
from unimega.parallel.agreement import check_equal
from unimega.training import start
from unimega.training.engine import Engine
from unimega.training.run import Run
from unimega.training.signals import Signals
from unimega.training.trackers import check_installed
from unimega.training.watch import Watch


def train(config: RunConfig) -> None:
    """Train as ``config`` says, on the ranks that torchrun started; go on if its folders hold steps. Collective.

    Raises:
        UnimegaError: one line; among others when the folders hold another run, a corpus does not fit the model,
            replicas differ after the first step, or losses are no numbers. The process group is left to the exit then.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.setup(rank=rank, world=world)
    registry.check(config.kernels, backend.current().device)
    config = resolved(config)
    start.check_before(config)
    plan, evaluations = plans(config)
    start.prepare_folders(config)  # last: what is refused leaves no folder behind
    goes_on = start.holds_steps(config.checkpoint.directory)
    if rank == 0:
        check_installed(config)
    meet(timeout=60 * config.parallel.timeout_minutes, world=world)
    watch = Watch.of_world(timeout=60 * config.parallel.timeout_minutes)
    # The signals stay ours until the error is explained: the launcher ends whoever is left when a rank dies.
    with Signals().listening() as signals:
        try:
            _train(config, plan, evaluations, goes_on=goes_on, watch=watch, signals=signals)
        except UnimegaError:
            raise
        except RuntimeError as error:  # torch has no one class for a collective that gives up
            if (told := watch.explain(error)) is None:
                raise
            raise told from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted at step {watch.step}; the same command goes on from the last checkpoint."
            ) from None
        finally:
            log.live("")
            watch.close()
    dist.destroy_process_group()  # after an error it would wait for ranks that are gone, and hide the error


def meet(*, timeout: float, world: int) -> None:
    """Join the other ranks.

    Raises:
        UnimegaError: they did not all come within ``timeout`` seconds.
    """
    try:
        backend.current().init_process_group(timeout=datetime.timedelta(seconds=timeout))
    except UnimegaError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UnimegaError(
            f"the {world} ranks did not meet within {timeout:g} s (parallel.timeout_minutes): {reason}"
        ) from error


def _train(
    config: RunConfig,
    plan: DataPlan,
    evaluations: Mapping[str, DataPlan],
    *,
    goes_on: bool,
    watch: Watch,
    signals: Signals,
) -> None:
    check_equal(config_loader.dump(config) | {"there are steps in checkpoint.directory": goes_on})
    engine = Engine(
        presets.model_spec(config.model),
        config.parallel,
        optimizer_config=config.optimizer,
        precision=config.training.precision,
        recompute=config.training.recompute,
        trainable=config.training.trainable,
        kernels=config.kernels,
        seed=config.training.seed,
        initial="" if goes_on else config.checkpoint.initial,
    )
    resumed = engine.resume(config.checkpoint.directory)
    Run(config, engine, plan, evaluations, resumed=resumed, watch=watch, signals=signals).train()
    engine.close()


def resolved(config: RunConfig) -> RunConfig:
    """The run with what its corpora say of the model: all that is stored is complete."""
    if config.model.vision_ids is not None:
        return config
    paths = [source.path for source in config.data.train]
    ids = vision_ids(paths, separators=config.data.row_separator > 0) if config.model.codebook else ()
    return replace(config, model=replace(config.model, vision_ids=ids))


def plans(config: RunConfig) -> tuple[DataPlan, dict[str, DataPlan]]:
    """What is trained on, and the held-out corpora by name if the run evaluates."""
    vocabulary, recipe = presets.vocabulary(config.model), _recipe(config.data)
    plan = DataPlan([Source(**asdict(source)) for source in config.data.train], vocabulary, recipe)
    paths = config.data.evaluation if config.training.evaluate_every_steps else ()
    return plan, {Path(path).name: DataPlan([Source(path=path)], vocabulary, recipe, evaluation=True) for path in paths}


def _recipe(data: DataConfig) -> Recipe:
    return Recipe(**{field.name: getattr(data, field.name) for field in fields(Recipe)})
