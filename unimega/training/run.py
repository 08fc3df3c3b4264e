"""One training from its first step, or the one after a checkpoint, to its last."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from unimega import backend, log
from unimega.config import loader as config_loader
from unimega.config.parameters import parameters
from unimega.config.schema import RunConfig
from unimega.data.loader import Loader, Place, StepBatch
from unimega.data.plan import DataPlan
from unimega.errors import CheckpointError
from unimega.parallel.checkpoint import read_model
from unimega.training import start
from unimega.training.engine import DTYPES, Engine, Resumed, StepResult
from unimega.training.evaluation import evaluate
from unimega.training.expert_metrics import expert_record
from unimega.training.flops import step_flops
from unimega.training.guard import Guard
from unimega.training.metrics import Metrics, drop_after, writing
from unimega.training.profile import Profile
from unimega.training.progress import Clock, Progress
from unimega.training.schedule import learning_rate
from unimega.training.signals import Signals, held
from unimega.training.spread import Spread
from unimega.training.start import Position
from unimega.training.trackers import Trackers
from unimega.training.watch import Watch

logger = log.get(__name__)


class Run:
    """The state of one training: engine, data, clock.

    Args:
        config: resolved.
        engine: filled; on resuming with what the checkpoint held.
        plan: of the training data.
        evaluations: of the held-out corpora, by name.
        resumed: where it goes on; None: at the beginning.
        watch: is told of every step.
        signals: say when to stop.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        plan: DataPlan,
        evaluations: Mapping[str, DataPlan],
        *,
        resumed: Resumed | None,
        watch: Watch,
        signals: Signals,
    ) -> None:
        self.config, self.engine, self.plan, self.evaluations = config, engine, plan, evaluations
        self.watch, self.is_main = watch, dist.get_rank() == 0
        self.place = _place(config, engine)
        names = engine.spec.modalities
        self.loss_weights = tuple(config.training.loss_weights.get(name, 1.0) for name in names)
        self.guard = Guard(config.training.max_skipped_steps, self._sources)
        self.signals, self.spread = signals, Spread(rank=dist.get_rank(), world=dist.get_world_size())
        self.profile = Profile(config.logging.profile, config.logging.directory, rank=dist.get_rank())
        self.step = self.saved = resumed.step if resumed else 0
        self.saving = False
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
        self.sinks = self._open_sinks()
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
            while not self._advance(loader):
                pass
            self.engine.finish_saves(wait=True)
        finally:
            self.profile.close(self.step)
            loader.close()
            for sink in self.sinks:
                sink.close()

    def _advance(self, loader: Loader) -> bool:
        """One step and what follows it; whether the run ends here."""
        config, packs = self.config, self.place.global_batch_packs
        step = self.watch.step = self.step + 1
        self.profile.before(step)
        started = time.perf_counter()
        batch = next(loader)
        waited = time.perf_counter() - started
        lr = learning_rate(self.step, config.training.steps, config.optimizer)
        microbatches = [backend.to_device(b) for b in batch.microbatches]
        result = self.engine.step(microbatches, lr=lr, share=lambda: self._share(step))
        self.guard.look(step, result, range(batch.step * packs, (batch.step + 1) * packs))
        self.step, self.position = step, Position((batch.step + 1) * packs)
        if self._has_record(step):
            self._log(batch, result, lr)
        self.spread.add(waited + result.own_seconds)
        stop, minutes_are_up = (number > 0 for number in result.shared[:2])
        with self.clock.paused():
            self.profile.after(step)
            if self.evaluations and not stop and self._is_due(config.training.evaluate_every_steps):
                self._evaluate()
            if stop or minutes_are_up or self._is_due(config.checkpoint.every_steps):
                self._save()
            if self.saving:
                self.saving = not self.engine.finish_saves(wait=False)
        if stop:
            logger.info("step %d  %s: stopped; the same command goes on from here", step, self.signals.name or "signal")
        return stop or step == config.training.steps

    def _share(self, step: int) -> list[float]:
        """What ranks tell each other beside the loss: if one was asked to stop, if it is time to save, their times."""
        minutes = self.config.checkpoint.every_minutes
        is_time = self.is_main and minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes
        own = [float(self.signals.asked), float(is_time)]
        return own + (self.spread.share(self.engine.backend.memory_peak()) if self._has_record(step) else [])

    def _has_record(self, step: int) -> bool:
        return step % self.config.logging.every_steps == 0 or step == self.config.training.steps

    def _is_due(self, every: int) -> bool:
        """Every so many steps (0: never) and after the last one."""
        return self.step == self.config.training.steps or (every > 0 and self.step % every == 0)

    def _describe(self) -> None:
        parallel = self.config.parallel
        logger.info(
            "%s on %s, world %d: tp %d, pp %d (vpp %d), dp %d%s; %d parameters by name; %.1f GFLOP/s at most",
            self.config.model.preset,
            self.engine.backend.name,
            dist.get_world_size(),
            self.place.tp,
            parallel.pp,
            parallel.vpp,
            self.place.dp,
            f", ep {parallel.ep} (etp {parallel.etp}, {parallel.dispatch})" if parallel.ep * parallel.etp > 1 else "",
            len(parameters(self.engine.spec)),
            self.peak_flops / 1e9,
        )
        if self.step:
            logger.info("going on after step %d of %s", self.step, self.config.checkpoint.directory)

    def _open_sinks(self) -> list[Metrics | Trackers]:
        """On rank 0: the run stored beside its checkpoints, and the records of steps that come again taken out."""
        if not self.is_main:
            return []
        with writing(self.config.logging.directory):
            dropped = drop_after(self.config.logging.directory, self.step)
        if dropped:
            logger.info("%d records after step %d are dropped: these steps come again", dropped, self.step)
        start.write_run(self.config)
        return [Metrics(self.config.logging.directory), Trackers(self.config, step=self.step)]

    def _log(self, batch: StepBatch, result: StepResult, lr: float) -> None:
        """One record; rates are means since the last one."""
        seconds = self.clock.lap(self.step)
        config = self.config
        tokens = self.place.global_batch_packs * config.data.pack_length
        flops = step_flops(self.engine.spec, batch.microbatches, trainable=config.training.trainable) * self.place.dp
        record: dict[str, Any] = {"step": self.step, "loss": result.loss}
        record |= modality_losses(self.engine.spec.modalities, result.sums, batch.targets, self.loss_weights)
        record |= {
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / self.peak_flops,
            **self.spread.record(result.shared[2:], self.step),
            "skipped_steps": self.guard.skipped,
        }
        if any(layer.experts for layer in self.engine.spec.layers):
            record |= expert_record(self.engine.spec, self.engine.routed.take())
        self._write(record)
        self.progress.show(record, self.clock.left(self.step, config.training.steps))

    def _evaluate(self) -> None:
        """Mean cross-entropy per modality on every held-out corpus."""
        record = evaluate(self.engine, self.evaluations, self.place)
        self._write({"step": self.step} | record)
        values = "  ".join(f"{key.removeprefix('evaluation/')} {value:.4f}" for key, value in record.items())
        logger.info("step %d  held out: %s", self.step, values)

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _save(self) -> None:
        """A checkpoint of this step, once; signals that come meanwhile wait."""
        if self.saved == self.step:
            return
        for sink in self.sinks:
            sink.sync()
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
        self.saving = config.asynchronous
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
