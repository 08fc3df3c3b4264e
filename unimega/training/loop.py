"""A run from its configuration to its last checkpoint."""

import datetime
import json
import math
import os
import shutil
import time
from dataclasses import asdict
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
from unimega.training.metrics import Metrics
from unimega.training.schedule import learning_rate

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
RUN_FILE = "run.json"

logger = log.get(__name__)


def train(config: RunConfig) -> None:
    """Train as ``config`` says, on the ranks that torchrun started. Collective over the world.

    Raises:
        UnimegaError: one line; among others when a checkpoint of another run is in the way, a corpus does not fit the
            model, replicas differ after the first step, or the loss is no number.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.setup(rank=rank, world=world)
    _refuse_overwriting(config)
    vocabulary = presets.vocabulary(config.model, vision_ids=vision_ids([source.path for source in config.data.train]))
    plan = DataPlan(_sources(config.data), vocabulary, _recipe(config.data))
    spec = presets.model_spec(config.model, vision_ids=vocabulary.ids[-1])
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
    try:
        Run(config, engine, plan).train()
    finally:
        engine.close()
        dist.destroy_process_group()


class Run:
    """The state of one training: engine, data, clock."""

    def __init__(self, config: RunConfig, engine: Engine, plan: DataPlan) -> None:
        self.config, self.engine, self.plan = config, engine, plan
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
        self.evaluations = {
            Path(path).name: DataPlan(
                [Source(path=path)], engine.spec.vocabulary, _recipe(config.data), evaluation=True
            )
            for path in config.data.evaluation
        }
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
        started = last = time.perf_counter()
        last_step = 0
        try:
            for batch in loader:
                lr = learning_rate(batch.step, steps, config.optimizer)
                result = self.engine.step([backend.to_device(b) for b in batch.microbatches], lr=lr)
                step = batch.step + 1
                if not math.isfinite(result.loss):
                    packs = f"{batch.step * self.place.global_batch_packs} and following"
                    raise UnimegaError(f"step {step}: the loss is {result.loss} (packs {packs}). Lower optimizer.lr.")
                if step % config.logging.every_steps == 0 or step == steps:
                    now = time.perf_counter()
                    self._log(step, batch, result, lr, (now - last) / (step - last_step), started)
                    last, last_step = time.perf_counter(), step
                if self._is_due(step, config.training.evaluate_every_steps) and self.evaluations:
                    self._evaluate(step)
                if self._is_due(step, config.checkpoint.every_steps):
                    self._save(step)
        finally:
            loader.close()
            self.metrics.close()

    def _is_due(self, step: int, every: int) -> bool:
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
            directory = Path(self.config.checkpoint.directory)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / RUN_FILE).write_text(json.dumps(config_loader.dump(self.config), indent=1))

    def _log(self, step: int, batch: StepBatch, result: StepResult, lr: float, seconds: float, started: float) -> None:
        """One record; ``seconds`` is the mean time of a step since the last one."""
        tokens = self.place.global_batch_packs * self.config.data.pack_length
        flops = step_flops(self.engine.spec, batch.microbatches) * self.place.dp
        record: dict[str, Any] = {"step": step, "loss": result.loss}
        for name, total, count in zip(self.engine.spec.modalities, result.sums, batch.targets, strict=True):
            record[f"loss_{name}"] = total / count if count else None
        record |= {
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / self.peak_flops,
            "memory_bytes": self.engine.backend.memory_peak(),
        }
        self.metrics.write(record)
        steps = self.config.training.steps
        left = (time.perf_counter() - started) / step * (steps - step)
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
                datetime.timedelta(seconds=round(left)),
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


def _refuse_overwriting(config: RunConfig) -> None:
    directory = Path(config.checkpoint.directory)
    if (directory / LATEST_FILE).exists():
        raise ConfigError(
            f"checkpoint.directory={str(directory)!r} holds a checkpoint, and resuming is not built yet. "
            "Name another directory, or remove this one."
        )


def _sources(data: DataConfig) -> list[Source]:
    return [Source(**asdict(source)) for source in data.train]


def _recipe(data: DataConfig) -> Recipe:
    return Recipe(
        pack_length=data.pack_length,
        t2i_ratio=data.t2i_ratio,
        unconditional_ratio=data.unconditional_ratio,
        mask_instructions=data.mask_instructions,
        templates=data.templates,
        tokenizer=data.tokenizer,
        window_tokens=data.window_tokens,
        seed=data.seed,
    )
