"""Parts of a corpus on the way: what one block of an input file became, whole or not there.

A part is ids, tables, refused rows and a record, in one file that gets its name when all of it is on disk. So a name is
a commit, and a kill leaves nothing but files that end in ``.tmp``.
"""

import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.data.format import Ids
from unimega.data.writer import sync_folder, write_error
from unimega.errors import DataError

_TRAILER = struct.Struct("<IQ8s")
"""Bytes and crc32 of the record, magic: the end of a part."""
_MAGIC = b"umpart01"
_CHUNK = 8 << 20
_REFUSED_IN_MEMORY = 4 << 20


@dataclass
class Run:
    """Consecutive documents of one direction; documents that are no pairs belong to any."""

    direction: str | None
    documents: int = 0
    text: int = 0
    vision: int = 0

    def add(self, other: "Run") -> None:
        """Join what follows."""
        self.direction = self.direction or other.direction
        self.documents += other.documents
        self.text += other.text
        self.vision += other.vision


@dataclass
class Record:
    """What a part holds."""

    job: str
    """Fingerprint of the job."""
    lines: int = 0
    rows: int = 0
    """Lines that are not empty."""
    sequences: int = 0
    documents: int = 0
    images: int = 0
    longest: int = 0
    """Ids of the longest document."""
    ended: int = 0
    """Text documents that hold an eos at their end."""
    runs: list[Run] = field(default_factory=list)
    quarantined: dict[str, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    """Bytes of ids, lengths, modes, sequences per document, refused rows."""
    crc32: int = 0
    """Of these bytes."""

    @property
    def bad(self) -> int:
        """Refused rows."""
        return sum(self.quarantined.values())


class PartWriter:
    """Writes one part; leaving ``with`` without ``commit`` removes all traces."""

    def __init__(self, path: Path, *, job: str) -> None:
        """Start a part.

        Raises:
            DataError: the file cannot be written.
        """
        self.path, self.record = path, Record(job)
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._lengths, self._modes, self._sequences = array("i"), array("b"), array("i")
        self._crc = self._bytes = 0
        try:
            self._file = self._temporary.open("wb")
            self._refused = SpooledTemporaryFile(max_size=_REFUSED_IN_MEMORY, dir=str(path.parent))  # noqa: SIM115
        except OSError as error:
            raise write_error(self._temporary, error) from error

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._refused.close()
            self._file.close()
        except OSError:  # a full disk, which has been reported
            pass
        finally:
            self._temporary.unlink(missing_ok=True)

    def add(
        self,
        ids: Ids,
        lengths: npt.NDArray[np.int32],
        modes: npt.NDArray[np.int8],
        sequences: npt.NDArray[np.int32],
    ) -> None:
        """Append documents: ids of all, length and mode of each sequence, number of sequences of each document.

        Raises:
            DataError: the disk is full.
        """
        self._write(np.ascontiguousarray(ids, dtype="<i4").data.cast("B"))
        for table, values in ((self._lengths, lengths), (self._modes, modes), (self._sequences, sequences)):
            table.frombytes(np.ascontiguousarray(values).tobytes())

    def refuse(self, entry: Mapping[str, Any]) -> None:
        """Append a refused row."""
        try:
            self._refused.write(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise write_error(self._temporary, error) from error

    def commit(self) -> Record:
        """Write the rest, wait for the disk, give the file its name.

        Raises:
            DataError: the disk is full.
        """
        sizes = [self._bytes]
        for table in (self._lengths, self._modes, self._sequences):
            data = table.tobytes()
            self._write(memoryview(data))
            sizes.append(len(data))
        before = self._bytes
        self._refused.seek(0)
        while chunk := self._refused.read(_CHUNK):
            self._write(memoryview(chunk))
        sizes.append(self._bytes - before)
        self.record.sizes, self.record.crc32 = sizes, self._crc
        text = json.dumps(asdict(self.record)).encode()
        try:
            self._file.write(text + _TRAILER.pack(zlib.crc32(text), len(text), _MAGIC))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise write_error(self._temporary, error, wanted=len(text)) from error
        return self.record

    def _write(self, data: memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise write_error(self._temporary, error, wanted=len(data)) from error
        self._crc = zlib.crc32(data, self._crc)
        self._bytes += len(data)


def read_record(path: Path) -> Record | None:
    """The record of a part; None if the file is not a whole part."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _TRAILER.size:
            return None
        file.seek(size - _TRAILER.size)
        crc, length, magic = _TRAILER.unpack(file.read(_TRAILER.size))
        if magic != _MAGIC or length > size - _TRAILER.size:
            return None
        file.seek(size - _TRAILER.size - length)
        text = file.read(length)
    if zlib.crc32(text) != crc:
        return None
    values = json.loads(text)
    if values.keys() != {one.name for one in fields(Record)}:
        return None
    record = Record(**(values | {"runs": [Run(**run) for run in values["runs"]]}))
    return record if sum(record.sizes) == size - _TRAILER.size - length else None


@dataclass(frozen=True)
class Tables:
    """The tables of a part, whole in memory: they are small."""

    lengths: npt.NDArray[np.int32]
    modes: npt.NDArray[np.int8]
    sequences: npt.NDArray[np.int32]


class PartReader:
    """Reads a part once, in its order, and checks its sum on the way."""

    def __init__(self, path: Path, record: Record) -> None:
        self._path, self._record = path, record
        self._file = path.open("rb")
        self._crc = 0

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def ids(self) -> Iterator[bytes]:
        """The ids, a few MB at a time."""
        yield from self._section(self._record.sizes[0])

    def tables(self) -> Tables:
        """The tables, after the ids."""
        lengths, modes, sequences = (b"".join(self._section(size)) for size in self._record.sizes[1:4])
        return Tables(
            np.frombuffer(lengths, dtype=np.int32),
            np.frombuffer(modes, dtype=np.int8),
            np.frombuffer(sequences, dtype=np.int32),
        )

    def refused(self) -> Iterator[dict[str, Any]]:
        """The refused rows, without a look at what lies before them."""
        self._file.seek(sum(self._record.sizes[:4]))
        rest = b""
        for chunk in self._section(self._record.sizes[4]):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, whole)

    def check(self) -> None:
        """Read the rest, after the tables, and check the sum of all.

        Raises:
            DataError: the part is not what was written.
        """
        for _ in self._section(self._record.sizes[4]):
            pass
        if self._crc != self._record.crc32:
            raise DataError(f"{self._path}: its sum is wrong: the disk lost what was written. Remove it and run again.")

    def _section(self, size: int) -> Iterator[bytes]:
        while size:
            data = self._file.read(min(size, _CHUNK))
            if not data:
                raise DataError(f"{self._path}: it ends too early. Remove it and run again.")
            self._crc = zlib.crc32(data, self._crc)
            size -= len(data)
            yield data
