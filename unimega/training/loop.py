"""A run from its configuration to its last checkpoint."""

import datetime
import errno
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unimega import backend, log
from unimega.config import loader as config_loader
from unimega.config import presets
from unimega.config.schema import DataConfig, RunConfig
from unimega.data.corpus import Source, vision_ids
from unimega.data.loader import Loader, Place, StepBatch
from unimega.data.plan import DataPlan, Recipe
from unimega.errors import ConfigError, UnimegaError
from unimega.parallel.checkpoint import LATEST_FILE, read_model
from unimega.training.engine import DTYPES, Engine, StepResult
from unimega.training.flops import step_flops
from unimega.training.metrics import FILE, Clock, Metrics
from unimega.training.schedule import learning_rate

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
RUN_FILE = "run.json"

logger = log.get(__name__)


def train(config: RunConfig) -> None:
    """Train as ``config`` says, on the ranks that torchrun started. Collective over the world.

    Raises:
        UnimegaError: one line; among others when another run's files are in the way, a corpus does not fit the model,
            replicas differ after the first step, or the loss is no number. The process group is left to the exit then.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.setup(rank=rank, world=world)
    _prepare_folders(config)
    config = resolved(config)
    plan, evaluations = plans(config)
    spec = presets.model_spec(config.model)
    backend.current().init_process_group(timeout=COLLECTIVE_TIMEOUT)
    engine = Engine(
        spec,
        config.parallel,
        optimizer_config=config.optimizer,
        precision=config.training.precision,
        recompute=config.training.recompute,
        trainable=config.training.trainable,
        kernels=config.kernels,
        seed=config.training.seed,
        initial=config.checkpoint.initial,
    )
    Run(config, engine, plan, evaluations).train()
    engine.close()  # after an error this would wait for ranks that are gone, and hide the error
    dist.destroy_process_group()


class Run:
    """The state of one training: engine, data, clock."""

    def __init__(self, config: RunConfig, engine: Engine, plan: DataPlan, evaluations: Mapping[str, DataPlan]) -> None:
        self.config, self.engine, self.plan, self.evaluations = config, engine, plan, evaluations
        self.is_main = dist.get_rank() == 0
        groups, training = engine.groups, config.training
        self.place = Place(
            global_batch_packs=training.global_batch_packs,
            micro_batch_packs=training.micro_batch_packs,
            dp_rank=groups.dp.rank(),
            dp=groups.dp.size(),
            tp_rank=groups.tp.rank(),
            tp=groups.tp.size(),
            sequence_parallel=engine.config.sequence_parallel,
            cross_document=config.model.cross_document,
        )
        names = engine.spec.modalities
        self.loss_weights = tuple(training.loss_weights.get(name, 1.0) for name in names)
        dtype = DTYPES[training.precision]
        device = engine.backend
        self.peak_flops = (device.peak_flops(dtype) or device.measured_gemm_flops(dtype)) * dist.get_world_size()
        self.metrics = Metrics(config.logging.directory if self.is_main else None)
        self.saved: list[Path] = []
        self.model = {"spec": engine.spec.to_dict(), "model": config_loader.dump(config)["model"]}
        if config.checkpoint.initial and "source" in (start := read_model(config.checkpoint.initial)):
            self.model["source"] = start["source"]  # original names, for gradients and exports

    def train(self) -> None:
        """All steps, with logging, evaluation and saving on the way."""
        config, steps = self.config, self.config.training.steps
        self._describe()
        loader = Loader(self.plan, self.place, self.loss_weights, last_step=steps)
        clock = Clock()
        try:
            for batch in loader:
                lr = learning_rate(batch.step, steps, config.optimizer)
                result = self.engine.step([backend.to_device(b) for b in batch.microbatches], lr=lr)
                step = batch.step + 1
                if not math.isfinite(result.loss):
                    packs = f"{batch.step * self.place.global_batch_packs} and following"
                    raise UnimegaError(f"step {step}: the loss is {result.loss} (packs {packs}). Lower optimizer.lr.")
                if step % config.logging.every_steps == 0 or step == steps:
                    self._log(step, batch, result, lr, clock)
                with clock.paused():
                    if self.evaluations and self._is_due(step, config.training.evaluate_every_steps):
                        self._evaluate(step)
                    if self._is_due(step, config.checkpoint.every_steps):
                        self._save(step)
        finally:
            loader.close()
            self.metrics.close()

    def _is_due(self, step: int, every: int) -> bool:
        """Every so many steps (0: never) and after the last one."""
        return step == self.config.training.steps or (every > 0 and step % every == 0)

    def _describe(self) -> None:
        parameters = len(self.engine.parameter_names)
        logger.info(
            "%s on %s, world %d: tp %d, pp %d (vpp %d), dp %d; %d parameters by name; %.1f GFLOP/s at most",
            self.config.model.preset,
            self.engine.backend.name,
            dist.get_world_size(),
            self.place.tp,
            self.config.parallel.pp,
            self.config.parallel.vpp,
            self.place.dp,
            parameters,
            self.peak_flops / 1e9,
        )
        if self.is_main:
            file = Path(self.config.checkpoint.directory) / RUN_FILE
            file.write_text(json.dumps(config_loader.dump(self.config), indent=1))

    def _log(self, step: int, batch: StepBatch, result: StepResult, lr: float, clock: Clock) -> None:
        """One record; rates are means since the last one."""
        seconds = clock.lap(step)
        tokens = self.place.global_batch_packs * self.config.data.pack_length
        flops = step_flops(self.engine.spec, batch.microbatches) * self.place.dp
        record: dict[str, Any] = {"step": step, "loss": result.loss}
        record |= modality_losses(self.engine.spec.modalities, result.sums, batch.targets, self.loss_weights)
        record |= {
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / self.peak_flops,
            "memory_bytes": self.engine.backend.memory_peak(),
        }
        self.metrics.write(record)
        steps = self.config.training.steps
        if step % max(self.config.logging.every_steps, steps // 100) == 0 or step <= 3 or step == steps:
            parts = [
                f"{key} {record[f'loss_{key}']:.4f}" for key in self.engine.spec.modalities if record[f"loss_{key}"]
            ]
            logger.info(
                "step %d/%d  loss %.4f  %s  norm %.3f  lr %.2e  %.0f tokens/s  mfu %.1f %%  %s left",
                step,
                steps,
                result.loss,
                "  ".join(parts),
                result.grad_norm,
                lr,
                record["tokens_per_s"],
                100 * record["mfu"],
                datetime.timedelta(seconds=round(clock.left(step, steps))),
            )

    def _evaluate(self, step: int) -> None:
        """Mean cross-entropy per modality on every held-out corpus."""
        names = self.engine.spec.modalities
        record: dict[str, Any] = {"step": step}
        for corpus, plan in self.evaluations.items():
            counts, totals = [0] * len(names), [0.0] * len(names)
            last = plan.num_steps(self.place.global_batch_packs)
            for batch in Loader(plan, self.place, [1.0] * len(names), last_step=last):
                _, *sums = self.engine.evaluate([backend.to_device(b) for b in batch.microbatches])
                totals = [a + b for a, b in zip(totals, sums, strict=True)]
                counts = [a + b for a, b in zip(counts, batch.targets, strict=True)]
            for name, total, count in zip(names, totals, counts, strict=True):
                if count:
                    record[f"evaluation/{corpus}/loss_{name}"] = total / count
        self.metrics.write(record)
        values = "  ".join(f"{k.removeprefix('evaluation/')} {v:.4f}" for k, v in record.items() if k != "step")
        logger.info("step %d  held out: %s", step, values)

    def _save(self, step: int) -> None:
        self.saved.append(self.engine.save(self.config.checkpoint.directory, step, self.model))
        logger.info("step %d  saved %s", step, self.saved[-1])
        while len(self.saved) > self.config.checkpoint.keep:
            old = self.saved.pop(0)
            if self.is_main:
                shutil.rmtree(old)


def modality_losses(
    names: Sequence[str], sums: Sequence[float], targets: Sequence[int], weights: Sequence[float]
) -> dict[str, float | None]:
    """Mean cross-entropy per modality; None where no loss was computed: no target in the batch, or its weight is 0."""
    rows = zip(names, sums, targets, weights, strict=True)
    return {f"loss_{name}": total / count if count and weight else None for name, total, count, weight in rows}


def _prepare_folders(config: RunConfig) -> None:
    """Refuse folders that an earlier run filled and make the others, on all ranks: nodes may not share a disk."""
    for key, directory, name in (
        ("checkpoint.directory", config.checkpoint.directory, LATEST_FILE),
        ("logging.directory", config.logging.directory, FILE),
    ):
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            filled = (folder / name).exists() and (folder / name).stat().st_size > 0
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(
                f"{key}={directory!r} is no folder that can be written ({error.strerror}). Name another one."
            ) from error
        if filled:
            raise ConfigError(
                f"{key}={directory!r} holds {name} of an earlier run, and resuming is not built yet. "
                "Name another directory, or remove this one."
            )


def resolved(config: RunConfig) -> RunConfig:
    """The run with what its corpora say of the model: all that is stored is complete."""
    if config.model.vision_ids is not None:
        return config
    ids = vision_ids([source.path for source in config.data.train]) if config.model.codebook else ()
    return replace(config, model=replace(config.model, vision_ids=ids))


def plans(config: RunConfig) -> tuple[DataPlan, dict[str, DataPlan]]:
    """What is trained on, and the held-out corpora by name if the run evaluates."""
    vocabulary, recipe = presets.vocabulary(config.model), _recipe(config.data)
    plan = DataPlan([Source(**asdict(source)) for source in config.data.train], vocabulary, recipe)
    paths = config.data.evaluation if config.training.evaluate_every_steps else ()
    return plan, {Path(path).name: DataPlan([Source(path=path)], vocabulary, recipe, evaluation=True) for path in paths}


def _recipe(data: DataConfig) -> Recipe:
    return Recipe(**{field.name: getattr(data, field.name) for field in fields(Recipe)})
