"""A checkpoint becomes a Hugging Face folder, shard by shard: there as a whole or not at all."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import unimega
from unimega import log
from unimega.config.model import ModelSpec
from unimega.data.reader import IndexedCorpus
from unimega.data.tokenize import SpecialIds, TextTokenizer, locate
from unimega.errors import CheckpointError, DataError
from unimega.hf import export_config
from unimega.hf.export_config import CODE_FILE, Target
from unimega.hf.lora import Merged, whole_table
from unimega.hf.names import Row, Table, table
from unimega.hf.shard_file import ShardFile
from unimega.hf.stored import StoredWeights
from unimega.hf.target import EXPORT, GENERATION, MANIFEST, TOKENIZER_FOLDER, check_target, copy_tokenizer, put, sync
from unimega.parallel import step_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RUN_FILE = "run.json"
"""The resolved run beside the steps of a training."""
Progress = Callable[[int, int], None]
"""Called with bytes that are written, and with those of the whole."""
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
    merge_lora: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Convert a checkpoint. One process, without a process group; holds one tensor in memory, or one q, k and v.

    Args:
        path: a folder of steps, or one step's folder.
        target: a new folder.
        format: one of ``export_config.FORMATS``.
        dtype: one of ``DTYPES``; None: as the checkpoint stores them.
        max_shard_bytes: a file of weights is not larger, unless one tensor (or one q, k and v) is.
        tokenizer: folder whose tokenizer files are copied; None: the run's, if it can be found.
        merge_lora: add what LoRA's factors make to the weights; a checkpoint that has factors needs it.
        overwrite: replace an export that is already there.
        progress: hears of every tensor that is written.

    Raises:
        CheckpointError: the checkpoint is damaged or of a model without an export, or the target exists.
        DataError: the tokenizer's folder has none.
    """
    partial = check_target(target, EXPORT, overwrite=overwrite)
    step, found, spec, stored = open_step(path)
    keeps_factors = format == export_config.UNIMOE and not merge_lora
    if spec.lora is not None and not merge_lora and not keeps_factors:
        raise CheckpointError(
            f"{step}: its model has LoRA. Add it to the weights with --merge-lora, or write it alone with --adapter."
        )
    folder, special = (tokenizer, None) if tokenizer else _tokenizer_of_run(step)
    special = TextTokenizer(folder).special if folder else special
    kind = DTYPES[dtype] if dtype else None
    spelled = str(kind or found.dtypes.get("embedding.weight", torch.float32)).removeprefix("torch.")
    wanted = export_config.describe(spec, format=format, dtype=spelled, stored=stored, special=special)
    names = whole_table(spec, wanted.layout) if keeps_factors else table(spec, wanted.layout)
    weights = Merged(found, spec, names.rows) if merge_lora else found
    names.check_keys(weights.shapes)
    try:
        begin(partial, step, stored)
        files, size = _write_weights(partial, _shards(weights, names, kind, max_shard_bytes), weights, progress)
        if folder:
            _write_tokenizer(folder, partial, wanted)
        if wanted.needs_code:
            shutil.copyfile(Path(__file__).with_name(CODE_FILE), partial / CODE_FILE)
        _write_json(partial / GENERATION, wanted.generation)
        _write_json(partial / "config.json", wanted.config)  # last: without it nothing loads the folder
        put(partial, target)
    except OSError as error:
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


def _tokenizer_of_run(step: Path) -> tuple[Path | None, SpecialIds | None]:
    """The tokenizer's folder as the run, the import or the run's corpora name it, if it is still there.

    The special ids are known from a corpus also where the folder is gone.
    """
    run: dict[str, Any] = {}
    if (step.parent / RUN_FILE).is_file():
        run = json.loads((step.parent / RUN_FILE).read_text())
    data, start = run.get("data", {}), run.get("checkpoint", {}).get("initial")
    named = [Path(data["tokenizer"])] if data.get("tokenizer") else []
    named += [folder / TOKENIZER_FOLDER for folder in (step.parent, *([Path(start)] if start else ()))]
    for folder in named:
        if found := locate(folder):
            return found.parent, None
    for source in data.get("train", ()):
        try:
            corpus = IndexedCorpus(source["path"])
        except DataError:
            continue  # moved or removed since the training: an export does not need it
        if corpus.sidecar:
            said = corpus.sidecar["tokenizer"]
            folder = corpus.sidecar_path.parent / said.get("path", "")
            special = SpecialIds.from_sidecar(said["special"])
            found = locate(folder)
            return (found.parent if found else None), special
    return None, None


