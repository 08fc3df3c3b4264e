"""Checkpoints: weights under any layout, and with optimizer and random numbers the state from which a run goes on.

A CHECKPOINT is a folder of steps (``step_folder``), or one step's folder. A step holds megatron-core's ``torch_dist``
files with one key per tensor (``placement``), ``model.json``, the description the weights belong to, ``training.json``,
where the run was, and ``manifest.json`` with size and checksum of each file; nothing is loaded before all agree.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from unimega import backend, log
from unimega.errors import CheckpointError
from unimega.parallel import placement, step_folder
from unimega.parallel.agreement import raise_everywhere
from unimega.parallel.groups import Groups
from unimega.parallel.parameter import vocabulary_rows
from unimega.parallel.pipeline import PipelineStage
from unimega.parallel.placement import STATE_PREFIX, Form
from unimega.parallel.saves import Saves, Step
from unimega.parallel.step_folder import LATEST_FILE, MODEL_FILE, damaged, read_model, resolve_step

__all__ = [
    "LATEST_FILE",
    "MODEL_FILE",
    "TRAINING_FILE",
    "Form",
    "Saves",
    "Trainee",
    "damaged",
    "find_newest",
    "load_training",
    "load_weights",
    "read_model",
    "resolve_step",
    "save_step",
    "save_tensors",
    "verify",
]

TRAINING_FILE = "training.json"
logger = log.get(__name__)


@dataclass(frozen=True)
class Trainee:
    """What a rank holds of a model that is trained."""

    stages: Sequence[PipelineStage]
    """Without their DDP wrapping, parameters in step (no gather under way)."""
    groups: Groups
    optimizer: MegatronOptimizer | None
    """None: weights alone are saved."""
    layout: Mapping[str, Any]
    """How ranks are cut up, as JSON values; random numbers and ``fast`` states load where it is the same."""


def save_step(
    saves: Saves,
    trainee: Trainee,
    directory: str | os.PathLike[str],
    step: int,
    *,
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    form: Form = "reshardable",
    keep: int | None = None,
    asynchronous: bool = False,
) -> Path:
    """Write one step. Collective over the world; see ``Engine.save``."""
    stages, groups, optimizer = trainee.stages, trainee.groups, trainee.optimizer
    tensors = placement.sharded_weights(stages, groups)
    state: dict[str, Any] = {"step": step, "optimizer": None, "training": dict(training)}
    if optimizer is not None:
        tensors += placement.sharded_optimizer(optimizer, stages, groups, form=form)
        tensors += placement.sharded_rng(_rng_states())
        state["optimizer"] = {"form": form, "steps": _optimizer_steps(optimizer), "dtype": _dtype(stages)}
        state["layout"] = dict(trainee.layout)
    documents = {MODEL_FILE: json.dumps(model, indent=1), TRAINING_FILE: json.dumps(state, indent=1)}
    return saves.save(Step(Path(directory), step, documents, keep), tensors, asynchronous=asynchronous)


def save_tensors(
    directory: str | os.PathLike[str], tensors: dict[str, torch.Tensor], *, metadata: dict[str, Any]
) -> Path:
    """Write whole tensors as step 0 of a new checkpoint. One process with a process group of size one."""
    whole = [ShardedTensor.from_rank_offsets(key, value, replica_id=0) for key, value in tensors.items()]
    return Saves().save(Step(Path(directory), 0, {MODEL_FILE: json.dumps(metadata, indent=1)}, None), whole)


def verify(step: Path) -> str | None:
    """Compare every file of a step with its manifest: the first fault, None if it is whole.

    Collective over the world if there is one: each rank reads its share of the bytes, all return the same.
    """
    if not dist.is_initialized():
        return step_folder.find_fault(step)
    mine = step_folder.shares(step, dist.get_world_size())[dist.get_rank()]
    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, step_folder.find_fault(step, mine))
    return next((fault for fault in faults if fault), None)


def find_newest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest whole step of a folder, after removing what killed saves left; None if it holds no step.

    Collective over the world. One warning says what was passed over and why.

    Raises:
        CheckpointError: steps are there, and none is whole.
    """
    directory = Path(directory)
    listing: list[Any] = [None]
    if dist.get_rank() == 0:
        step_folder.clean(directory)
        named = step_folder.read_latest(directory) if (directory / LATEST_FILE).exists() else None
        listing = [(step_folder.steps(directory), named)]
    dist.broadcast_object_list(listing)
    numbers, named = listing[0]
    said: list[str] = []
    for number in reversed(numbers):
        step = step_folder.step_folder(directory, number)
        if (fault := verify(step) or _misnamed(step, number)) is None:
            if named != step.name and not said:
                said.append(f"{directory / LATEST_FILE} {f'names {named!r}' if named is not None else 'is missing'}")
            if said and dist.get_rank() == 0:
                logger.warning("%s; going on from step %d (%s)", "; ".join(said), number, step)
            return step
        said.append(f"step {number} is not used: {step / fault}")
    if said:
        raise CheckpointError(f"{directory}: no whole checkpoint is left ({'; '.join(said)}). Name another folder.")
    if named is not None:
        raise CheckpointError(f"{directory / LATEST_FILE}: names {named!r}, and no step is there. Name another folder.")
    return None


