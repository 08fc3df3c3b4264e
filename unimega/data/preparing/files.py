"""Input files: what they are, and how their rows are reached one after another in bounded memory."""

import gzip
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

from unimega.data.records.row import BadRow
from unimega.errors import DataError, optional

Format = Literal["jsonl", "tar", "parquet"]
Compression = Literal["", "gz", "zst"]
_CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 11
"""A zstd block of a few bytes may hold 128 kB: this much input gives at most 90 MB at once."""
_GIVE_UP_BYTES = 1 << 30
"""A row of a compressed file that has expanded to this is not skipped any further: it may have no end."""
_TAR_MAGIC = slice(257, 262)
_REFUSED = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input file of a job."""

    path: str
    shown: str
    """As messages and the sidecar name it."""
    source: int
    """Number of its source in the job."""
    format: Format
    compression: Compression
    bytes: int
    mtime_ns: int
    spans: tuple[tuple[int, int], ...] | None
    """What each block covers: bytes of plain jsonl, row groups of parquet; None where only reading tells."""


class Raw(NamedTuple):
    """One row as it lies in a file."""

    line: int
    """From 1, within the block or file that is read; a sample's or a row's number where there are no lines."""
    byte: int
    """Offset in the file, after decompression; -1 where there is none."""
    size: int
    content: bytes | Mapping[str, Any] | BadRow


class Stream(Protocol):
    """Bytes in order."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


def unreadable(shown: str, error: OSError) -> DataError:
    """The line for an input that cannot be read, or no longer."""
    return DataError(f"{shown}: cannot be read ({error.strerror or error}).")


def recognise(path: str, shown: str) -> tuple[Format, Compression]:
    """What a file is, from its first bytes: names lie.

    Raises:
        DataError: it cannot be read, or it is of a kind that is not read.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(512)
            if start.startswith(b"PAR1"):
                return "parquet", ""
            compression: Compression = (
                "gz" if start.startswith(b"\x1f\x8b") else "zst" if start.startswith(b"\x28\xb5\x2f\xfd") else ""
            )
            file.seek(0)
            inner = decompressed(file, compression, shown).read(512) if compression else start
    except OSError as error:
        raise unreadable(shown, error) from error
    for magic, name in _REFUSED.items():
        if start.startswith(magic):
            raise DataError(f"{shown}: {name} is not read. Write it as UTF-8 jsonl (plain, .gz, .zst), parquet or tar.")
    if inner[_TAR_MAGIC] == b"ustar":
        return "tar", compression
    if inner.lstrip()[:1] == b"[" and shown.endswith((".json", ".json.gz", ".json.zst")):
        raise DataError(f"{shown}: one JSON list, one object per line is needed. Convert it: jq -c '.[]' {shown}.")
    return "jsonl", compression


def decompressed(file: BinaryIO, compression: Compression, shown: str) -> Stream:
    """The bytes of a file, decompressed as they are asked for."""
    if compression == "gz":
        return _Gzip(file, shown)
    return _Zstd(file, shown) if compression == "zst" else file


class _Gzip:
    def __init__(self, file: BinaryIO, shown: str) -> None:
        self._file, self._shown = gzip.GzipFile(fileobj=file), shown

    def read(self, size: int, /) -> bytes:
        try:
            return self._file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(self._shown, error) from error


class _Zstd:
    """Frames one after another; the library's own reader does not tell a file that was cut from one that ends."""

    def __init__(self, file: BinaryIO, shown: str) -> None:
        self._file, self._shown = file, shown
        self._library = optional("zstandard", extra="data")
        self._frame: Any = None
        self._input = self._output = b""
        self._given = 0

    def read(self, size: int, /) -> bytes:
        while self._given == len(self._output):
            data, self._input = self._input or self._file.read(_ZSTD_CHUNK), b""
            if not data:
                if self._frame is not None:
                    raise _damaged(self._shown, "it ends within a frame")
                return b""
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._output, self._given = self._frame.decompress(data), 0
            except self._library.ZstdError as error:
                raise _damaged(self._shown, error) from error
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        found = self._output[self._given : self._given + size]
        self._given += len(found)
        return found


def _damaged(shown: str, why: object) -> DataError:
    return DataError(f"{shown}: the compressed data is damaged or cut ({why}). Copy the file again.")


def lines_of_block(file: InputFile, span: tuple[int, int], *, limit: int) -> Iterator[Raw]:
    """The lines of a plain file that start in [span): line numbers count from the block's first one."""
    start, stop = span
    with Path(file.path).open("rb") as opened:
        opened.seek(max(0, start - 1))
        yield from lines(opened, start=start, stop=stop, limit=limit, joins=start > 0)


def lines(
    stream: Stream,
    *,
    limit: int,
    start: int = 0,
    stop: int | None = None,
    joins: bool = False,
    expands: str = "",
) -> Iterator[Raw]:
    """Lines of a stream; one longer than ``limit`` is read past, not held.

    Args:
        start: offset of the first line that counts.
        stop: lines that start here or later are not read.
        joins: the stream starts one byte before ``start``, in a line that is not counted.
        expands: name of the file if it is compressed; a row without an end is then an error.
    """
    number, offset = 0, start - joins
    held: list[bytes] = []
    size = 0
    while chunk := stream.read(_CHUNK):
        first, *others = chunk.split(b"\n")
        size += len(first)
        if size <= limit:
            held.append(first)
        else:
            held.clear()
        if expands and size > _GIVE_UP_BYTES:
            raise DataError(
                f"{expands}:{number + 1}: the row expands to more than {_GIVE_UP_BYTES / 1e9:.1f} GB. "
                "Remove it: the file is damaged or a trap."
            )
        if joins and not others and stop is not None and offset + size >= stop:
            return
        for part in others:
            if joins:
                joins = False
            else:
                number += 1
                yield _line(number, offset, size, held, limit)
            offset += size + 1
            if stop is not None and offset >= stop:
                return
            held, size = [part] if len(part) <= limit else [], len(part)
    if size and not joins:
        yield _line(number + 1, offset, size, held, limit)


def _line(number: int, offset: int, size: int, held: list[bytes], limit: int) -> Raw:
    if size > limit:
        return Raw(number, offset, size, too_long(size, limit))
    content = held[0] if len(held) == 1 else b"".join(held)
    if offset == 0:
        content = content.removeprefix(b"\xef\xbb\xbf")
    return Raw(number, offset, size + 1, content)


def too_long(size: int, limit: int) -> BadRow:
    """The refusal of a row of more than ``limit`` bytes."""
    return BadRow(f"a row of {size} bytes, --max-row-mb allows {limit / 1e6:g} MB. Split it", reason="row too long")


def position(file: BinaryIO) -> int:
    """How much of a file, as it lies on disk, has been read."""
    return os.lseek(file.fileno(), 0, os.SEEK_CUR)
