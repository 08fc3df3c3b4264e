"""A Hugging Face folder becomes a checkpoint: step 0 of a new folder of steps, there as a whole or not at all."""

import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unimega import log
from unimega.config.schema import ModelConfig
from unimega.errors import CheckpointError
from unimega.hf import start_weights
from unimega.hf.fate import Fate
from unimega.hf.folder import read_config, read_json
from unimega.hf.fused import Tensors
from unimega.hf.layout import Layout
from unimega.hf.lora import whole_table
from unimega.hf.model_table import model_table
from unimega.hf.names import Row
from unimega.hf.read import Source
from unimega.hf.start import Start
from unimega.hf.stored import Unmade, write_step
from unimega.hf.target import CHECKPOINT, GENERATION, TOKENIZER_FOLDER, check_target, copy_tokenizer, put
from unimega.hf.weights import Weights

MODEL_TABLE = "model.toml"
"""In the folder of steps: the ``[model]`` of a run that trains it."""
Progress = Callable[[int, int], None]
"""Called with bytes that are written, and with those of the whole."""
_NOT_USED = "frozen: the original never uses it"
logger = log.get(__name__)


@dataclass(frozen=True)
class Part:
    """One key of the checkpoint to be, and what becomes of tensors of the folder there."""

    key: str
    tensor: Unmade
    fates: tuple[Fate, ...]


def import_folder(
    folder: Path,
    target: Path,
    *,
    what: Source | Start,
    tokenizer: Path | None = None,
    seed: int = 1,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Fate]:
    """Convert a folder. One process; holds one tensor in memory, beside files that the system maps.

    Args:
        folder: config.json and safetensors.
        target: a new folder of steps, loadable under any layout.
        what: the folder's model as it is, or the model that it starts.
        tokenizer: folder whose tokenizer goes along.
        seed: of what is drawn.
        overwrite: replace a checkpoint that is already there.
        progress: hears of every tensor that is written.

    Returns:
        What became of every tensor.

    Raises:
        CheckpointError: the folder is incomplete or at odds with its config.json; the target exists.
    """
    partial = check_target(target, CHECKPOINT, overwrite=overwrite)
    base, source = (what.base, what.source) if isinstance(what, Start) else (what, what)
    weights = Tensors(Weights(folder), base.layout.family)
    names = whole_table(base.spec, base.layout)
    names.check_folder(weights, shapes=weights.shapes)
    _warn_of_mixed(names.rows, weights, folder)
    if isinstance(what, Start):
        parts = [_started(recipe, weights, what, seed) for recipe in start_weights.recipes(what)]
    else:
        parts = [_copied(row, weights) for row in names.rows]
    write_checkpoint(
        target,
        parts,
        partial=partial,
        metadata=_metadata(what, read_config(folder), _generation(folder)),
        model=source.model,
        tokenizer=tokenizer,
        config=folder / "config.json",
        progress=progress,
    )
    dropped = [Fate("dropped", (name,), "", names.why_dropped(name)) for name in names.dropped(weights.shapes)]
    return [fate for part in parts for fate in part.fates] + dropped