def _misnamed(step: Path, number: int) -> str | None:
    """Whether a whole step has another one's name, by which it would be taken for newer or older than it is."""
    file = step / TRAINING_FILE
    saved = json.loads(file.read_text()).get("step", number) if file.exists() else number
    return None if saved == number else f"{TRAINING_FILE} is of step {saved}: the folder was renamed or copied"


def load_weights(
    path: str | os.PathLike[str],
    stages: Sequence[PipelineStage],
    groups: Groups,
    *,
    without: Callable[[str], bool] | None = None,
) -> None:
    """Fill the parameters, on their device, from a checkpoint of any layout. Collective over the world.

    Args:
        without: parameters, by key, that the checkpoint has not and that stay as they are; None: it has all.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape, or files are missing or damaged.
    """
    step = resolve_step(path)
    if fault := verify(step):
        raise damaged(step, fault)
    _fill(step, stages, groups, without or (lambda key: False))


def _fill(
    step: Path, stages: Sequence[PipelineStage], groups: Groups, without: Callable[[str], bool] = lambda key: False
) -> None:
    stored = _stored_shapes(step)
    weights = {key: shape for key, shape in stored.items() if not key.startswith(STATE_PREFIX)}
    wanted = placement.global_shapes(stages, groups)
    _compare(step, weights, {key: shape for key, shape in wanted.items() if not without(key)})
    _clear_added_rows(stages, groups)
    _load(step, [tensor for tensor in placement.sharded_weights(stages, groups) if not without(tensor.key)])


def load_training(step: Path, trainee: Trainee) -> dict[str, Any]:
    """Fill weights, optimizer and, under the same layout, random number generators. Collective over the world.

    Args:
        step: whole, as ``find_newest`` has seen.

    Returns:
        ``{"step": updates that were made, "training": what was handed to the save}``.

    Raises:
        CheckpointError: the step holds weights alone, or its state does not fit this run.
    """
    assert trainee.optimizer is not None
    _fill(step, trainee.stages, trainee.groups)
    state = json.loads((step / TRAINING_FILE).read_text()) if (step / TRAINING_FILE).exists() else {}
    saved = state.get("optimizer")
    if saved is None:
        raise CheckpointError(
            f"{step}: holds weights alone. A run starts from them with checkpoint.initial, and saves to another folder."
        )
    same_layout = state["layout"] == dict(trainee.layout)
    if saved["form"] == "fast" and not same_layout:
        raise CheckpointError(
            f"{step}: was saved with checkpoint.optimizer = fast under {_words(state['layout'])}, this run has "
            f"{_words(trainee.layout)}. Go on under the same layout, or save as reshardable."
        )
    if saved["dtype"] != (dtype := _dtype(trainee.stages)):
        raise CheckpointError(f"{step}: was trained in {saved['dtype']}, this run in {dtype}. Set training.precision.")
    tensors = placement.sharded_optimizer(trainee.optimizer, trainee.stages, trainee.groups, form=saved["form"])
    rng = _rng_states() if same_layout else {}
    tensors += placement.sharded_rng(rng)
    _compare_state(step, tensors)
    _load(step, tensors)
    for group in trainee.optimizer.param_groups:
        group["step"] = saved["steps"]
    if same_layout:
        _set_rng_states(rng)
    return {"step": state["step"], "training": state["training"]}


