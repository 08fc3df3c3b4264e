"""A model on its ranks: built, filled, wrapped, stepped. Loop, tools and tests all drive this one."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from unimega import backend
from unimega.batch import Microbatch
from unimega.config.model import ModelSpec
from unimega.config.parameters import check_patterns
from unimega.config.rules import layout
from unimega.config.schema import OptimizerConfig, ParallelConfig
from unimega.kernels import registry
from unimega.layers.context import Build
from unimega.models.build import build_stages
from unimega.parallel import checkpoint, groups, initialize, optimizer, pipeline, replicas
from unimega.parallel.experts import ExpertLayout
from unimega.parallel.linear import Layout
from unimega.parallel.lora import is_factor
from unimega.parallel.megatron_config import transformer_config
from unimega.parallel.parameter import main_grad
from unimega.training.routing import RoutedLayers
from unimega.training.same_model import check_same_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """What one step of training says, equal on all ranks."""

    loss: float
    """Sum of weighted cross-entropies, weights divided by their global sum: the mean that is trained."""
    sums: tuple[float, ...]
    """Unweighted sum of cross-entropies by the modality of the input token."""
    grad_norm: float
    """Before clipping."""
    applied: bool
    """False: loss or gradient was not finite, and parameters and the optimizer's state are what they were before."""
    shared: tuple[float, ...] = ()
    """Sums over the ranks of what ``share`` gave."""
    own_seconds: float = 0.0
    """Of this rank alone: until its last backward was done, without waiting for other data-parallel ranks."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int
    """Updates that were made."""
    path: Path
    """The step's folder."""
    training: dict[str, Any]
    """What the loop gave to ``Engine.save``."""


