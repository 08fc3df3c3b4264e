"""The weights of a start: which tensor of the folder fills which key, and what is drawn where none does."""

from dataclasses import dataclass
from typing import Literal

import torch

from unimega.hf.names import Row, table
from unimega.hf.start import Start
from unimega.parallel.initialize import deviation, draw

How = Literal["copy", "rows", "normal", "ones", "zeros"]
_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one key of the checkpoint is made."""

    key: str
    shape: tuple[int, ...]
    how: How
    row: Row | None
    """What is copied, or extended by rows; None: nothing."""
    note: str
    """For the list that the command prints: what is new in it."""


def recipes(start: Start) -> list[Recipe]:
    """All keys of the new model, in order. Raises like ``names.table``."""
    spec = start.source.spec
    have = {row.key: row for row in table(start.base.spec, start.base.layout).rows}
    made = []
    for row in table(spec, start.source.layout).rows:
        key, shape = row.key, row.key_shape
        copied = have.get(_of_text(key, spec.modalities))
        is_text = not key.endswith(tuple(f"_{name}" for name in spec.modalities[1:]))
        if key in ("embedding.weight", "head.weight"):
            made.append(_rows(key, shape, have[key], start))
        elif copied is not None and (is_text or start.copies_text):
            note = "" if is_text else "as text's"
            made.append(Recipe(key=key, shape=shape, how="copy", row=copied, note=note))
        else:
            made.append(_new(key, shape, start))
    return made


def make(recipe: Recipe, tensors: list[torch.Tensor], start: Start, *, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The tensor of a recipe.

    Args:
        tensors: those that ``recipe.row`` names.
        dtype: of what is drawn.
        seed: drawn numbers are a function of it and of the key alone.
    """
    if recipe.how == "copy":
        assert recipe.row is not None
        return recipe.row.join(tensors)
    if recipe.how == "rows":
        return _extended(tensors[0], recipe.shape[0], start)
    if recipe.how == "normal":
        return draw(recipe.key, recipe.shape, start.source.spec, seed=seed).to(dtype)
    return torch.full(recipe.shape, 1.0 if recipe.how == "ones" else 0.0, dtype=dtype)


def _of_text(key: str, modalities: tuple[str, ...]) -> str:
    """The key of the same weight where all modalities share it."""
    for name in modalities:
        key = key.removesuffix(f"_{name}")
    return key


def _rows(key: str, shape: tuple[int, ...], row: Row, start: Start) -> Recipe:
    first, last = start.kept_rows, shape[0] - 1
    note = f"rows {first} to {last}: mean of rows 0 to {start.rows_in_use - 1}" if first <= last else ""
    if first < row.key_shape[0]:
        note += f"; old rows from {first} up are replaced"
    return Recipe(key=key, shape=shape, how="rows", row=row, note=note)


def _new(key: str, shape: tuple[int, ...], start: Start) -> Recipe:
    """As the engine draws a new model; but what a shared FFN adds is 0 at first, so that text keeps its logits."""
    if ".ffn.shared.down." in key:
        how: How = "zeros"
    elif "norm" in key:
        how = "ones"
    else:
        how = "zeros" if ".bias" in key else "normal"
    note = f"normal, deviation {deviation(key, start.source.spec):.3g}" if how == "normal" else how
    return Recipe(key=key, shape=shape, how=how, row=None, note=note)


def _extended(old: torch.Tensor, rows: int, start: Start) -> torch.Tensor:
    """The rows that stay, then the mean of those in use, summed in fp64: [rows, D], dtype of ``old``."""
    total = torch.zeros(old.shape[1], dtype=torch.float64)
    for first in range(0, start.rows_in_use, _BLOCK_ROWS):
        total += old[first : min(first + _BLOCK_ROWS, start.rows_in_use)].sum(0, dtype=torch.float64)
    new = old.new_empty(rows, old.shape[1])
    new[: start.kept_rows] = old[: start.kept_rows]
    new[start.kept_rows :] = (total / start.rows_in_use).to(old.dtype)
    return new
