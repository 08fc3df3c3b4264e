"""One rank's file of a step, planned and indexed by megatron-core, written here: at once, or by a forked process.

megatron-core's own writer starts a manager by ``spawn`` for every rank, which imports the main script a second time and
outlives a rank that is killed; it forks a writer per file and waits for ever if one dies; and where the disk is full it
fails on one rank while the others wait. This one writes a single file, hashes it on the way, and hands errors on.
"""

import io
import os
import pickle
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from unimega.parallel.host_memory import HostPeak
from unimega.parallel.step_folder import Seal, seal, sync


@dataclass(frozen=True)
class Written:
    """What came of one rank's file."""

    results: list[WriteResult]
    """Where each piece lies, for the index."""
    seals: dict[str, Seal]
    """Size and checksum of the file; empty if there was nothing to write."""
    peak_bytes: int
    """Host memory above what was held before."""
    error: str | None
    """Why it is not whole."""


class ShardWriter(FileSystemWriter):
    """This rank's pieces, from the plan to the file. The names of methods are megatron-core's and torch's."""

    can_run_decentralized_global_plan = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.pieces: list[tuple[WriteItem, torch.Tensor]] = []
        self.metadata: Any = None

    @classmethod
    def plan(cls, folder: Path, tensors: Sequence[ShardedTensor]) -> "ShardWriter":
        """Agree with all ranks on who writes what. Collective: a gather of names and offsets to rank 0."""
        by_key: dict[str, list[ShardedTensor]] = {}
        for tensor in tensors:
            if is_main_replica(tensor.replica_id):
                by_key.setdefault(tensor.key, []).append(tensor)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        described = mcore_to_pyt_state_dict(by_key, False)
        (writer, metadata, _), *_ = save_state_dict_async_plan(described, cls(folder), None, 0, planner=planner)
        if metadata is not None:
            del metadata.all_local_plans  # a second copy of everything, for a cache that is not used
        writer.metadata = metadata
        return writer

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """Name this rank's file."""
        return replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Note what is to be written; nothing is copied."""
        self.pieces = [(item, cast(torch.Tensor, planner.resolve_data(item))) for item in plan.items]

    def write(self) -> Written:
        """Write this rank's file now. Holds one piece beside the model in host memory."""
        return _write(self.folder, f"__{dist.get_rank()}_0.distcp", self.pieces)

    def request(self) -> tuple[AsyncRequest, "_Report"]:
        """The same for megatron-core's queue, which runs it in a fork of this process: a snapshot of host memory.

        Tensors on a device are copied to the host first.
        """
        pieces = [(item, tensor.detach().to("cpu")) for item, tensor in self.pieces]
        report = _Report()
        name = f"__{dist.get_rank()}_0.distcp"
        return AsyncRequest(_write_and_report, (self.folder, name, pieces, report), []), report

    def index(self, everyone: Sequence[Written]) -> dict[str, Seal]:
        """On rank 0: write what finds the pieces again. Returns the seals of these files."""
        self.finish(self.metadata, [written.results for written in everyone])
        torch.save({}, self.folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        names = [".metadata", COMMON_STATE_FNAME, "metadata.json"]
        for name in names:
            sync(self.folder / name)
        return {name: seal(self.folder / name) for name in names}


class _Report:
    """How a forked process answers: an unnamed file. A pipe would fill, and block the one that waits for its end."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it is closed by ``get``)

    def put(self, written: Written) -> None:
        pickle.dump(written, self._file)
        self._file.flush()

    def get(self) -> Written:
        """Once the process has ended; a process that was killed has left nothing, or a part."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return Written([], {}, 0, f"rank {dist.get_rank()}: the process that wrote its file was ended")
        finally:
            self._file.close()


class _Hashed(io.RawIOBase):
    """A file that is written front to back, with the checksum of what went in."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.size = self.checksum = 0

    def write(self, data: Any) -> int:
        """Take some bytes."""
        self._raw.write(data)
        self.size += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        return len(data)


def _write_and_report(folder: Path, name: str, pieces: list[tuple[WriteItem, torch.Tensor]], report: _Report) -> None:
    torch.set_num_threads(1)  # the threads that copy large tensors did not come along in the fork
    report.put(_write(folder, name, pieces))


def _write(folder: Path, name: str, pieces: list[tuple[WriteItem, torch.Tensor]]) -> Written:
    """Write the file of this rank; never raises what the disk or the file system is to blame for."""
    results: list[WriteResult] = []
    peak = HostPeak()
    try:
        if not pieces:
            return Written([], {}, 0, None)
        with peak, (folder / name).open("xb") as raw:
            stream = _Hashed(raw)
            for item, tensor in pieces:
                start = stream.size
                torch.save(_alone(tensor), cast(IO[bytes], stream))
                place = _StorageInfo(name, start, stream.size - start)
                results.append(WriteResult(item.index, stream.size - start, place))
            raw.flush()
            os.fsync(raw.fileno())
        return Written(results, {name: (stream.size, stream.checksum)}, peak.bytes, None)
    except (OSError, RuntimeError, MemoryError) as error:  # torch wraps what the file raises
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
        return Written([], {}, 0, f"rank {dist.get_rank()}: {folder / name}: {reason}")


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, in a storage of its own: torch.save writes the whole storage of a view."""
    tensor = tensor.detach().to("cpu")
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize else tensor.clone()
