"""The weights of a checkpoint, read tensor by tensor: one process, no process group, no model."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from unimega.errors import CheckpointError
from unimega.parallel import checkpoint

_OPTIMIZER = "optimizer."


class StoredWeights:
    """Keys, shapes and types of all weights of a step; their values when asked for."""

    def __init__(self, step: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        self._step = step
        try:
            entries = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
        except (Exception, CheckpointException) as error:  # a pickle: whatever its bytes make it raise
            raise CheckpointError(
                f"{step}: its metadata cannot be read ({_words(error)}). Take another step."
            ) from error
        tensors = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_OPTIMIZER)
        }
        self.shapes = {key: tuple(entry.size) for key, entry in tensors.items()}
        self.dtypes: dict[str, torch.dtype] = {key: entry.properties.dtype for key, entry in tensors.items()}

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Whole tensors.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        tensors = {key: torch.empty(self.shapes[key], dtype=self.dtypes[key]) for key in keys}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no process group: there is none on purpose
                dcp.load(tensors, storage_reader=dcp.FileSystemReader(self._step), no_dist=True)
        except (Exception, CheckpointException) as error:  # whatever reading raised; torch wraps it
            raise CheckpointError(f"{self._step}: cannot be read ({_words(error)}). Take another step.") from error
        return tensors


def open_step(path: Path) -> tuple[Path, StoredWeights]:
    """The step that a CHECKPOINT names, and its weights.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    step = checkpoint.resolve_step(path)
    return step, StoredWeights(step)


def _words(error: BaseException) -> str:
    """The cause, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
