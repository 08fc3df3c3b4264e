"""A checkpoint becomes a Hugging Face folder, shard by shard: there as a whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import unimega
from unimega import log
from unimega.config.model import ModelSpec
from unimega.data.reader import IndexedCorpus
from unimega.data.tokenize import SpecialIds, TextTokenizer
from unimega.errors import CheckpointError, DataError
from unimega.hf import export_config
from unimega.hf.export_config import CODE_FILE, Target
from unimega.hf.names import Row, Table, table
from unimega.hf.stored import StoredWeights, open_step
from unimega.parallel import checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MANIFEST, RUN_FILE = "unimega.json", "run.json"
"""What says that a folder is an export of ours; the resolved run beside the steps of a training."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
logger = log.get(__name__)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    model_type: str
    needs_code: bool
    tensors: int
    bytes: int
    files: tuple[str, ...]
    tokenizer: Path | None
    """Where its files came from."""


def export_checkpoint(
    path: Path,
    target: Path,
    *,
    format: str = "auto",
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Convert a checkpoint. One process, without a process group; holds one shard in memory.

    Args:
        path: a folder of steps, or one step's folder.
        target: a new folder.
        format: one of ``export_config.FORMATS``.
        dtype: one of ``DTYPES``; None: as the checkpoint stores them.
        max_shard_bytes: a file of weights is not larger, unless one tensor (or one q, k and v) is.
        tokenizer: folder whose tokenizer files are copied; None: the run's, if it can be found.
        overwrite: replace an export that is already there.

    Raises:
        CheckpointError: the checkpoint is damaged or of a model without an export, or the target exists.
        DataError: the tokenizer's folder has none.
    """
    partial = _check_target(target, overwrite=overwrite)
    step, weights = open_step(path)
    stored = checkpoint.read_model(step)
    if "spec" not in stored:
        raise CheckpointError(f"{step}: describes no model. The checkpoint is of another version of unimega.")
    spec = ModelSpec.from_dict(stored["spec"])
    folder, special = (tokenizer, None) if tokenizer else _tokenizer_of_run(step, stored)
    special = TextTokenizer(folder).special if folder else special
    kind = DTYPES[dtype] if dtype else weights.dtypes.get("embedding.weight", torch.float32)
    spelled = str(kind).removeprefix("torch.")
    wanted = export_config.describe(spec, format=format, dtype=spelled, stored=stored, special=special)
    names = table(spec, wanted.layout)
    names.check_keys(weights.shapes)
    try:
        _begin(partial, step, stored)
        files, size = _write_weights(partial, weights, names, kind, max_shard_bytes)
        if folder:
            _copy_tokenizer(folder, partial, wanted)
        if wanted.needs_code:
            shutil.copyfile(Path(__file__).with_name(CODE_FILE), partial / CODE_FILE)
        _write_json(partial / "generation_config.json", wanted.generation)
        _write_json(partial / "config.json", wanted.config)  # last: without it nothing loads the folder
        _finish(partial, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{str(target)!r} cannot be written: {error}.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    count = sum(len(row.names) for row in names.rows)
    return Exported(
        model_type=wanted.model_type,
        needs_code=wanted.needs_code,
        tensors=count,
        bytes=size,
        files=files,
        tokenizer=folder,
    )


def _check_target(target: Path, *, overwrite: bool) -> Path:
    """Refuse early what could not be put there at the end; where to write until then."""
    if not target.name:
        raise CheckpointError(f"OUT={str(target)!r} has no name. Name a new folder.")
    partial = target.absolute().with_name(f"{target.name}.tmp")
    if os.path.lexists(partial) and not (partial / MANIFEST).is_file():
        raise CheckpointError(
            f"{str(partial)!r} is in the way and is not of a killed export. Move it, or name another."
        )
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return partial
    if not (target / MANIFEST).is_file():
        raise CheckpointError(f"{str(target)!r} exists and is not an export. Name a new folder.")
    if not overwrite:
        raise CheckpointError(f"{str(target)!r} holds an export already. Name a new folder, or give --overwrite.")
    return partial


def _tokenizer_of_run(step: Path, stored: dict[str, Any]) -> tuple[Path | None, SpecialIds | None]:
    """The tokenizer's folder as the checkpoint, its run or the run's corpora name it, if it is still there.

    The special ids are known from a corpus also where the folder is gone.
    """
    run: dict[str, Any] = {}
    if (step.parent / RUN_FILE).is_file():
        run = json.loads((step.parent / RUN_FILE).read_text())
    data = run.get("data", {})
    for named in (stored.get("tokenizer"), data.get("tokenizer")):
        if named and (Path(named) / "tokenizer.json").is_file():
            return Path(named), None
    for source in data.get("train", ()):
        try:
            corpus = IndexedCorpus(source["path"])
        except DataError:
            continue  # moved or removed since the training: an export does not need it
        if corpus.sidecar:
            said = corpus.sidecar["tokenizer"]
            folder = corpus.sidecar_path.parent / said.get("path", "")
            special = SpecialIds.from_sidecar(said["special"])
            return (folder if (folder / "tokenizer.json").is_file() else None), special
    return None, None


def _begin(partial: Path, step: Path, stored: dict[str, Any]) -> None:
    """A new folder that says what it is before anything else."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    said = {"unimega": unimega.__version__, "checkpoint": step.name, "spec": stored["spec"]}
    _write_json(partial / MANIFEST, said)


def _write_weights(
    folder: Path, weights: StoredWeights, names: Table, kind: torch.dtype, limit: int
) -> tuple[tuple[str, ...], int]:
    """All shards, and their index if there is more than one."""
    shards = list(_shards(names.rows, kind.itemsize, limit))
    single = len(shards) == 1
    places: dict[str, str] = {}
    total = 0
    for number, rows in enumerate(shards, 1):
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        read = weights.read([row.key for row in rows])
        tensors: dict[str, torch.Tensor] = {}
        for row in rows:
            parts = row.split(read.pop(row.key).to(kind))
            tensors |= dict(zip(row.names, parts, strict=True))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / MANIFEST, folder / file)  # safetensors lets its user alone read it
        _sync(folder / file)
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        logger.info("%s: %d tensors", file, len(tensors))
    if not single:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    return tuple(dict.fromkeys(places.values())), total


