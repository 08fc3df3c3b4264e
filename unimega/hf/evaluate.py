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
from unimega.batch import Microbatch
from unimega.config import rules
from unimega.config.model import ModelSpec
from unimega.config.schema import OptimizerConfig, ParallelConfig
from unimega.errors import CheckpointError, ConfigError, DataError
from unimega.hf import router_logits
from unimega.hf.convert import layout_of
from unimega.hf.folder import in_its_words
from unimega.hf.inputs import Inputs, check_ids, microbatches
from unimega.hf.lora import whole_table
from unimega.hf.names import Table
from unimega.parallel import checkpoint
from unimega.training.engine import Engine

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compute."""

    checkpoint: str
    inputs: Inputs
    where: Path
    """The file of the inputs, for the lines about them."""
    gradients: bool
    cross_document: bool | None
    """None: as the checkpoint says."""
    parallel: ParallelConfig


def evaluate(request: Request) -> dict[str, np.ndarray] | None:
    """Run the model in fp32. Collective over the world, which it joins, and leaves if nothing goes wrong.

    Returns:
        What ``outputs`` gives, on rank 0; None elsewhere.

    Raises:
        DataError, CheckpointError, ConfigError: the inputs, the checkpoint or the layout are not possible.
    """
    if request.gradients and request.inputs.targets is None:
        raise DataError(f"{request.where}: gradients need 'labels', which are missing.")
    stored = checkpoint.read_model(request.checkpoint)
    if "spec" not in stored:
        where = f"{request.checkpoint}/{checkpoint.MODEL_FILE}"
        raise CheckpointError(f"{where}: describes no model. The checkpoint is of another version of unimega.")
    spec = ModelSpec.from_dict(stored["spec"])
    if request.cross_document is not None:
        spec = replace(spec, cross_document=request.cross_document)
    spec = _untrained(spec)
    try:
        rules.check_parallel(spec, request.parallel, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        config = (stored.get("source") or {}).get("config", {})
        raise ConfigError(in_its_words(str(error), config, of="config.json's ")) from error
    check_ids(request.inputs, rows=spec.vocabulary.rows, where=request.where)
    backend.current().init_process_group(timeout=_TIMEOUT)
    optimizer_config = OptimizerConfig() if request.gradients else None
    engine = Engine(spec, request.parallel, optimizer_config=optimizer_config, initial=request.checkpoint)
    names = whole_table(spec, layout_of(stored)) if stored.get("source") else None
    out = outputs(engine, request.inputs, names=names, gradients=request.gradients)
    engine.close()  # after an error this would wait for ranks that are gone, and hide the error
    dist.destroy_process_group()
    return out


def _untrained(spec: ModelSpec) -> ModelSpec:
    """Without what training adds to loss and gradients: dropout of factors, noise and losses of routers."""
    layers = tuple(
        replace(one, experts=replace(one.experts, noise=False, balance=0.0, z_loss=0.0)) if one.experts else one
        for one in spec.layers
    )
    return replace(spec, layers=layers, lora=replace(spec.lora, dropout=0.0) if spec.lora else None)


def outputs(
    engine: Engine,
    inputs: Inputs,
    *,
    names: Table | None,
    gradients: bool = False,
    cross_document: bool | None = None,
) -> dict[str, np.ndarray] | None:
    """Run an engine on rows of ids. Collective over the world.

    Args:
        engine: with gradient buffers, if gradients are wanted.
        names: spelling of the gradients; None: they keep their checkpoint keys.
        cross_document: None: as the engine's model says.

    Returns:
        On rank 0 (None elsewhere): ``logits`` fp32 [B, T, rows of the file] in input order, 0 on pads; with labels
        ``loss``, their mean cross-entropy; with gradients one array per tensor of the original that has one; of a
        model with routed experts ``router_logits`` and ``router_loss`` (see ``router_logits``).
    """
    groups, parallel, spec = engine.groups, engine.parallel, engine.spec
    batches = microbatches(
        inputs,
        spec if cross_document is None else replace(spec, cross_document=cross_document),
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
        out["loss"] = np.asarray(engine.reduce_results(results)[0], dtype=np.float32)
    whole = engine.gather_gradients() if gradients else None
    if whole is not None:
        named = whole if names is None else names.to_hf(whole, gradients=True)
        out |= {name: gradient.numpy() for name, gradient in named.items()}
    with router_logits.recorded(engine) as record:
        mine = engine.logits(on_device)
    logits = _gather_logits(engine, mine, on_device, inputs)
    out |= _routers(engine, record, on_device, inputs)
    return None if logits is None else {"logits": logits, **out}


def _routers(
    engine: Engine, record: router_logits.Record, batches: list[Microbatch], inputs: Inputs
) -> dict[str, np.ndarray]:
    """Of a model without routed experts nothing."""
    top_k = next((layer.experts.top_k for layer in engine.spec.layers if layer.experts), 0)
    logits = router_logits.gather(engine, record, batches, inputs) if top_k else None
    if logits is None:
        return {}
    loss = router_logits.balance_loss(logits, inputs.documents.reshape(-1) != 0, top_k=top_k)
    return {"router_logits": logits, "router_loss": loss}


def _gather_logits(
    engine: Engine, mine: list[torch.Tensor], batches: list[Microbatch], inputs: Inputs
) -> np.ndarray | None:
    """[B, T, rows] in input order on rank 0. Every row of the batch travels there alone: T*rows*4 bytes."""
    groups, rank = engine.groups, dist.get_rank()
    number, length = inputs.ids.shape
    rows = engine.spec.vocabulary.rows
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (groups.dp.rank(), groups.is_last_stage and groups.tp.rank() == 0))
    owners = {dp_rank: owner for owner, (dp_rank, has_logits) in enumerate(places) if has_logits}
    out = np.zeros((number, length, rows), np.float32) if rank == 0 else None
    for row in range(number):
        at, dp_rank = divmod(row, groups.dp.size())
        owner = owners[dp_rank]
        if rank == owner:
            logits = mine[at][batches[at].order.inverse.long()][:length].contiguous()
            if owner != 0:
                dist.send(logits, 0)
        elif rank == 0:
            logits = torch.empty(length, rows, device=engine.backend.device)
            dist.recv(logits, owner)
        if out is not None:
            out[row] = logits.cpu().numpy()
    if out is not None:
        out[inputs.documents == 0] = 0.0
    return out
