"""Weights on disk: megatron-core's ``torch_dist`` with one key per tensor, free of any layout.

A CHECKPOINT is a folder of steps (``step-00000000``) with the name of the newest in ``latest``; wherever one is read, a
step's folder is accepted too. Beside megatron-core's files a step holds ``model.json``, the description the weights
belong to. Keys are parameter names; ``gate_up`` is stored as ``gate`` and ``up``; rows that were added to divide by tp
are not stored.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from unimega.errors import CheckpointError, UnimegaError
from unimega.parallel.groups import Groups
from unimega.parallel.parameter import checkpoint_parts, sharded_dim, vocabulary_rows
from unimega.parallel.pipeline import PipelineStage

MODEL_FILE = "model.json"
LATEST_FILE = "latest"


def step_folder(directory: Path, step: int) -> Path:
    """Where a step lies in a folder of steps."""
    return directory / f"step-{step:08d}"


def resolve_step(path: str | os.PathLike[str]) -> Path:
    """The folder of one step: ``path`` itself, or what its ``latest`` names.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "metadata.json").exists():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: not there. Name a checkpoint: a folder of steps or one step's folder.")
    latest = path / LATEST_FILE
    if not latest.exists():
        raise CheckpointError(f"{path}: holds no checkpoint (no metadata.json, no {LATEST_FILE}).")
    step = path / latest.read_text(errors="replace").strip()
    if not (step / "metadata.json").exists():
        raise CheckpointError(
            f"{latest}: names {step.name}, which is not a whole checkpoint. Name another step's folder."
        )
    return step


def read_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description stored with the weights."""
    file = resolve_step(path) / MODEL_FILE
    try:
        return json.loads(file.read_text(errors="replace"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not there. The checkpoint was not written by unimega.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: damaged at line {error.lineno} ({error.msg}).") from None


def sharded_weights(stages: Sequence[PipelineStage], groups: Groups) -> dict[str, Any]:
    """By parameter name, megatron-core's description of where each tensor of this rank lies in the global one."""
    made: dict[str, Any] = {}
    for stage in stages:
        for name, values in stage.weights():
            copy = name == "embedding.weight" and not stage.pre_process
            made[name] = _sharded(name, values, groups, duplicate=int(copy))
    return made


def save_weights(
    directory: str | os.PathLike[str],
    step: int,
    stages: Sequence[PipelineStage],
    groups: Groups,
    model: dict[str, Any],
    *,
    training: dict[str, Any] | None = None,
) -> Path:
    """Write the weights of all ranks as one step. Collective over the world.

    Args:
        stages: without their DDP wrapping, parameters in step (no gather under way).
        model: goes to ``model.json``.

    Returns:
        The step's folder; it appears under its name only when it is whole.
    """
    return _save(Path(directory), step, sharded_weights(stages, groups), model, training or {})


def save_tensors(
    directory: str | os.PathLike[str], tensors: dict[str, torch.Tensor], *, metadata: dict[str, Any]
) -> Path:
    """Write whole tensors as step 0 of a new checkpoint. One process with a process group of size one."""
    whole = {key: ShardedTensor.from_rank_offsets(key, value, replica_id=0) for key, value in tensors.items()}
    return _save(Path(directory), 0, whole, metadata, {})


def load_weights(path: str | os.PathLike[str], stages: Sequence[PipelineStage], groups: Groups) -> None:
    """Fill the parameters, on their device, from a checkpoint of any layout. Collective over the world.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape, or files are missing or damaged.
    """
    step = resolve_step(path)
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(step))
        _compare_tensors(step, {key: tuple(value.global_shape) for key, value in stored.items()}, stages, groups)
        with torch.no_grad():
            loaded = dist_checkpointing.load(sharded_weights(stages, groups), str(step))
            for stage in stages:
                for name, values in stage.weights():
                    values.copy_(loaded[name])
    except UnimegaError:
        raise
    except (Exception, CheckpointException) as error:  # a dozen kinds, for files that are damaged or gone
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise CheckpointError(f"{step}: cannot be read, it is damaged or not whole ({reason}).") from error


