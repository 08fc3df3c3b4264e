"""A checkpoint tensor by tensor, read or written: one process, no process group, no model, one tensor in memory."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from unimega.errors import CheckpointError, UnimegaError
from unimega.parallel import step_folder

_OPTIMIZER = "optimizer."
_SHARD_FILE, _COMMON_FILE, _FORMAT_FILE = "__0_0.distcp", "common.pt", "metadata.json"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
"""As megatron-core writes it."""


class StoredWeights:
    """Keys, shapes and types of all weights of a step; their values when asked for."""

    def __init__(self, step: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        self._step = step
        try:
            self._reader = _Reader(step)
            entries = self._reader.metadata.state_dict_metadata
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
                dcp.load(tensors, storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # whatever reading raised; torch wraps it
            raise CheckpointError(f"{self._step}: cannot be read ({_words(error)}). Take another step.") from error
        return tensors


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once: torch does so for every tensor, and that of a large run has megabytes."""

    def __init__(self, step: Path) -> None:
        super().__init__(step)
        self.metadata = super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata


@dataclass(frozen=True, kw_only=True)
class Unmade:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def write_step(directory: Path, tensors: Mapping[str, Unmade], *, metadata: dict[str, Any]) -> None:
    """Write step 0 of a new folder of steps; makes and writes one tensor after another.

    Args:
        directory: does not exist yet. It is whole once this returns: the caller writes under a temporary name.
        metadata: goes to ``model.json``.

    Raises:
        OSError: the disk does not take it.
        UnimegaError: what a ``make`` raised.
    """
    step = step_folder.step_folder(directory, 0)
    step.mkdir(parents=True)
    described = {key: torch.empty(one.shape, dtype=one.dtype, device="meta") for key, one in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group: there is none on purpose
            dcp.save(described, storage_writer=_Writer(step), planner=_Planner(tensors), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError | UnimegaError):
            raise cause from error
        raise OSError(_words(error)) from error  # torch wraps what the disk says
    torch.save({}, step / _COMMON_FILE)
    (step / _FORMAT_FILE).write_text(json.dumps(_FORMAT))
    (step / step_folder.MODEL_FILE).write_text(json.dumps(metadata, indent=1))
    files = sorted(step.iterdir())
    for file in files:
        step_folder.sync(file)
    step_folder.write_manifest(step, {file.name: step_folder.seal(file) for file in files})
    step_folder.write_durably(directory / step_folder.LATEST_FILE, step.name)


class _Writer(dcp.FileSystemWriter):
    """Writes one file, and forgets each tensor once it is written: torch's own keeps them all to the end."""

    def __init__(self, step: Path) -> None:
        super().__init__(step)
        self._file = step / _SHARD_FILE

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with self._file.open("xb") as stream:
            for item in plan.items:
                start = stream.tell()
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                # torch.save writes the whole storage of a view
                is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
                torch.save(tensor.clone() if is_view else tensor, stream)
                size = stream.tell() - start
                results.append(WriteResult(item.index, size, _StorageInfo(_SHARD_FILE, start, size)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class _Planner(DefaultSavePlanner):
    """Plans with descriptions, and makes a tensor when torch asks for its values."""

    def __init__(self, tensors: Mapping[str, Unmade]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        one = self._tensors[write_item.index.fqn]
        made = one.make()
        assert made.shape == one.shape and made.dtype == one.dtype, write_item.index.fqn
        return made


def _words(error: BaseException) -> str:
    """The cause, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
