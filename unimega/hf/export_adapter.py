"""The factors of LoRA become a PEFT folder: there as a whole or not at all."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unimega import log
from unimega.config.model import ModelSpec
from unimega.errors import CheckpointError
from unimega.hf import export_config
from unimega.hf.export import DTYPES, Exported, begin, open_step
from unimega.hf.lora import check_factors, factor_rows, linear_of
from unimega.hf.names import Row, table
from unimega.hf.shard_file import ShardFile
from unimega.hf.target import EXPORT, check_target, put, sync

logger = log.get(__name__)
ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model that it wraps."""


def export_adapter(
    path: Path, target: Path, *, format: str = "auto", dtype: str | None = None, overwrite: bool = False
) -> Exported:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.from_pretrained`` reads them.

    Args:
        path: a folder of steps, or one step's folder.
        target: a new folder.
        format: of the model that it is an adapter of, as in ``export_checkpoint``.
        dtype: one of ``DTYPES``; None: as the checkpoint stores them.
        overwrite: replace an export that is already there.

    Raises:
        CheckpointError: the checkpoint is damaged, its model has no LoRA or no export, or the target exists.
    """
    partial = check_target(target, EXPORT, overwrite=overwrite)
    step, weights, spec, stored = open_step(path)
    if spec.lora is None:
        raise CheckpointError("--adapter: the checkpoint's model has no LoRA. Leave the option out.")
    wanted = export_config.describe(spec, format=format, dtype="float32", stored=stored, special=None)
    base = table(spec, wanted.layout).rows
    rows = factor_rows(spec, base)
    check_factors(weights, rows)
    kind = DTYPES[dtype] if dtype else weights.dtypes[rows[0].key]
    described = {
        _PREFIX + name: (kind, shape) for row in rows for name, shape in zip(row.names, row.shapes, strict=True)
    }
    try:
        begin(partial, step, stored)
        with ShardFile(partial / ADAPTER_FILE, described) as stream:
            for row in rows:
                parts = row.split(weights.read([row.key])[row.key].to(kind))
                for name, tensor in zip(row.names, parts, strict=True):
                    stream.write(_PREFIX + name, tensor.contiguous())
        sync(partial / ADAPTER_FILE)
        (partial / CONFIG_FILE).write_text(json.dumps(peft_config(spec, base), indent=2) + "\n")
        sync(partial / CONFIG_FILE)
        put(partial, target)
    except OSError as error:
        raise CheckpointError(f"{str(target)!r} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(
        model_type=wanted.model_type,
        needs_code=wanted.needs_code,
        tensors=len(described),
        bytes=sum(torch.Size(shape).numel() * kind.itemsize for kind, shape in described.values()),
        files=(ADAPTER_FILE,),
        tokenizer=None,
    )


def peft_config(spec: ModelSpec, base: Sequence[Row]) -> dict[str, Any]:
    """``adapter_config.json``: what PEFT needs to know, the rest is its defaults."""
    assert spec.lora is not None
    alpha = spec.lora.alpha
    stacked = any(row.stacked for row in factor_rows(spec, base))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": spec.lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0 if stacked else spec.lora.dropout,  # PEFT refuses it on experts, and inference has none
        "bias": "none",
        "target_modules": _targets(spec, base),
    }


def _targets(spec: ModelSpec, base: Sequence[Row]) -> list[str]:
    """Modules with factors: by the end of their names where that says which, else by whole names.

    transformers 5 fuses experts, and PEFT knows them by the ends of the names that they had before alone.
    """
    adapted = {row.key.replace(".lora_a", ".weight") for row in factor_rows(spec, base)}
    stacked = any(row.stacked and row.key in adapted for row in base)
    modules = {
        name.removesuffix(".weight"): row.key in adapted
        for row in base
        if linear_of(row.key) and len(row.shapes[0]) > 1 and row.key.startswith("layers.")
        for name in row.names
    }
    ends = {name.rpartition(".")[2] for name, has in modules.items() if has}
    by_end = {name for name in modules if name.rpartition(".")[2] in ends}
    dense = any(".ffn." in row.key and not row.stacked and row.key in adapted for row in base)
    if stacked and dense:
        logger.warning(
            "PEFT with transformers 5 leaves out the factors of FFNs beside routed experts: merge such a model instead"
        )
    if stacked or all(modules[name] for name in by_end):
        return sorted(ends)
    return sorted(name for name, has in modules.items() if has)
