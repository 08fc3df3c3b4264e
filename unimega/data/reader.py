"""Open a `.bin/.idx` pair: views of the two maps, and the checks that a damaged pair does not pass."""

import json
import mmap
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.errors import DataError

_SIDECAR_KEYS = {
    "tokenizer": ("size", "sha256", "special"),
    "vocabulary": ("text", "codebook"),
    "counts": ("documents", "sequences", "images"),
    "bin": ("bytes", "block_bytes", "crc32"),
    "idx": ("bytes", "crc32"),
}
_DAMAGED = "The file is damaged; write it again."


class IndexedCorpus:
    """A corpus on disk. Arrays are views that own their map: they outlive this object and nobody closes it."""

    def __init__(self, prefix: str | Path) -> None:
        """Open ``PREFIX.idx``, ``PREFIX.bin`` and ``PREFIX.json``; cost does not depend on their size.

        Raises:
            DataError: a file is missing, is not of this format, or sizes contradict each other.
        """
        self.prefix = str(prefix)
        self.index_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        self.sidecar_path = Path(f"{prefix}.json")
        if not self.index_path.is_file():
            raise DataError(
                f"{self.index_path}: not there. Preprocessing was not finished, or the prefix is wrong; run it again."
            )
        if not self.bin_path.is_file():
            raise DataError(f"{self.bin_path}: not there, but {self.index_path.name} is. Copy both.")
        raw = _mapped(self.index_path)
        header = _read_header(self.index_path, raw)
        self.sidecar: dict[str, Any] | None = _read_sidecar(self.sidecar_path)
        self.has_modes = self._decide_modes(len(raw), header)
        self.dtype = np.dtype(layout.DTYPES[header.dtype_code])
        self._raw = raw
        place, sequences = layout.HEADER_BYTES, header.sequences
        self.lengths: npt.NDArray[np.int32] = raw[place : place + 4 * sequences].view("<i4")
        """int32 [S] elements of each sequence."""
        place += 4 * sequences
        self.pointers: npt.NDArray[np.int64] = raw[place : place + 8 * sequences].view("<i8")
        """int64 [S] byte offset of each sequence."""
        place += 8 * sequences
        self.documents: npt.NDArray[np.int64] = raw[place : place + 8 * header.entries].view("<i8")
        """int64 [documents + 1] first sequence of each document, then S."""
        place += 8 * header.entries
        self.modes: npt.NDArray[np.int8] = (
            raw[place:].view("i1") if self.has_modes else np.zeros(sequences, dtype=np.int8)
        )
        """int8 [S] mode bytes; zeros (text) in a file without."""
        self._check_ends()

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return _mapped(self.bin_path)

    @cached_property
    def _elements(self) -> np.ndarray[Any, Any]:
        """All of `.bin` as elements; every checked pointer is a multiple of their size."""
        size = self.dtype.itemsize
        return self._bytes[: len(self._bytes) // size * size].view(self.dtype)

    def sequence(self, number: int) -> np.ndarray[Any, Any]:
        """The ids of a sequence, in the file's dtype: a read-only view."""
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self._elements[start : start + int(self.lengths[number])]

    def last_ids(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The last id of each sequence, -1 for an empty one."""
        lengths = self.lengths[sequences].astype(np.int64)
        last = self.pointers[sequences] // self.dtype.itemsize + lengths - 1
        found = self._elements[np.where(lengths > 0, last, 0)] if len(self._elements) else np.zeros(len(last))
        return np.where(lengths > 0, found, -1).astype(np.int64)

    def check(self) -> None:
        """Check every length, pointer, document border and mode, and the sidecar's sum of the index.

        Raises:
            DataError: names the file, the entry and both values.
        """
        if self.sequences:
            self._check_sequences()
        falling = np.diff(self.documents) < 0
        if falling.any():
            at = int(np.argmax(falling))
            raise DataError(
                f"{self.index_path}: document {at} starts at sequence {self.documents[at]}, the next at "
                f"{self.documents[at + 1]}. {_DAMAGED}"
            )
        if self.sidecar is not None:
            found, expected = f"{zlib.crc32(self._raw.data):08x}", self.sidecar["idx"]["crc32"]
            if found != expected:
                raise DataError(
                    f"{self.index_path}: crc32 is {found}, {self.sidecar_path.name} says {expected}. {_DAMAGED}"
                )

    def check_blocks(self) -> None:
        """Check the sum of every block of `.bin` against the sidecar.

        Raises:
            DataError: names the first block that differs.
        """
        if self.sidecar is None:
            return
        block = int(self.sidecar["bin"]["block_bytes"])
        for number, expected in enumerate(self.sidecar["bin"]["crc32"]):
            found = f"{zlib.crc32(self._bytes[number * block : (number + 1) * block].data):08x}"
            if found != expected:
                raise DataError(
                    f"{self.bin_path}: crc32 of block {number} is {found}, {self.sidecar_path.name} says {expected}. "
                    f"{_DAMAGED}"
                )

    def _check_sequences(self) -> None:
        name, size, total = self.index_path, self.dtype.itemsize, self.bin_path.stat().st_size
        if int(self.lengths.min()) < 0:
            at = int(np.argmax(self.lengths < 0))
            raise DataError(f"{name}: length of sequence {at} is {self.lengths[at]}, below 0. {_DAMAGED}")
        bad = (self.pointers < 0) | (self.pointers % size != 0)
        if bad.any():
            at = int(np.argmax(bad))
            raise DataError(
                f"{name}: sequence {at} starts at byte {self.pointers[at]}, not a multiple of {size}. {_DAMAGED}"
            )
        past = self.pointers > total - self.lengths.astype(np.int64) * size
        if past.any():
            self._refuse_end(int(np.argmax(past)), total)
        unused = (self.modes & np.int8(~0x3F)) != 0
        if unused.any():
            at = int(np.argmax(unused))
            byte = int(self.modes[at]) & 0xFF
            raise DataError(f"{name}: mode {byte:#04x} of sequence {at} has reserved bits set. {_DAMAGED}")

    def _refuse_end(self, sequence: int, total: int) -> NoReturn:
        end = int(self.pointers[sequence]) + int(self.lengths[sequence]) * self.dtype.itemsize
        raise DataError(
            f"{self.bin_path}: {total} bytes, but sequence {sequence} ends at byte {end}. Copy interrupted?"
        )

    def _decide_modes(self, size: int, header: layout.Header) -> bool:
        without, with_modes = header.bytes_without_modes, header.bytes_with_modes
        if size not in (without, with_modes):
            raise DataError(
                f"{self.index_path}: {size} bytes, but its header (S={header.sequences}, D={header.entries}) needs "
                f"{without} or {with_modes}. {_DAMAGED}"
            )
        has_modes = size == with_modes and (header.sequences > 0 or self.sidecar is not None)
        if has_modes and self.sidecar is None:
            raise DataError(f"{self.sidecar_path}: not there, but {self.index_path.name} has modes. Copy it too.")
        if self.sidecar is not None and not has_modes:
            raise DataError(
                f"{self.index_path}: {size} bytes, no modes, but {self.sidecar_path.name} is there: {with_modes} are "
                "needed. Copy interrupted?"
            )
        return has_modes

    def _check_ends(self) -> None:
        name = self.index_path
        if int(self.documents[0]) != 0 or int(self.documents[-1]) != self.sequences:
            raise DataError(
                f"{name}: documents run from sequence {self.documents[0]} to {self.documents[-1]}, "
                f"not from 0 to {self.sequences}. {_DAMAGED}"
            )
        size = self.bin_path.stat().st_size
        if self.sequences and int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize > size:
            self._refuse_end(self.sequences - 1, size)
        if self.sidecar is None:
            return
        pairs = (
            (self.bin_path, "bytes", size, self.sidecar["bin"]["bytes"]),
            (name, "bytes", len(self._raw), self.sidecar["idx"]["bytes"]),
            (name, "documents", self.num_documents, self.sidecar["counts"]["documents"]),
            (name, "sequences", self.sequences, self.sidecar["counts"]["sequences"]),
        )
        for path, what, found, expected in pairs:
            if found != expected:
                raise DataError(
                    f"{path}: {found} {what}, but {self.sidecar_path.name} says {expected}. "
                    "Files of different runs, or a copy interrupted?"
                )


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file as a read-only view that owns its map."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def _read_header(path: Path, raw: npt.NDArray[np.uint8]) -> layout.Header:
    start = raw[: layout.HEADER_BYTES].tobytes()
    magic = start[: len(layout.MAGIC)]
    if magic != layout.MAGIC:
        shown = " ".join(f"{byte:02x}" for byte in magic[:4]) or "(0 bytes)"
        raise DataError(f"{path}: magic {shown} is not MMIDIDX: not an index file, or cut.")
    if len(start) < layout.HEADER_BYTES:
        raise DataError(f"{path}: {len(start)} bytes, a header alone has {layout.HEADER_BYTES}. {_DAMAGED}")
    version, code, sequences, entries = layout.HEADER.unpack(start[len(layout.MAGIC) :])
    if version != layout.VERSION:
        raise DataError(f"{path}: version {version}, this reader knows {layout.VERSION}. {_DAMAGED}")
    if code not in layout.DTYPES or np.dtype(layout.DTYPES[code]).kind == "f":
        raise DataError(f"{path}: dtype code {code} is not an integer type (1-5 or 8). {_DAMAGED}")
    if entries < 1:
        raise DataError(f"{path}: a document index of 0 entries; it has at least 1. {_DAMAGED}")
    return layout.Header(code, sequences, entries)


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        sidecar = json.loads(path.read_bytes())
        known = sidecar["format"] == layout.SIDECAR_FORMAT and sidecar["version"] == layout.SIDECAR_VERSION
        missing = [f"{part}.{key}" for part, keys in _SIDECAR_KEYS.items() for key in keys if key not in sidecar[part]]
        if missing:
            raise KeyError(missing[0])
        _ = [(source["first_document"], source["path"]) for source in sidecar["sources"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a sidecar of {layout.SIDECAR_FORMAT} ({type(error).__name__}: {error}). {_DAMAGED}"
        ) from error
    if not known:
        raise DataError(
            f"{path}: format {sidecar['format']!r} version {sidecar['version']!r}, this reader knows "
            f"{layout.SIDECAR_FORMAT!r} version {layout.SIDECAR_VERSION}."
        )
    return dict(sidecar)
