"""Logits, loss and gradients of a checkpoint under any layout, with original names: how a port is checked."""

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from unimega import backend
from unimega.config import rules, strict
from unimega.config.model import ModelSpec
from unimega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from unimega.errors import CheckpointError, DataError
from unimega.hf.convert import layout_of
from unimega.hf.inputs import Inputs, check_ids, microbatches, read_inputs
from unimega.hf.names import table
from unimega.parallel import checkpoint
from unimega.training.engine import Engine

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compute."""

    checkpoint: str
    inputs: Path
    gradients: bool
    cross_document: bool | None
    """None: as the checkpoint says."""
    parallel: ParallelConfig


def evaluate(request: Request) -> dict[str, np.ndarray] | None:
    """Run the model in fp32. Collective over the world, which it joins.

    Returns:
        On rank 0 (None elsewhere): ``logits`` fp32 [B, T, rows of the file] in input order, 0 on pads; with labels
        ``loss``, their mean cross-entropy; with gradients one array per tensor of the original that has one.

    Raises:
        DataError, CheckpointError, ConfigError: the inputs, the checkpoint or the layout are not possible.
    """
    inputs = read_inputs(request.inputs)
    if request.gradients and inputs.targets is None:
        raise DataError(f"{request.inputs}: gradients need 'labels', which are missing.")
    stored = checkpoint.read_model(request.checkpoint)
    spec = _spec(stored, request, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    check_ids(inputs, rows=spec.vocabulary.rows, where=request.inputs)
    backend.current().init_process_group(timeout=_TIMEOUT)
    engine = Engine(
        spec,
        request.parallel,
        optimizer_config=OptimizerConfig() if request.gradients else None,
        initial=request.checkpoint,
    )
    try:
        return _run(engine, inputs, stored, gradients=request.gradients)
    finally:
        engine.close()


def _spec(stored: dict[str, Any], request: Request, *, world_size: int) -> ModelSpec:
    """The model of the checkpoint, after a check that the layout can hold it."""
    where = f"{request.checkpoint}/{checkpoint.MODEL_FILE}"
    if "spec" not in stored or "model" not in stored:
        raise CheckpointError(f"{where}: describes no model. The checkpoint is of another version of unimega.")
    model = strict.construct(ModelConfig, strict.partial(ModelConfig, stored["model"], where=where), where=where)
    rules.check_parallel(model, request.parallel, world_size=world_size)
    spec = ModelSpec.from_dict(stored["spec"])
    return spec if request.cross_document is None else replace(spec, cross_document=request.cross_document)


def _run(engine: Engine, inputs: Inputs, stored: dict[str, Any], *, gradients: bool) -> dict[str, np.ndarray] | None:
    groups, parallel = engine.groups, engine.parallel
    batches = microbatches(
        inputs,
        engine.spec,
        tp_rank=groups.tp.rank(),
        tp=groups.tp.size(),
        sequence_parallel=parallel.sequence_parallel,
        dp_rank=groups.dp.rank(),
        dp=groups.dp.size(),
        multiple=parallel.pp if parallel.vpp > 1 else 1,
    )
    on_device = [backend.to_device(batch) for batch in batches]
    out: dict[str, np.ndarray] = {}
    if inputs.targets is not None:
        results = engine.forward_backward(on_device, whole_gradients=gradients, backward=gradients)
        out["loss"] = np.float32(engine.reduce_results(results)[0])
    if gradients:
        whole = engine.gather_gradients()
        if whole is not None:
            out |= {name: gradient.numpy() for name, gradient in _original_names(whole, engine.spec, stored).items()}
    logits = _gather_logits(engine, on_device, inputs)
    return None if logits is None else {"logits": logits, **out}


def _original_names(whole: dict[str, torch.Tensor], spec: ModelSpec, stored: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Checkpoint keys become names of the folder; a model that came from none keeps its keys."""
    return table(spec, layout_of(stored)).to_hf(whole, gradients=True) if stored.get("source") else whole


def _gather_logits(engine: Engine, batches: list[Any], inputs: Inputs) -> np.ndarray | None:
    """[B, T, rows] in input order on rank 0. Sends T*rows*4 bytes per row of the batch to it."""
    groups = engine.groups
    number, length = inputs.ids.shape
    owns = groups.is_last_stage and groups.tp.rank() == 0
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (groups.dp.rank(), owns))
    owners = {dp_rank: rank for rank, (dp_rank, owner) in enumerate(places) if owner}
    mine = engine.logits(batches)
    rank = dist.get_rank()
    out = np.zeros((number, length, engine.spec.vocabulary.rows), np.float32) if rank == 0 else None
    for row in range(number):
        round_, owner = divmod(row, groups.dp.size())[0], owners[row % groups.dp.size()]
        logits = mine[round_][batches[round_].order.inverse.long()][:length].contiguous() if rank == owner else None
        if owner != 0 and rank == owner:
            dist.send(logits, 0)
        elif owner != 0 and rank == 0:
            logits = torch.empty(length, engine.spec.vocabulary.rows, device=engine.backend.device)
            dist.recv(logits, owner)
        if out is not None:
            out[row] = logits.cpu().numpy()
    if out is not None:
        out[inputs.documents == 0] = 0.0
    return out
