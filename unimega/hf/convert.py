"""A Hugging Face folder becomes a checkpoint: step 0 of a new folder of steps, there as a whole or not at all."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from unimega import backend, log
from unimega.errors import CheckpointError
from unimega.hf.folder import Weights, read_config
from unimega.hf.names import Layout, Row, table
from unimega.hf.read import Source, describe
from unimega.parallel import checkpoint

Fate = Literal["copied", "carried", "dropped"]
"""``carried``: kept for the way back, though the original never uses it."""
Report = Callable[[tuple[str, ...], str, Fate], None]
"""Called with names of tensors, the checkpoint key they become ("" if dropped) and their fate, as they are read."""
_TIMEOUT = timedelta(minutes=10)
logger = log.get(__name__)


def import_folder(
    folder: Path,
    target: Path,
    *,
    separator_ids: Sequence[int] | None = None,
    overwrite: bool = False,
    report: Report = lambda names, key, fate: None,
) -> Source:
    """Convert a folder. One process; makes a process group of size one if there is none.

    Args:
        folder: config.json and safetensors.
        target: a new folder of steps, loadable under any topology.
        separator_ids: ids of separators that count as vision, instead of the tokenizer's.
        overwrite: replace a checkpoint that is already there.
        report: hears of every tensor.

    Raises:
        CheckpointError: the folder is incomplete, at odds with its config.json or not known; the target exists.
        ConfigError: a config.json that asks for what the engine does not do.
    """
    _check_target(target, overwrite=overwrite)
    config = read_config(folder)
    source = describe(config, folder=folder, separator_ids=separator_ids)
    tensors = _read(Weights(folder), source, report)
    backend.current().init_process_group(timeout=_TIMEOUT)
    partial = target.absolute().with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        checkpoint.save_tensors(partial, tensors, metadata=_metadata(source, config))
        _put(partial, target)
    except OSError as error:
        raise CheckpointError(f"{str(target)!r} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source


def layout_of(model: dict[str, Any]) -> Layout:
    """The spelling of the folder that a checkpoint was imported from.

    Args:
        model: what the checkpoint keeps beside its weights.

    Raises:
        CheckpointError: it was not imported.
    """
    source = model.get("source")
    if not source:
        raise CheckpointError(
            "the checkpoint was not imported from a Hugging Face folder: its tensors have no original names."
        )
    return Layout(**source["layout"])


def _read(weights: Weights, source: Source, report: Report) -> dict[str, torch.Tensor]:
    names = table(source.spec, source.layout)

    def heard(row: Row) -> None:
        report(row.names, row.key, "copied" if row.used else "carried")

    tensors = names.to_engine(weights, shapes=weights.shapes, report=heard)
    for name in names.dropped(weights):
        report((name,), "", "dropped")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            logger.warning("%s has values that are not finite: the model will not train", key)
    return tensors


def _metadata(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """What stays beside the weights: the model, as builders and as run files say it, and the way back to the folder."""
    return {
        "spec": source.spec.to_dict(),
        "model": asdict(source.model),
        "source": {"layout": asdict(source.layout), "architecture": source.architecture, "config": config},
    }


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse early what could not be put there at the end."""
    if not target.name:
        raise CheckpointError(f"checkpoint {str(target)!r} has no name. Name a new folder.")
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    is_checkpoint = target.is_dir() and (target / checkpoint.LATEST_FILE).exists()
    if not is_checkpoint:
        raise CheckpointError(f"{str(target)!r} exists and is not a checkpoint. Name a new folder.")
    if not overwrite:
        raise CheckpointError(
            f"{str(target)!r} holds a checkpoint already. Name a new folder, or replace it with --overwrite."
        )


def _put(partial: Path, target: Path) -> None:
    """Give the finished folder its name; what was there is away only once the new one is in place."""
    if target.exists() and any(target.iterdir()):
        old = partial.with_name(f"{partial.name}.old")
        os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old)
    else:
        os.replace(partial, target)