def write_checkpoint(
    target: Path,
    parts: Sequence[Part],
    *,
    partial: Path,
    metadata: dict[str, Any],
    model: ModelConfig,
    tokenizer: Path | None,
    config: Path | None,
    progress: Progress,
) -> None:
    """Make and write one tensor after another as step 0 of a new folder of steps.

    Args:
        partial: where ``check_target`` said to write.
        metadata: goes to ``model.json``.
        model: the ``[model]`` of a run that trains it.
        tokenizer: folder whose files go along.
        config: file that tells the rows of the tokenizer's model, beside those files.

    Raises:
        CheckpointError: the disk does not take it.
    """
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        write_step(partial, _watched(parts, progress), metadata=metadata)
        (partial / MODEL_TABLE).write_text(model_table(model))
        if tokenizer:
            (partial / TOKENIZER_FOLDER).mkdir()
            copy_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
            if config is not None:
                shutil.copyfile(config, partial / TOKENIZER_FOLDER / "config.json")
        put(partial, target)
    except OSError as error:
        raise CheckpointError(f"{str(target)!r} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _copied(row: Row, weights: Tensors) -> Part:
    """A key that the folder's tensors fill."""
    note = weights.note(row.names[0])
    fate = Fate("copied", row.names, row.key, note) if row.used else Fate("carried", row.names, row.key, _NOT_USED)
    tensor = Unmade(
        shape=row.key_shape,
        dtype=_dtype(row.names, weights),
        make=lambda: row.join([weights[name] for name in row.names]),
    )
    return Part(row.key, tensor, (fate,))


def _started(recipe: start_weights.Recipe, weights: Tensors, start: Start, seed: int) -> Part:
    """A key of a model that the folder starts."""
    names = recipe.row.names if recipe.row else ()
    dtype = _dtype(names or ("model.embed_tokens.weight",), weights)

    def make() -> torch.Tensor:
        return start_weights.make(recipe, [weights[name] for name in names], start, dtype=dtype, seed=seed)

    is_new = not names or (recipe.how == "rows" and recipe.note)
    fates = [Fate("copied", names, recipe.key, "" if is_new else recipe.note)] if names else []
    fates += [Fate("initialised", (), recipe.key, recipe.note)] if is_new else []
    return Part(recipe.key, Unmade(shape=recipe.shape, dtype=dtype, make=make), tuple(fates))


def _dtype(names: Iterable[str], weights: Tensors) -> torch.dtype:
    """Of tensors that are joined."""
    first, *others = (weights.dtypes[name] for name in names)
    for one in others:
        first = torch.promote_types(first, one)
    return first


def _warn_of_mixed(rows: Sequence[Row], weights: Tensors, folder: Path) -> None:
    """One line on tensors that are joined and differ in type: no value is rounded, but some take more room."""
    mixed = [row for row in rows if len({weights.dtypes[name] for name in row.names}) > 1]
    if mixed:
        kinds = sorted({str(weights.dtypes[name]).removeprefix("torch.") for name in mixed[0].names})
        logger.warning(
            "%s: what %s%s is made of is %s: %s is taken, which holds all values",
            folder,
            mixed[0].key,
            f" (and {len(mixed) - 1} more)" if len(mixed) > 1 else "",
            " and ".join(kinds),
            str(_dtype(mixed[0].names, weights)).removeprefix("torch."),
        )


def _watched(parts: Sequence[Part], progress: Progress) -> dict[str, Unmade]:
    """The tensors, heard of when they are made, and looked at."""
    sizes = {part.key: torch.Size(part.tensor.shape).numel() * part.tensor.dtype.itemsize for part in parts}
    done, total = 0, sum(sizes.values())

    def make(part: Part) -> torch.Tensor:
        nonlocal done
        tensor = part.tensor.make()
        if not torch.isfinite(tensor).all():
            logger.warning("%s has values that are not finite: the model will not train", part.key)
        done += sizes[part.key]
        progress(done, total)
        return tensor

    return {
        part.key: Unmade(shape=part.tensor.shape, dtype=part.tensor.dtype, make=functools.partial(make, part))
        for part in parts
    }


def _generation(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json, which few models need."""
    path = folder / GENERATION
    return read_json(path) if path.exists() else {}


def _metadata(what: Source | Start, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """What stays beside the weights: the model, as builders and as run files say it, and the way back to the folder."""
    source = what.source if isinstance(what, Start) else what
    if isinstance(what, Start) and what.vision_start is not None:
        config = config | {"vision_start_id": what.vision_start}
    return {
        "spec": source.spec.to_dict(),
        "model": asdict(source.model),
        "source": {
            "layout": asdict(source.layout),
            "architecture": source.architecture,
            "config": config,
            "generation": generation,
        },
    }