def _save(directory: Path, step: int, state: dict[str, Any], model: dict[str, Any], training: dict[str, Any]) -> Path:
    final = step_folder(directory, step)
    temporary = final.with_name(final.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        (temporary / MODEL_FILE).write_text(json.dumps(model, indent=1))
        (temporary / "training.json").write_text(json.dumps({"step": step, "training": training}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        latest = directory / LATEST_FILE
        latest.with_suffix(".tmp").write_text(final.name)
        os.replace(latest.with_suffix(".tmp"), latest)
    dist.barrier()
    return final


def _sharded(key: str, values: torch.Tensor, groups: Groups, *, duplicate: int) -> Any:
    tp, dim = groups.tp, sharded_dim(values)
    replica = (duplicate, 0 if dim is not None else tp.rank(), groups.dp.rank())
    rows = vocabulary_rows(values)
    if rows is not None:
        return _vocabulary_factory(key, values, rows, replica, groups)
    if ".gate_up." in key:
        return _halves_factory(key, values, replica, groups)
    offsets = [(dim, tp.rank(), tp.size())] if dim is not None else []
    return ShardedTensor.from_rank_offsets(key, values.detach(), *offsets, replica_id=replica)


def _halves_factory(key: str, values: torch.Tensor, replica: tuple[int, int, int], groups: Groups) -> Any:
    tp = groups.tp

    def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(part, half, (0, tp.rank(), tp.size()), replica_id=replica_id)
            for part, half in checkpoint_parts(key, data).items()
        ]

    return ShardedTensorFactory(key, values.detach(), build, torch.cat, replica)


def _vocabulary_factory(
    key: str, values: torch.Tensor, rows: int, replica: tuple[int, int, int], groups: Groups
) -> Any:
    """Rows of the file only. ``torch_dist`` wants equal cuts: if tp does not divide them, each rank describes all."""
    tp = groups.tp
    local = values.shape[0]
    start = tp.rank() * local

    def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> ShardedTensor:
        if rows == local * tp.size():
            return ShardedTensor.from_rank_offsets(key, data, (0, tp.rank(), tp.size()), replica_id=replica_id)
        whole = data.new_empty(local * tp.size(), *data.shape[1:])
        dist.all_gather_into_tensor(whole, data.contiguous(), group=tp)
        copies = (replica_id[0], tp.rank(), replica_id[2])
        return ShardedTensor.from_rank_offsets(key, whole[:rows].contiguous(), replica_id=copies)

    def merge(loaded: torch.Tensor) -> torch.Tensor:
        if rows == local * tp.size():
            return loaded
        mine = loaded.new_zeros(local, *loaded.shape[1:])
        there = loaded[start : min(start + local, rows)]
        mine[: len(there)] = there
        return mine

    return ShardedTensorFactory(key, values.detach(), build, merge, replica)


def _compare_tensors(
    step: Path, stored: dict[str, tuple[int, ...]], stages: Sequence[PipelineStage], groups: Groups
) -> None:
    """Refuse a checkpoint whose weights are not those of the model, by name and global shape."""
    everyone: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(everyone, _global_shapes(stages, groups), group=groups.pp)
    wanted = {key: shape for shapes in everyone for key, shape in shapes.items()}
    stored = {key: shape for key, shape in stored.items() if not key.startswith("optimizer.")}
    missing, extra = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    for what, keys in (("has no tensor", missing), ("has a tensor that the model lacks:", extra)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"{step}: {what} {min(keys)!r}{more}. Is it a checkpoint of another [model]?")
    for key, shape in sorted(wanted.items()):
        if stored[key] != shape:
            found, own = list(stored[key]), list(shape)
            raise CheckpointError(f"{step}: {key!r} is {found}, the model's is {own}. Is it of another [model]?")


def _global_shapes(stages: Sequence[PipelineStage], groups: Groups) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for stage in stages:
        for name, values in stage.weights():
            for key, part in checkpoint_parts(name, values).items():
                shape = list(part.shape)
                if (dim := sharded_dim(values)) is not None:
                    shape[dim] *= groups.tp.size()
                if (rows := vocabulary_rows(values)) is not None:
                    shape[0] = rows
                shapes[key] = tuple(shape)
    return shapes