def open_step(path: Path) -> tuple[Path, StoredWeights, ModelSpec, dict[str, Any]]:
    """A whole step, its weights, its model, and all that it keeps beside them.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    step = step_folder.resolve_step(path)
    if fault := step_folder.find_fault(step):
        raise step_folder.damaged(step, fault)
    stored = step_folder.read_model(step)
    if "spec" not in stored:
        raise CheckpointError(f"{step}: describes no model. The checkpoint is of another version of unimega.")
    return step, StoredWeights(step), ModelSpec.from_dict(stored["spec"]), stored


def begin(partial: Path, step: Path, stored: dict[str, Any]) -> None:
    """A new folder that says what it is before anything else."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    said = {"unimega": unimega.__version__, "checkpoint": step.name, "spec": stored["spec"]}
    _write_json(partial / MANIFEST, said)


@dataclass(frozen=True)
class _Shard:
    """Rows of one file, each with the type that it is written in."""

    rows: tuple[tuple[Row, torch.dtype], ...]

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> type and shape."""
        return {
            name: (kind, shape) for row, kind in self.rows for name, shape in zip(row.names, row.shapes, strict=True)
        }


def _shards(weights: StoredWeights | Merged, names: Table, kind: torch.dtype | None, limit: int) -> list[_Shard]:
    """Rows in order, as many to a file as fit."""
    shards: list[list[tuple[Row, torch.dtype]]] = [[]]
    room = limit
    for row in names.rows:
        dtype = weights.dtypes[row.key] if row.statistic else kind or weights.dtypes[row.key]
        size = math.prod(row.key_shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append((row, dtype))
        room -= size
    return [_Shard(tuple(rows)) for rows in shards]


def _write_weights(
    folder: Path, shards: Sequence[_Shard], weights: StoredWeights | Merged, progress: Progress
) -> tuple[tuple[str, ...], int]:
    """All shards, and their index if there is more than one."""
    places: dict[str, str] = {}
    done, total = 0, sum(math.prod(shape) * kind.itemsize for one in shards for kind, shape in one.tensors.values())
    for number, shard in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = several if len(shards) > 1 else "model.safetensors"
        with ShardFile(folder / file, shard.tensors) as stream:
            for name, tensor in _read_parts(shard, weights):
                stream.write(name, tensor)
                done += tensor.nbytes
                progress(done, total)
        sync(folder / file)
        places |= dict.fromkeys(shard.tensors, file)
        logger.info("%s: %d tensors", file, len(shard.tensors))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    return tuple(dict.fromkeys(places.values())), total


def _read_parts(shard: _Shard, weights: StoredWeights | Merged) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file, one key of the checkpoint in memory at a time.

    Raises:
        CheckpointError: a value is too large for the type that is asked for.
    """
    for row, kind in shard.rows:
        stored = weights.read([row.key])[row.key]
        cast = stored.to(kind)
        if kind == torch.float16 != stored.dtype and bool(torch.isinf(cast).sum() != torch.isinf(stored).sum()):
            raise CheckpointError(f"--dtype='fp16': {row.key!r} has values above 65504, which become inf. Use bf16.")
        yield from zip(row.names, row.split(cast), strict=True)


def _write_tokenizer(source: Path, folder: Path, wanted: Target) -> None:
    copy_tokenizer(source, folder)
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        _write_tokenizer_config(folder, wanted)
    for path in folder.iterdir():
        sync(path)


def _write_tokenizer_config(folder: Path, wanted: Target) -> None:
    """Without it transformers looks for a tokenizer class by model type, and uni_x has none.

    Version 4 gives ``token_type_ids`` too unless told what the model takes, and then its ``generate`` refuses them.
    """
    added = json.loads((folder / "tokenizer.json").read_bytes()).get("added_tokens", [])
    contents = {token["id"]: token["content"] for token in added}
    special = {name: contents.get(wanted.config.get(f"{name}_id")) for name in ("eos_token", "pad_token")}
    known = {name: content for name, content in special.items() if content is not None}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    _write_json(folder / "tokenizer_config.json", plain | known)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
    sync(path)
