"""Rows of ids in Hugging Face's conventions, and their way into micro-batches. numpy only."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimega.batch import Microbatch, make_microbatch
from unimega.config.model import ModelSpec
from unimega.errors import DataError

IGNORED = -100
"""The label of a position that is not scored."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """B rows of T tokens, each a pack."""

    ids: np.ndarray
    """int64 [B, T]; 0 on pads."""
    documents: np.ndarray
    """int64 [B, T] number of each token's document, 0 for pads."""
    targets: np.ndarray | None
    """int64 [B, T] id that each position is scored on, -100: none; the labels one position on. None: no labels."""

    @property
    def scored(self) -> int:
        """Positions that are scored, in all rows."""
        return 0 if self.targets is None else int((self.targets != IGNORED).sum())


def read_inputs(path: Path) -> Inputs:
    """Read ``input_ids`` [B, T], and where they are there ``segment_ids`` and ``labels``, from an npz.

    A pad is never scored, whatever its label: its logits mean nothing.

    Raises:
        DataError: the file cannot be read, or an array is missing, of another shape or not of integers.
    """
    arrays, names = _arrays(path, ("input_ids", "segment_ids", "labels"))
    if "input_ids" not in arrays:
        found = ", ".join(map(repr, names)) or "nothing"
        raise DataError(f"{path}: 'input_ids' is missing, found {found}. It holds ids, [B, T].")
    ids = arrays["input_ids"]
    if ids.ndim != 2 or not ids.size:
        raise DataError(f"{path}: 'input_ids' has shape {list(ids.shape)}. It must be [B, T], rows of at least one id.")
    for name, values in arrays.items():
        if values.dtype.kind not in "iu":
            raise DataError(f"{path}: {name!r} has dtype {values.dtype}. It must be of integers.")
        if values.shape != ids.shape:
            raise DataError(
                f"{path}: {name!r} has shape {list(values.shape)}, 'input_ids' {list(ids.shape)}. Make them equal."
            )
    documents = arrays.get("segment_ids", np.ones_like(ids)).astype(np.int64)
    if documents.min() < 0:
        raise DataError(f"{path}: 'segment_ids' holds {documents.min()}. Documents are numbered from 1, 0 is a pad.")
    targets = None
    if "labels" in arrays:
        targets = np.full(ids.shape, IGNORED, dtype=np.int64)
        targets[:, :-1] = arrays["labels"][:, 1:]
        targets[documents == 0] = IGNORED
    return Inputs(ids=np.where(documents == 0, 0, ids).astype(np.int64), documents=documents, targets=targets)


def _arrays(path: Path, wanted: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the wanted arrays that an npz holds, and the names of all it holds."""
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            # A member that is no npy comes as bytes.
            return {name: np.asarray(file[name]) for name in wanted if name in file}, list(file)
    except Exception as error:  # a damaged one lets numpy, zipfile and zlib raise nearly anything
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: cannot be read as an npz ({why}). Write it with numpy.savez.") from error


def check_ids(inputs: Inputs, *, rows: int, where: Path) -> None:
    """Refuse ids and labels without a row in the vocabulary.

    Raises:
        DataError: the first one, with its place.
    """
    for name, values, legal in (
        ("input_ids", inputs.ids, np.empty(0)),
        ("labels", inputs.targets, np.array([IGNORED])),
    ):
        if values is None:
            continue
        bad = np.argwhere(((values < 0) | (values >= rows)) & ~np.isin(values, legal))
        if len(bad):
            row, place = bad[0].tolist()
            place_in_file = place + (name == "labels")
            raise DataError(
                f"{where}: {name}[{row}, {place_in_file}]={values[row, place]} is not an id: the model has {rows} rows."
            )


def microbatches(
    inputs: Inputs,
    spec: ModelSpec,
    *,
    tp_rank: int,
    tp: int,
    sequence_parallel: bool,
    dp_rank: int,
    dp: int,
    multiple: int,
) -> list[Microbatch]:
    """The rows of one dp rank, one micro-batch each: rows ``dp_rank, dp_rank + dp, ...``.

    Rows are filled with pads to a multiple of tp under sequence parallelism; rows of pads are added until all dp ranks
    have equally many, a multiple of ``multiple``. Loss weights are 1 / (all scored positions).
    """
    number, length = inputs.ids.shape
    per_rank = -(-number // (dp * multiple)) * multiple
    total = -(-length // tp) * tp if sequence_parallel else length
    made = []
    for row in range(dp_rank, per_rank * dp, dp):
        ids, documents = np.zeros(total, np.int64), np.zeros(total, np.int64)
        targets = np.full(total, IGNORED, np.int64)
        if row < number:
            ids[:length], documents[:length] = inputs.ids[row], inputs.documents[row]
            if inputs.targets is not None:
                targets[:length] = inputs.targets[row]
        scored = targets != IGNORED
        made.append(
            make_microbatch(
                ids,
                modality=np.where(documents == 0, 0, spec.vocabulary.modality_of(ids)),
                document=documents,
                labels=np.where(scored, targets, 0),
                loss_weights=scored / max(1, inputs.scored),
                modalities=len(spec.modalities),
                step_tokens=int(np.count_nonzero(inputs.documents)),
                cross_document=spec.cross_document,
                tp_rank=tp_rank,
                tp=tp,
                sequence_parallel=sequence_parallel,
            )
        )
    return made