class Engine:
    """Stages, gradients and optimizer of one model on this world.

    Args:
        spec: the model.
        parallel: how ranks are cut up; the process group must exist (``backend.current().init_process_group``).
        optimizer_config: None: no gradients buffers and no optimizer, for forward passes only.
        precision: fp32 or bf16.
        recompute: none, selective, moe or full.
        trainable: patterns of parameter names.
        kernels: op -> implementation.
        seed: of the initial weights.
        initial: a checkpoint whose weights start the model in place of random ones.
        bucket_parameters: see ``parallel.optimizer.wrap``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parallel: ParallelConfig,
        *,
        optimizer_config: OptimizerConfig | None,
        precision: str = "fp32",
        recompute: str = "none",
        trainable: Sequence[str] = ("*",),
        kernels: dict[str, str] | None = None,
        seed: int = 1,
        initial: str = "",
        bucket_parameters: int | None = None,
    ) -> None:
        check_patterns(spec, trainable=trainable, rates=optimizer_config.rates if optimizer_config else ())
        self.backend = backend.current()
        registry.check(kernels or {}, self.backend.device)
        self.spec, self.parallel, self.optimizer_config = spec, parallel, optimizer_config
        self.groups = groups.initialize(parallel, seed=seed)
        dtype = DTYPES[precision]
        self.config = transformer_config(
            spec, parallel, dtype=dtype, frees_sent_outputs=self.backend.keeps_sent_tensors
        )
        build = Build(
            spec=spec,
            layout=Layout(tp=self.groups.tp, sequence_parallel=self.config.sequence_parallel),
            device=self.backend.device,
            kernels=kernels or {},
            experts=ExpertLayout(self.groups.ep, self.groups.etp, parallel.dispatch),
            selective_recompute=recompute == "selective",
            moe_recompute=recompute == "moe",
        )
        self.stages = build_stages(
            build,
            config=self.config,
            groups=self.groups,
            layers_per_stage=layout(parallel, len(spec.layers)),
            recompute_blocks=recompute == "full",
            dtype=dtype,
        )
        for stage in self.stages:
            stage.to(self.backend.device)
        self.routed = RoutedLayers(self.stages, self.groups, own_rows=self.config.sequence_parallel)
        if initial:
            fresh = is_factor if check_same_model(initial, spec, starts=True) else None
            if fresh is not None:
                initialize.initialize_weights(self.stages, spec, self.groups, seed=seed, only=fresh)
            checkpoint.load_weights(initial, self.stages, self.groups, without=fresh)
        else:
            initialize.initialize_weights(self.stages, spec, self.groups, seed=seed)
        optimizer.freeze(self.stages, trainable)
        self.wrapped: Sequence[Any] = self.stages
        self.overlap = parallel.overlap and optimizer_config is not None
        self._checked = False
        self._bucket_parameters = bucket_parameters
        self.saves = checkpoint.Saves()
        self.optimizer: Any = None
        if optimizer_config is not None:
            self._started, self._computed = self.backend.event(), self.backend.event()
            self.wrapped = optimizer.wrap(
                self.stages,
                self.config,
                overlap=self.overlap,
                bucket_parameters=bucket_parameters,
                on_computed=self._computed.record,
            )
            self.optimizer = optimizer.make_optimizer(self.wrapped, self.config, optimizer_config, overlap=self.overlap)

    def close(self) -> None:
        """Close the groups, so that another engine can be made in this process; this one is of no use any more."""
        if self.optimizer is not None:
            optimizer.release(self.wrapped)
        groups.destroy()

    def forward_backward(
        self, microbatches: Sequence[Microbatch], *, whole_gradients: bool = False, backward: bool = True
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Gradients of the sum of the micro-batches' losses, summed over dp.

        Args:
            microbatches: on the device, of equal T; their loss weights are divided by the global sum already.
            whole_gradients: leave whole gradients on every dp rank (tests, tools).

        Returns:
            On the last stage (loss, [M] sums of cross-entropies by modality) per micro-batch, on the device.
        """

        def forward(batch: Microbatch, stage: Any) -> tuple[torch.Tensor, dict[str, Any]]:
            output, cross_entropy = stage(batch)
            if cross_entropy is None:
                return output, {}
            by_modality = torch.stack([part.sum() for part in cross_entropy.split(batch.loss_counts)])
            return output, {"result": (output.detach(), by_modality)}

        if backward:
            for stage in self.wrapped:
                stage.zero_grad_buffer()
            self.optimizer.zero_grad()
            self.routed.forget()
        reports = self._run(microbatches, forward, backward=backward, whole_gradients=whole_gradients)
        return [report["result"] for report in reports]

    def step(
        self, microbatches: Sequence[Microbatch], *, lr: float, share: Callable[[], Sequence[float]] = tuple
    ) -> StepResult:
        """One optimizer update, left out if loss or gradient is not finite. After the first all replicas are compared.

        Collectives beside those of the model: one all-reduce of 4 (1 + M + shared) bytes over the world, which is on
        its way before the host waits for the gradient norm.

        Args:
            share: asked once this rank's part of the step is done; as many numbers on every rank, summed in fp32.
        """
        assert self.optimizer_config is not None
        optimizer.set_lr(self.optimizer, lr, self.optimizer_config)
        self._started.record()
        total = self._reduce(self.forward_backward(microbatches), share())
        grad_norm = optimizer.gradient_norm(self.optimizer)
        loss, *others = total.tolist()
        sums, shared = others[: len(self.spec.modalities)], others[len(self.spec.modalities) :]
        applied = math.isfinite(loss) and math.isfinite(grad_norm)
        if applied:
            optimizer.update(self.optimizer, grad_norm)
        self.routed.end_step(applied=applied)
        if not self._checked:
            self.check_replicas()
            self._checked = True
        return StepResult(
            loss=loss,
            sums=tuple(sums),
            grad_norm=grad_norm,
            applied=applied,
            shared=tuple(shared),
            own_seconds=self._started.elapsed_time(self._computed) / 1e3,
        )

    def evaluate(self, microbatches: Sequence[Microbatch]) -> tuple[float, ...]:
        """(loss, sum of cross-entropies of each modality) without gradients."""
        with torch.no_grad():
            return self.reduce_results(self.forward_backward(microbatches, backward=False))

    def logits(self, microbatches: Sequence[Microbatch]) -> list[torch.Tensor]:
        """fp32 logits [T, rows of the file] of every micro-batch in modality order, on the last stage; else empty."""

        def forward(batch: Microbatch, stage: Any) -> tuple[torch.Tensor, dict[str, Any]]:
            output, logits = stage(batch, logits=True)
            return output, {} if logits is None else {"logits": logits}

        with torch.no_grad():
            return [report["logits"] for report in self._run(microbatches, forward, backward=False)]

    def reduce_results(self, results: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, ...]:
        """Sum (loss, sums by modality) over micro-batches and dp, for all ranks to see. One host sync."""
        return tuple(self._reduce(results, ()).tolist())

    def _reduce(self, results: Sequence[tuple[torch.Tensor, torch.Tensor]], shared: Sequence[float]) -> torch.Tensor:
        """fp32 [1 + M + shared], on the device: not read, so that the host need not wait."""
        own = torch.zeros(1 + len(self.spec.modalities), dtype=torch.float32, device=self.backend.device)
        if self.groups.tp.rank() == 0:
            for loss, sums in results:
                own += torch.cat([loss.reshape(1), sums]).float()
        total = torch.cat([own, self.backend.to_tensor(np.asarray(shared, dtype=np.float32))])
        dist.all_reduce(total)
        return total

    def check_replicas(self) -> None:
        """Raise unless copies of every parameter are equal bit for bit."""
        self.settle()
        replicas.check_replicas(self.stages, self.groups)

    def settle(self) -> None:
        """Make parameters readable: finish overlapped gathers."""
        optimizer.settle_parameters(self.wrapped, overlap=self.overlap)

    def gather_gradients(self) -> dict[str, torch.Tensor] | None:
        """Whole gradients by checkpoint key on rank 0, after ``forward_backward(whole_gradients=True)``."""
        return replicas.gather_tensors(self.stages, self.groups, main_grad)

    def gather_parameters(self) -> dict[str, torch.Tensor] | None:
        """Whole parameters by checkpoint key on rank 0."""
        self.settle()
        return replicas.gather_tensors(self.stages, self.groups, lambda parameter: parameter)

    def save(
        self,
        directory: str | os.PathLike[str],
        step: int,
        model: dict[str, Any],
        *,
        training: dict[str, Any] | None = None,
        form: checkpoint.Form = "reshardable",
        keep: int | None = None,
        asynchronous: bool = False,
    ) -> Path:
        """Write weights, optimizer and RNG as one step of a checkpoint. Collective over the world.

        Args:
            directory: the folder of steps.
            step: updates that were made.
            model: goes to ``model.json``: ``spec``, ``model`` and, of an imported one, ``source``.
            training: the loop's own state, plain JSON values; ``resume`` gives it back.
            form: ``checkpoint.optimizer``.
            keep: remove all but so many of the newest steps once this one is whole; None: remove none.
            asynchronous: return before the files are written; ``finish_saves`` makes the step appear.

        Returns:
            The step's folder; it appears under its name only when it is whole.

        Raises:
            CheckpointError: on every rank, if one of them could not write.
        """
        self.settle()
        return checkpoint.save_step(
            self.saves,
            self._trainee(),
            directory,
            step,
            model=model,
            training=training or {},
            form=form,
            keep=keep,
            asynchronous=asynchronous,
        )

    def finish_saves(self, *, wait: bool) -> list[Path]:
        """The asynchronous saves that became whole since the last call. Collective over the world.

        Args:
            wait: until all of them are.

        Raises:
            CheckpointError: on every rank, if one could not be written.
        """
        return self.saves.finish(wait=wait)

    def resume(self, directory: str | os.PathLike[str]) -> Resumed | None:
        """Continue from the newest whole step of a folder; None if it holds no step. Collective over the world.

        Raises:
            CheckpointError: steps are there and none can be used, or they are of another [model].
        """
        path = checkpoint.find_newest(directory)
        if path is None:
            return None
        check_same_model(str(path), self.spec)
        state = checkpoint.load_training(path, self._trainee())
        return Resumed(step=state["step"], path=path, training=state["training"])

    def _trainee(self) -> checkpoint.Trainee:
        parallel = self.parallel
        cut = {
            "world": dist.get_world_size(),
            "tp": parallel.tp,
            "pp": parallel.pp,
            "vpp": parallel.vpp,
            "layers per stage": list(layout(parallel, len(self.spec.layers))),
            "overlap": self.overlap,  # buckets, and with them the parts of dp ranks, depend on it
            "bucket": self._bucket_parameters,
        }
        cut |= {axis: size for axis in ("ep", "etp") if (size := getattr(parallel, axis)) > 1}
        return checkpoint.Trainee(self.stages, self.groups, self.optimizer, cut)

    def _run(
        self, microbatches: Sequence[Microbatch], forward: Any, *, backward: bool, whole_gradients: bool = False
    ) -> list[dict[str, Any]]:
        for stage in self.stages:
            stage.train(backward)  # noise of routers and dropout are for training alone
        return pipeline.run_schedule(
            self.wrapped,
            microbatches,
            forward,
            total_rows=sum(microbatches[0].order.counts),
            width=self.spec.width,
            backward=backward,
            whole_gradients=whole_gradients,
        )
