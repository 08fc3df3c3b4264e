"""The factors of LoRA in a folder: rows of the table with PEFT's names, and weights with what the factors add."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from unimega.config.lora import has_factors, linears
from unimega.config.model import ModelSpec
from unimega.errors import CheckpointError
from unimega.hf.layout import Layout
from unimega.hf.names import Row, Table, table
from unimega.hf.stored import StoredWeights
from unimega.parallel.factors import Fused, Pair

_WEIGHT = ".weight"


def whole_table(spec: ModelSpec, layout: Layout) -> Table:
    """Every tensor of a model: its weights, and beside each ``q_proj.weight`` that has them ``q_proj.lora_A.weight``.

    Raises:
        CheckpointError: the layout has no spelling for one of the model's layers.
    """
    names = table(spec, layout)
    return replace(names, rows=(*names.rows, *factor_rows(spec, names.rows)))


def factor_rows(spec: ModelSpec, base: Iterable[Row]) -> list[Row]:
    """The rows of all factors, in the order of the weights; A before B."""
    if spec.lora is None:
        return []
    found: list[Row] = []
    names = set(linears(spec.layers))
    for row in base:
        if row.used and linear_of(row.key) in names and has_factors(spec.lora, linear_of(row.key)):
            found += _pair(row, spec.lora.rank)
    return found


def linear_of(key: str) -> str:
    """The linear that holds a weight, by its key in a checkpoint; empty for what is no weight."""
    linear, found, _ = key.partition(_WEIGHT)
    for half in (".gate", ".up"):
        linear = linear.removesuffix(half) + ".gate_up" if linear.endswith(half) else linear
    return linear if found else ""


def _pair(row: Row, rank: int) -> list[Row]:
    a, b = (
        replace(
            row,
            key=row.key.replace(_WEIGHT, f".{factor}"),
            names=tuple(_factor_name(name, spelled) for name in row.names),
            shapes=shapes,
        )
        for factor, spelled, shapes in (
            ("lora_a", "lora_A", tuple((rank, shape[1]) for shape in row.shapes)),
            ("lora_b", "lora_B", tuple((shape[0], rank) for shape in row.shapes)),
        )
    )
    # the A of q, k and v lie one below the other, whatever the heads
    return [replace(a, kv_heads=1) if row.kv_heads else a, b]


def check_factors(stored: StoredWeights, rows: Iterable[Row]) -> None:
    """Compare the factors of a checkpoint with the rows of its model.

    Raises:
        CheckpointError: the first that is missing or of another shape.
    """
    for row in rows:
        if (found := stored.shapes.get(row.key)) != row.key_shape:
            what = "is missing" if found is None else f"is {list(found)}, the model wants {list(row.key_shape)}"
            raise CheckpointError(f"key {row.key!r} {what}. The checkpoint is of another model.")


def _factor_name(weight: str, factor: str) -> str:
    """PEFT's name; Uni-MoE's own factors beside its experts are not PEFT's."""
    joint = "_" if ".deepspeed_experts." in weight else "."
    return f"{weight.removesuffix(_WEIGHT)}{joint}{factor}{_WEIGHT}"


class Merged:
    """Stored weights, each with what its factors add; the factors themselves are not there."""

    def __init__(self, stored: StoredWeights, spec: ModelSpec, base: Sequence[Row]) -> None:
        """Find the factors of every weight.

        Args:
            base: the rows of the weights.

        Raises:
            CheckpointError: the model has no factors, or the checkpoint lacks one.
        """
        if spec.lora is None:
            raise CheckpointError("--merge-lora: the checkpoint's model has no LoRA. Leave the option out.")
        self._stored, self._scale = stored, spec.lora.alpha / spec.lora.rank
        self._fused = {row.key: Fused(_heads(spec), spec.kv_heads) for row in base if row.kv_heads}
        rows = factor_rows(spec, base)
        check_factors(stored, rows)
        shapes = {row.key: row.key_shape for row in rows}
        self.shapes: Mapping[str, tuple[int, ...]] = {k: v for k, v in stored.shapes.items() if k not in shapes}
        self.dtypes: Mapping[str, torch.dtype] = {key: stored.dtypes[key] for key in self.shapes}
        self._adapted = {row.key.replace(".lora_a", _WEIGHT) for row in rows}

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Whole tensors; sums are fp32 and rounded once.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        return {key: self._read(key) for key in keys}

    def _read(self, key: str) -> torch.Tensor:
        if key not in self._adapted:
            return self._stored.read([key])[key]
        keys = [key, *(key.replace(_WEIGHT, f".{factor}") for factor in ("lora_a", "lora_b"))]
        weight, a, b = self._stored.read(keys).values()
        fused = self._fused.get(key)
        owners = fused.owners(b.shape[-2]) if fused is not None else None
        return (weight.float() + Pair(a, b, owners, self._scale).delta()).to(weight.dtype)


def _heads(spec: ModelSpec) -> tuple[int, int, int]:
    """q, k and v of a group, in heads."""
    return spec.heads // spec.kv_heads, 1, 1
