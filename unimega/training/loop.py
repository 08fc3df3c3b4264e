"""A run from its configuration to its last checkpoint, and on from there."""

import datetime
import os
import time
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
from unimega.errors import CheckpointError
from unimega.parallel.agreement import check_equal
from unimega.parallel.checkpoint import read_model
from unimega.training import start
from unimega.training.engine import DTYPES, Engine, Resumed, StepResult
from unimega.training.evaluation import evaluate
from unimega.training.flops import step_flops
from unimega.training.guard import Guard
from unimega.training.metrics import Metrics, drop_after
from unimega.training.progress import Clock, Progress
from unimega.training.schedule import learning_rate
from unimega.training.signals import Signals, held
from unimega.training.start import Position

logger = log.get(__name__)


def train(config: RunConfig) -> None:
    """Train as ``config`` says, on the ranks that torchrun started; go on if its folders hold steps. Collective.

    Raises:
        UnimegaError: one line; among others when the folders hold another run, a corpus does not fit the model,
            replicas differ after the first step, or losses are no numbers. The process group is left to the exit then.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.setup(rank=rank, world=world)
    start.prepare_folders(config)
    config = resolved(config)
    start.check_before(config)
    plan, evaluations = plans(config)
    goes_on = start.holds_steps(config.checkpoint.directory)
    backend.current().init_process_group(timeout=datetime.timedelta(minutes=config.parallel.timeout_minutes))
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
    Run(config, engine, plan, evaluations, engine.resume(config.checkpoint.directory)).train()
    engine.close()  # after an error this would wait for ranks that are gone, and hide the error
    dist.destroy_process_group()


class Run:
    """The state of one training: engine, data, clock.

    Args:
        config: resolved.
        engine: filled; on resuming with what the checkpoint held.
        plan: of the training data.
        evaluations: of the held-out corpora, by name.
        resumed: where it goes on; None: at the beginning.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        plan: DataPlan,
        evaluations: Mapping[str, DataPlan],
        resumed: Resumed | None,
    ) -> None:
        self.config, self.engine, self.plan, self.evaluations = config, engine, plan, evaluations
        self.is_main = dist.get_rank() == 0
        self.place = _place(config, engine)
        names = engine.spec.modalities
        self.loss_weights = tuple(config.training.loss_weights.get(name, 1.0) for name in names)
        self.guard = Guard(config.training.max_skipped_steps, self._sources)
        self.signals = Signals()
        self.step = self.saved = resumed.step if resumed else 0
        self.position = Position()
        if resumed:
            state = resumed.training
            if "data" not in state:
                raise CheckpointError(
                    f"{resumed.path}: was not saved by a training. Name it in checkpoint.initial, another folder in "
                    "checkpoint.directory."
                )
            self.guard.restore(state["guard"])
            self.position = Position.restored(state["data"], plan, allow_change=config.data.allow_change)
        self.offset = self.position.step(self.place.global_batch_packs) - self.step
        self.model = {"spec": engine.spec.to_dict(), "model": config_loader.dump(config)["model"]}
        source = resumed.path if resumed else config.checkpoint.initial
        if source and "source" in (stored := read_model(source)):
            self.model["source"] = stored["source"]  # original names, for gradients and exports

    def train(self) -> None:
        """All steps that are left, with logging, evaluation and saving on the way."""
        config, steps = self.config, self.config.training.steps
        if self.step >= steps:
            logger.info(
                "all %d steps are done, %s holds step %d: nothing to do. A larger training.steps goes on from there",
                steps,
                config.checkpoint.directory,
                self.step,
            )
            return
        dtype, device = DTYPES[config.training.precision], self.engine.backend
        self.peak_flops = (device.peak_flops(dtype) or device.measured_gemm_flops(dtype)) * dist.get_world_size()
        self._describe()
        self.metrics = self._open_metrics()
        loader = Loader(
            self.plan,
            self.place,
            self.loss_weights,
            first_step=self.step + self.offset,
            last_step=steps + self.offset,
        )
        self.clock, self.last_save = Clock(self.step), time.monotonic()
        self.progress = Progress(
            self.engine.spec.modalities, steps=steps, every=config.logging.every_steps, first=self.step
        )
        try:
            with self.signals.listening():
                for batch in loader:
                    if self._advance(batch):
                        break
                self.engine.finish_saves(wait=True)
        finally:
            log.live("")
            loader.close()
            if self.metrics:
                self.metrics.close()

    def _advance(self, batch: StepBatch) -> bool:
        """One step and what follows it; whether a signal ends the run here."""
        config = self.config
        step, packs = self.step + 1, self.place.global_batch_packs
        lr = learning_rate(self.step, config.training.steps, config.optimizer)
        result = self.engine.step([backend.to_device(b) for b in batch.microbatches], lr=lr, share=self._share)
        self.guard.look(step, result, range(batch.step * packs, (batch.step + 1) * packs))
        self.step, self.position = step, Position((batch.step + 1) * packs)
        if step % config.logging.every_steps == 0 or step == config.training.steps:
            self._log(batch, result, lr)
        stop, minutes_are_up = (number > 0 for number in result.shared[:2])
        with self.clock.paused():
            if self.evaluations and not stop and self._is_due(config.training.evaluate_every_steps):
                self._evaluate()
            if stop or minutes_are_up or self._is_due(config.checkpoint.every_steps):
                self._save()
        if stop:
            logger.info("step %d  stopped by a signal; the same command goes on from here", step)
        return stop

    def _share(self) -> list[float]:
        """What the ranks tell each other in a step: whether one was asked to stop, whether it is time to save."""
        minutes = self.config.checkpoint.every_minutes
        is_time = self.is_main and minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes
        return [float(self.signals.asked), float(is_time)]

    def _is_due(self, every: int) -> bool:
        """Every so many steps (0: never) and after the last one."""
        return self.step == self.config.training.steps or (every > 0 and self.step % every == 0)

    def _describe(self) -> None:
        logger.info(
            "%s on %s, world %d: tp %d, pp %d (vpp %d), dp %d; %d parameters by name; %.1f GFLOP/s at most",
            self.config.model.preset,
            self.engine.backend.name,
            dist.get_world_size(),
            self.place.tp,
            self.config.parallel.pp,
            self.config.parallel.vpp,
            self.place.dp,
            len(self.engine.parameter_names),
            self.peak_flops / 1e9,
        )
        if self.step:
            logger.info("going on after step %d of %s", self.step, self.config.checkpoint.directory)

    def _open_metrics(self) -> Metrics | None:
        """On rank 0: the run stored beside its checkpoints, and the records of steps that come again taken out."""
        if not self.is_main:
            return None
        if dropped := drop_after(self.config.logging.directory, self.step):
            logger.info("%d records after step %d are dropped: these steps come again", dropped, self.step)
        start.write_run(self.config)
        return Metrics(self.config.logging.directory)

    def _log(self, batch: StepBatch, result: StepResult, lr: float) -> None:
        """One record; rates are means since the last one."""
        seconds = self.clock.lap(self.step)
        tokens = self.place.global_batch_packs * self.config.data.pack_length
        flops = step_flops(self.engine.spec, batch.microbatches) * self.place.dp
        record: dict[str, Any] = {"step": self.step, "loss": result.loss}
        record |= modality_losses(self.engine.spec.modalities, result.sums, batch.targets, self.loss_weights)
        record |= {
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / self.peak_flops,
            "memory_bytes": self.engine.backend.memory_peak(),
            "skipped_steps": self.guard.skipped,
        }
        self._write(record)
        self.progress.show(record, self.clock.left(self.step, self.config.training.steps))

    def _evaluate(self) -> None:
        """Mean cross-entropy per modality on every held-out corpus."""
        record = evaluate(self.engine, self.evaluations, self.place)
        self._write({"step": self.step} | record)
        values = "  ".join(f"{key.removeprefix('evaluation/')} {value:.4f}" for key, value in record.items())
        logger.info("step %d  held out: %s", self.step, values)

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(record)

    def _save(self) -> None:
        """A checkpoint of this step, once; signals that come meanwhile wait."""
        if self.saved == self.step:
            return
        if self.metrics:
            self.metrics.sync()
        config = self.config.checkpoint
        state = {"guard": self.guard.state(), "data": self.position.state(self.plan)}
        with held():
            self.engine.save(
                config.directory,
                self.step,
                self.model,
                training=state,
                form=config.optimizer,
                keep=config.keep,
                asynchronous=config.asynchronous,
            )
        self.saved, self.last_save = self.step, time.monotonic()

    def _sources(self, packs: Sequence[int]) -> str:
        """The documents of some packs by corpus, the first few of each."""
        found: dict[str, list[int]] = {}
        for pack in packs:
            for corpus, document in self.plan.documents(pack):
                found.setdefault(corpus, []).append(document)
        return "; ".join(
            f"{corpus} documents {' '.join(map(str, documents[:16]))}{' ...' if len(documents) > 16 else ''}"
            for corpus, documents in found.items()
        )


def _place(config: RunConfig, engine: Engine) -> Place:
    groups = engine.groups
    return Place(
        global_batch_packs=config.training.global_batch_packs,
        micro_batch_packs=config.training.micro_batch_packs,
        dp_rank=groups.dp.rank(),
        dp=groups.dp.size(),
        tp_rank=groups.tp.rank(),
        tp=groups.tp.size(),
        sequence_parallel=engine.config.sequence_parallel,
        cross_document=config.model.cross_document,
    )


def modality_losses(
    names: Sequence[str], sums: Sequence[float], targets: Sequence[int], weights: Sequence[float]
) -> dict[str, float | None]:
    """Mean cross-entropy per modality; None where no loss was computed: no target in the batch, or its weight is 0."""
    rows = zip(names, sums, targets, weights, strict=True)
    return {f"loss_{name}": total / count if count and weight else None for name, total, count, weight in rows}


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