def _load(step: Path, tensors: Sequence[ShardedTensor]) -> None:
    """Read into the tensors where they lie."""
    try:
        with torch.no_grad():
            named = {str(number): tensor for number, tensor in enumerate(tensors)}
            dist_checkpointing.load(named, str(step), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # a dozen kinds, for files that change under our hands
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise damaged(step, f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}") from error


def _stored_shapes(step: Path) -> dict[str, tuple[int, ...]]:
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(step))
    except Exception as error:  # a pickle: whatever its bytes make it raise
        raise damaged(step, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return {key: tuple(value.global_shape) for key, value in stored.items()}


def _compare(step: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose weights are not those of the model, by name and global shape."""
    missing, extra = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    for what, keys in (("has no tensor", missing), ("has a tensor that the model lacks:", extra)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"{step}: {what} {min(keys)!r}{more}. Is it a checkpoint of another [model]?")
    for key, shape in sorted(wanted.items()):
        if stored[key] != shape:
            found, own = list(stored[key]), list(shape)
            raise CheckpointError(f"{step}: {key!r} is {found}, the model's is {own}. Is it of another [model]?")


def _compare_state(step: Path, tensors: Sequence[ShardedTensor]) -> None:
    """Refuse a step that lacks a state this run needs: a parameter that was frozen then."""
    stored = _stored_shapes(step)
    lacking = next((tensor.key for tensor in tensors if stored.get(tensor.key) != tuple(tensor.global_shape)), None)
    error = None
    if lacking is not None:
        error = (
            f"{step}: holds no optimizer state that fits {lacking.removeprefix(STATE_PREFIX)!r}. Go on with the same "
            "training.trainable, or start a new run with checkpoint.initial."
        )
    raise_everywhere(error, CheckpointError)


def _clear_added_rows(stages: Sequence[PipelineStage], groups: Groups) -> None:
    """Rows that make the vocabulary divisible by tp are in no file: 0."""
    with torch.no_grad():
        for stage in stages:
            for _, values in stage.weights():
                if (rows := vocabulary_rows(values)) is not None:
                    values[max(0, rows - groups.tp.rank() * values.shape[0]) :].zero_()


def _optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Updates that Adam's bias correction counts. Collective over the world: a rank without parameters has no group."""
    mine = {int(group["step"]) for group in optimizer.param_groups}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    counts = set().union(*everyone)
    assert len(counts) <= 1, f"groups of the optimizer count different steps: {counts}"
    return counts.pop() if counts else 0


def _dtype(stages: Sequence[PipelineStage]) -> str:
    """Of the parameters, e.g. bfloat16."""
    return next((str(values.dtype).removeprefix("torch.") for s in stages for _, values in s.weights()), "float32")


def _rng_states() -> dict[str, torch.Tensor]:
    """Copies of the states of all generators of this rank, uint8 on the host."""
    states = {"host": torch.default_generator.get_state(), "device": backend.current().get_rng_state()}
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.clone() for name, state in states.items()}


def _set_rng_states(states: Mapping[str, torch.Tensor]) -> None:
    torch.default_generator.set_state(states["host"])
    backend.current().set_rng_state(states["device"])
    trackers = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(trackers)


def _words(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in layout.items())
