"""Write a `.bin/.idx/.json` corpus: streamed, summed block by block, published with the index last."""

import errno
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.errors import DataError

_TABLES = ("lengths", "documents", "modes")
"""Parts of the index, kept in files until their number is known: an index of 10^9 sequences is 21 GB."""
_ENDINGS = ("bin", "idx", "json", *_TABLES)
_CHUNK = 1 << 18
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MODES = 1 << 6


def write_error(path: str | Path, error: OSError, *, wanted: int | None = None) -> DataError:
    """The line for a file that cannot be written; on a full disk, how much was wanted and how much is free."""
    reason = error.strerror or str(error)
    if error.errno not in _FULL:
        return DataError(f"{path}: cannot be written ({reason}). Choose another output, or make this one writable.")
    try:
        free = f"; {shutil.disk_usage(Path(path).parent).free / 1e6:.1f} MB are free"
    except OSError:
        free = ""
    what = "" if wanted is None else f"{wanted} bytes "
    return DataError(f"{path}: {what}cannot be written ({reason}{free}). Make room and run again.")


class CorpusWriter:
    """Writes documents to ``PREFIX.bin.tmp``; ``finish`` publishes them. Leaving ``with`` before removes all traces.

    Memory does not grow with the corpus: the tables of the index go to files of their own until ``finish``.
    """

    def __init__(self, prefix: str | Path, *, overwrite: bool = False) -> None:
        """Start a corpus.

        Raises:
            DataError: ``PREFIX.idx`` exists and ``overwrite`` is not set, or the folder cannot be written.
        """
        self.prefix = str(prefix)
        if not overwrite and Path(f"{prefix}.idx").exists():
            raise DataError(f"{prefix}.idx: exists already. Choose another output or pass --overwrite.")
        self._finished = False
        self._files: dict[str, BinaryIO] = {}
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            for ending in ("bin", *_TABLES):
                self._files[ending] = self._temporary(ending).open("w+b")
        except OSError as error:
            self._close()
            raise write_error(self._temporary("bin"), error) from error
        self._lengths, self._modes, self._documents = array("i"), array("b"), array("q", [0])
        self._num_sequences = self._num_documents = 0
        self._tokens_of_mode = np.zeros(_MODES, dtype=np.int64)
        self._sequences_of_mode = np.zeros(_MODES, dtype=np.int64)
        self._block_sum, self._block_bytes, self._sums = 0, 0, list[str]()
        self._bytes = self._longest = 0

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return self._num_documents

    def add_document(self, segments: Iterable[tuple[int, layout.Ids]]) -> None:
        """Append one document of (mode, ids) sequences; ids are int32 and their range was checked by the caller."""
        total = 0
        for mode, ids in segments:
            self.add_ids(np.ascontiguousarray(ids, dtype="<i4").tobytes())
            self._lengths.append(len(ids))
            self._modes.append(mode)
            self._num_sequences += 1
            total += len(ids)
        self._documents.append(self._num_sequences)
        self._num_documents += 1
        self._longest = max(self._longest, total)
        if len(self._lengths) >= _CHUNK or len(self._documents) >= _CHUNK:
            self._flush()

    def add_ids(self, data: bytes) -> None:
        """Append int32 ids whose sequences ``add_tables`` names.

        Raises:
            DataError: the disk is full.
        """
        self._write("bin", data)
        self._bytes += len(data)
        view = memoryview(data)
        while len(view):
            room = layout.BLOCK_BYTES - self._block_bytes
            part, view = view[:room], view[room:]
            self._block_sum = zlib.crc32(part, self._block_sum)
            self._block_bytes += len(part)
            if self._block_bytes == layout.BLOCK_BYTES:
                self._close_block()

    def add_tables(
        self,
        lengths: npt.NDArray[np.int32],
        modes: npt.NDArray[np.int8],
        sequences: npt.NDArray[np.int32],
        *,
        longest: int,
    ) -> None:
        """Append many documents whose ids ``add_ids`` took.

        Args:
            lengths: [S] ids of each sequence.
            modes: [S] mode bytes.
            sequences: [documents] number of sequences of each.
            longest: ids of the longest of these documents.
        """
        self._flush()
        self._write_sequences(lengths, modes)
        ends = self._num_sequences + np.cumsum(sequences, dtype=np.int64)
        self._write("documents", ends.astype("<i8").tobytes())
        self._num_sequences += len(lengths)
        self._num_documents += len(sequences)
        self._longest = max(self._longest, longest)

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write sidecar and index, sync, rename `.bin`, `.json` and last `.idx`; returns the sidecar.

        Args:
            facts: ``tokenizer``, ``vocabulary``, ``sources``, ``made_by`` of the sidecar; ``counts`` join ours.

        Raises:
            DataError: the disk is full or a file cannot be written; nothing is left behind.
        """
        try:
            return self._finish(facts)
        except OSError as error:
            raise write_error(error.filename or self.prefix, error) from error

    def _temporary(self, ending: str) -> Path:
        return Path(f"{self.prefix}.{ending}.tmp")

    def _close(self) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk has been reported; the file is removed with what its buffer held
                continue
        if not self._finished:
            for ending in _ENDINGS:
                self._temporary(ending).unlink(missing_ok=True)

    def _write(self, ending: str, data: bytes) -> None:
        try:
            self._files[ending].write(data)
        except OSError as error:
            raise write_error(self._temporary(ending), error, wanted=len(data)) from error

    def _write_sequences(self, lengths: npt.NDArray[np.int32], modes: npt.NDArray[np.int8]) -> None:
        self._write("lengths", lengths.astype("<i4").tobytes())
        self._write("modes", modes.astype("i1").tobytes())
        # float64 sums are exact up to 2^53 ids, which is 36 PB
        self._tokens_of_mode += np.bincount(modes, weights=lengths, minlength=_MODES).astype(np.int64)
        self._sequences_of_mode += np.bincount(modes, minlength=_MODES)

    def _flush(self) -> None:
        self._write_sequences(np.asarray(self._lengths, dtype=np.int32), np.asarray(self._modes, dtype=np.int8))
        self._write("documents", np.asarray(self._documents, dtype="<i8").tobytes())
        self._lengths, self._modes, self._documents = array("i"), array("b"), array("q")

    def _close_block(self) -> None:
        self._sums.append(f"{self._block_sum:08x}")
        self._block_sum = self._block_bytes = 0

    def _finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        if self._block_bytes:
            self._close_block()
        self._flush()
        self._files["bin"].flush()
        os.fsync(self._files["bin"].fileno())
        index_bytes, index_sum = self._write_index()
        counts = {**self._counts(), "longest_document": self._longest, "documents": self.num_documents}
        sidecar = {
            "format": layout.SIDECAR_FORMAT,
            "version": layout.SIDECAR_VERSION,
            **facts,
            "counts": counts | dict(facts.get("counts", {})),
            "bin": {"bytes": self._bytes, "block_bytes": layout.BLOCK_BYTES, "crc32": self._sums},
            "idx": {"bytes": index_bytes, "crc32": f"{index_sum:08x}"},
            "columns": [],
        }
        text = json.dumps(sidecar, indent=1) + "\n"
        write_synced(self._temporary("json"), text.encode())
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for ending in ("bin", "json", "idx"):
            os.replace(self._temporary(ending), f"{self.prefix}.{ending}")
        self._finished = True
        for ending in _TABLES:
            self._temporary(ending).unlink()
        sync_folder(Path(self.prefix).parent)
        return dict(json.loads(text))

    def _write_index(self) -> tuple[int, int]:
        """Header, lengths, offsets, documents, modes, as ``layout.index_parts`` lays them out; (bytes, crc32)."""
        total = crc = 0
        with self._temporary("idx").open("wb") as file:
            for data in self._index_chunks():
                file.write(data)
                total, crc = total + len(data), zlib.crc32(data, crc)
            file.flush()
            os.fsync(file.fileno())
        return total, crc

    def _index_chunks(self) -> Iterable[bytes]:
        yield layout.MAGIC + layout.HEADER.pack(
            layout.VERSION, layout.INT32, self._num_sequences, self._num_documents + 1
        )
        yield from self._table("lengths")
        offset = 0
        for chunk in self._table("lengths"):
            lengths = np.frombuffer(chunk, dtype="<i4")
            ends = offset + 4 * np.cumsum(lengths, dtype=np.int64)
            yield (ends - 4 * lengths.astype(np.int64)).astype("<i8").tobytes()
            offset = int(ends[-1])
        yield from self._table("documents")
        yield from self._table("modes")

    def _table(self, name: str) -> Iterable[bytes]:
        file = self._files[name]
        file.flush()
        file.seek(0)
        while chunk := file.read(8 * _CHUNK):
            yield chunk

    def _counts(self) -> dict[str, Any]:
        return counts_of_modes(self._tokens_of_mode.tolist(), self._sequences_of_mode.tolist())


def counts_of_modes(tokens: Sequence[int], sequences: Sequence[int]) -> dict[str, Any]:
    """``counts`` of a sidecar from the number of ids and of sequences of each mode byte (64 numbers each)."""
    modes = np.arange(_MODES, dtype=np.int8)
    modality, role, context = layout.modality_of(modes), layout.role_of(modes), layout.is_context(modes)
    wide = np.asarray(tokens, dtype=np.int64)
    per_role = {}
    for number, name in enumerate(layout.ROLES):
        for masked in (False, True):
            if found := int(wide[(role == number) & (context == masked)].sum()):
                per_role[name + ("/context" if masked else "")] = found
    return {
        "sequences": int(np.sum(sequences)),
        "images": int(np.asarray(sequences, dtype=np.int64)[modality == layout.VISION].sum()),
        "tokens": {
            "text": int(wide[modality == layout.TEXT].sum()),
            "vision": int(wide[modality == layout.VISION].sum()),
        },
        "tokens_per_role": per_role,
    }


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """A rename is only safe from a power cut once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
