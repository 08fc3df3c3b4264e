"""Write a `.bin/.idx/.json` corpus: streamed, summed block by block, published with the index last."""

import json
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from unimega.data import format as layout
from unimega.errors import DataError


class CorpusWriter:
    """Writes documents to ``PREFIX.bin.tmp``; ``finish`` publishes them. Leaving ``with`` before removes all traces."""

    def __init__(self, prefix: str | Path, *, overwrite: bool = False) -> None:
        """Start a corpus.

        Raises:
            DataError: ``PREFIX.idx`` exists and ``overwrite`` is not set, or the folder cannot be written.
        """
        self.prefix = str(prefix)
        if not overwrite and Path(f"{prefix}.idx").exists():
            raise DataError(f"{prefix}.idx: exists already. Choose another output or pass --overwrite.")
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(f"{prefix}.bin.tmp").open("wb")  # noqa: SIM115 (closed by finish or __exit__)
        except OSError as error:
            raise DataError(f"{prefix}.bin.tmp: cannot be written ({error.strerror}).") from error
        self._lengths, self._modes = array("i"), array("b")
        self._documents = array("q", [0])
        self._block_sum, self._block_bytes, self._sums = 0, 0, list[str]()
        self._bytes = 0
        self._longest = 0
        self._finished = False

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._finished:
            for ending in ("bin", "idx", "json"):
                Path(f"{self.prefix}.{ending}.tmp").unlink(missing_ok=True)

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._documents) - 1

    def add_document(self, segments: Iterable[tuple[int, layout.Ids]]) -> None:
        """Append one document of (mode, ids) sequences; ids are int32 and their range was checked by the caller."""
        total = 0
        for mode, ids in segments:
            self._append(np.ascontiguousarray(ids, dtype="<i4").tobytes())
            self._lengths.append(len(ids))
            self._modes.append(mode)
            total += len(ids)
        self._documents.append(len(self._lengths))
        self._longest = max(self._longest, total)

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
            raise DataError(
                f"{self.prefix}: cannot be written ({error.strerror}). Free space and run again."
            ) from error

    def _append(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise DataError(
                f"{self.prefix}.bin.tmp: {len(data)} bytes cannot be written ({error.strerror}). "
                "Free space and run again."
            ) from error
        self._bytes += len(data)
        while data:
            room = layout.BLOCK_BYTES - self._block_bytes
            part, data = data[:room], data[room:]
            self._block_sum = zlib.crc32(part, self._block_sum)
            self._block_bytes += len(part)
            if self._block_bytes == layout.BLOCK_BYTES:
                self._close_block()

    def _close_block(self) -> None:
        self._sums.append(f"{self._block_sum:08x}")
        self._block_sum = self._block_bytes = 0

    def _finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        if self._block_bytes:
            self._close_block()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, dtype=np.int32)
        modes = np.frombuffer(self._modes, dtype=np.int8) if self._modes else np.zeros(0, dtype=np.int8)
        index = b"".join(layout.index_parts(lengths, np.frombuffer(self._documents, dtype=np.int64), modes))
        sidecar = {
            "format": layout.SIDECAR_FORMAT,
            "version": layout.SIDECAR_VERSION,
            **facts,
            "counts": {**_counts(lengths, modes), "longest_document": self._longest, "documents": self.num_documents}
            | dict(facts.get("counts", {})),
            "bin": {"bytes": self._bytes, "block_bytes": layout.BLOCK_BYTES, "crc32": self._sums},
            "idx": {"bytes": len(index), "crc32": f"{zlib.crc32(index):08x}"},
            "columns": [],
        }
        text = json.dumps(sidecar, indent=1) + "\n"
        _write_synced(Path(f"{self.prefix}.json.tmp"), text.encode())
        _write_synced(Path(f"{self.prefix}.idx.tmp"), index)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for ending in ("bin", "json", "idx"):
            os.replace(f"{self.prefix}.{ending}.tmp", f"{self.prefix}.{ending}")
        self._finished = True
        _sync_folder(Path(self.prefix).parent)
        return dict(json.loads(text))


def _counts(lengths: layout.Ids, modes: np.ndarray[Any, np.dtype[np.int8]]) -> dict[str, Any]:
    modality, role, context = layout.modality_of(modes), layout.role_of(modes), layout.is_context(modes)
    wide = lengths.astype(np.int64)
    per_role = {}
    for number, name in enumerate(layout.ROLES):
        for masked in (False, True):
            tokens = int(wide[(role == number) & (context == masked)].sum())
            if tokens:
                per_role[name + ("/context" if masked else "")] = tokens
    return {
        "sequences": len(lengths),
        "images": int((modality == layout.VISION).sum()),
        "tokens": {
            "text": int(wide[modality == layout.TEXT].sum()),
            "vision": int(wide[modality == layout.VISION].sum()),
        },
        "tokens_per_role": per_role,
    }


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """A rename is only safe from a power cut once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
