"""Whether the weights of a checkpoint mean in this model what they meant in theirs."""

from dataclasses import replace
from typing import Any

from unimega import log
from unimega.config.model import ModelSpec
from unimega.errors import CheckpointError
from unimega.parallel import checkpoint

logger = log.get(__name__)


def check_same_model(path: str, spec: ModelSpec, *, starts: bool = False) -> bool:
    """Compare the description beside the weights: shapes alone do not tell 2 heads of 24 from 4 of 12.

    What may well be changed on purpose (RoPE base, epsilon, initial values) is only logged.

    Args:
        starts: the weights start a run, whose model may have LoRA where theirs has none.

    Returns:
        Whether the factors of LoRA are not there and start fresh.

    Raises:
        CheckpointError: the weights mean something else in this model; names the first field.
    """
    stored = checkpoint.read_model(path).get("spec")
    if stored is None:
        return False
    theirs, ours = (_of_inference(one).to_dict() for one in (ModelSpec.from_dict(stored), spec))
    for key in ("heads", "kv_heads", "head_width", "qk_norm", "tied", "skip", "layers"):
        if theirs[key] != ours[key]:
            found = "other layers" if key == "layers" else f"{key}={theirs[key]}, the run {ours[key]}"
            raise CheckpointError(f"{path}: the checkpoint's model has {found}. Make [model] agree with it.")
    for key in ("starts", "rows"):
        if theirs["vocabulary"][key] != ours["vocabulary"][key]:
            found = f"{theirs['vocabulary'][key]}, the run has {ours['vocabulary'][key]}"
            raise CheckpointError(f"{path}: {key} of the checkpoint's vocabulary: {found}. Make [model] agree with it.")
    fresh = starts and theirs["lora"] is None and ours["lora"] is not None
    if fresh:
        logger.info("%s has no LoRA: its factors start fresh, B at zero", path)
    else:
        _check_lora(path, theirs["lora"], ours["lora"])
    for key in ("rope_theta", "norm_eps", "cross_document"):
        if theirs[key] != ours[key]:
            logger.warning("%s was trained with %s=%s, this run has %s", path, key, theirs[key], ours[key])
    return fresh


def _of_inference(spec: ModelSpec) -> ModelSpec:
    """Without what only training asks of routed experts: losses, noise, capacity may change from run to run."""
    layers = (
        replace(one, experts=one.experts.of_inference()) if one.experts is not None else one for one in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def _check_lora(path: str, theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> None:
    """Refuse other factors, or factors on one side alone; dropout is the run's own."""
    if theirs is None and ours is None:
        return
    if theirs is None:
        raise CheckpointError(
            f"{path}: the checkpoint's model has no LoRA, the run's has. Take model.lora away, or start another run "
            "with checkpoint.initial."
        )
    if ours is None:
        raise CheckpointError(
            f"{path}: the checkpoint's model has LoRA of rank {theirs['rank']}, the run's has none. Set model.lora as "
            "it was, or merge it (tools/export_hf.py --merge-lora) and import that."
        )
    for key in ("rank", "alpha", "match"):
        if theirs[key] != ours[key]:
            was, now = (list(one[key]) if key == "match" else one[key] for one in (theirs, ours))
            raise CheckpointError(f"{path}: the checkpoint has model.lora.{key}={was}, the run {now}. Make them agree.")