def _shards(rows: Sequence[Row], itemsize: int, limit: int) -> Iterator[list[Row]]:
    """Rows in order, as many to a file as fit."""
    shard: list[Row] = []
    room = limit
    for row in rows:
        size = itemsize
        for length in row.key_shape:
            size *= length
        if shard and size > room:
            yield shard
            shard, room = [], limit
        shard.append(row)
        room -= size
    yield shard


def _copy_tokenizer(source: Path, folder: Path, wanted: Target) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            _sync(folder / name)
    if (folder / "tokenizer_config.json").exists():
        return
    # without it transformers looks for a tokenizer class by model type, and uni_x has none
    added = json.loads((folder / "tokenizer.json").read_bytes()).get("added_tokens", [])
    contents = {token["id"]: token["content"] for token in added}
    special = {name: contents.get(wanted.generation[f"{name}_id"]) for name in ("eos_token", "pad_token")}
    known = {name: content for name, content in special.items() if content is not None}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **known})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
    _sync(path)


def _sync(path: Path) -> None:
    """Make a file or the names in a folder survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish(partial: Path, target: Path) -> None:
    """Give the folder its name; what was there is away only once the new one is in place."""
    _sync(partial)
    old = partial.with_name(f"{target.name}.old-{os.getpid()}")
    replaced = target.exists() and any(target.iterdir())
    if replaced:
        os.replace(target, old)
    os.replace(partial, target)
    _sync(target.absolute().parent)
    if replaced:
        shutil.rmtree(old)
