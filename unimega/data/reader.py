"""Open a `.bin/.idx` pair: views of the two maps, and the checks that a damaged pair does not pass."""

import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.data.files import exists, mapped
from unimega.data.sidecar import read_sidecar
from unimega.errors import DataError

CHECKED_BYTES = 256 << 20
"""Up to this size `.bin` is summed by ``check`` too: it takes less than 0.1 s."""
_CHUNK = 1 << 20
_BIG_CHUNK = 1 << 24
_UNUSED_MODE_BITS = np.int8(~(layout.MODALITY_BITS | layout.CONTEXT_BIT | layout.ROLE_BITS))


class IndexedCorpus:
    """A corpus on disk. Arrays are views that own their map: they outlive this object and nobody closes it."""

    def __init__(self, prefix: str | Path, *, megatron: bool = False) -> None:
        """Open ``PREFIX.idx``, ``PREFIX.bin`` and ``PREFIX.json``; time and memory do not depend on their size.

        Args:
            prefix: path of the three without their endings.
            megatron: Megatron-LM wrote it: no sidecar is looked for, and mode bytes may be there if all of them are
                text. Not needed for a file without mode bytes.

        Raises:
            DataError: a file is missing, is not of this format, or sizes contradict each other.
        """
        self.prefix, self.megatron = str(prefix), megatron
        self.index_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        self.sidecar_path = Path(f"{prefix}.json")
        _check_there(self.prefix, self.index_path, self.bin_path)
        raw = mapped(self.index_path)
        header = _read_header(self.index_path, raw)
        self.sidecar: dict[str, Any] | None = None if megatron else read_sidecar(self.sidecar_path)
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
            raw[place:].view("i1") if self.has_modes else np.broadcast_to(np.int8(layout.MODE_TEXT), sequences)
        )
        """int8 [S] mode bytes; text in a file without."""
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
        return mapped(self.bin_path)

    @cached_property
    def elements(self) -> np.ndarray[Any, Any]:
        """All of `.bin` as elements; every checked pointer is a multiple of their size."""
        size = self.dtype.itemsize
        return self._bytes[: len(self._bytes) // size * size].view(self.dtype)

    def sequence(self, number: int) -> np.ndarray[Any, Any]:
        """The ids of a sequence, in the file's dtype: a read-only view."""
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.elements[start : start + int(self.lengths[number])]

    def last_ids(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The last id of each sequence, -1 for an empty one."""
        lengths = self.lengths[sequences].astype(np.int64)
        last = self.pointers[sequences] // self.dtype.itemsize + lengths - 1
        found = self.elements[np.where(lengths > 0, last, 0)] if len(self.elements) else np.zeros(len(last))
        return np.where(lengths > 0, found, -1).astype(np.int64)

    def check(self) -> None:
        """Check every length, pointer, document border and mode, the sums of the index and of a `.bin` that is small.

        Memory stays bounded; `.bin` above ``CHECKED_BYTES`` is left to ``check_blocks``.

        Raises:
            DataError: names the file, the entry and both values.
        """
        self.check_index()
        if self._bin_size <= CHECKED_BYTES:
            self.check_blocks()

    def check_index(self) -> None:
        """Check every length, pointer, document border and mode, and the sum of the index.

        Raises:
            DataError: names the file, the entry and both values.
        """
        for start in range(0, self.sequences, _CHUNK):
            self._check_sequences(start, start + _CHUNK)
        for start in range(0, self.num_documents, _CHUNK):
            borders = self.documents[start : start + _CHUNK + 1]
            if (falling := borders[1:] < borders[:-1]).any():
                at = int(np.argmax(falling))
                raise DataError(
                    f"{self.index_path}: document {start + at} starts at sequence {borders[at]}, the next at "
                    f"{borders[at + 1]}. {layout.DAMAGED}"
                )
        if self.sidecar is not None:
            found, expected = f"{_crc32(self._raw):08x}", self.sidecar["idx"]["crc32"]
            if found != expected:
                raise DataError(
                    f"{self.index_path}: crc32 is {found}, {self.sidecar_path.name} says {expected}. {layout.DAMAGED}"
                )

    def check_blocks(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Check the sum of every block of `.bin` against the sidecar; ``progress`` hears of the bytes of each.

        Raises:
            DataError: names the first block that differs.
        """
        for first in self.damaged_blocks(progress):
            raise DataError(first)

    def damaged_blocks(self, progress: Callable[[int], None] = lambda _: None) -> Iterator[str]:
        """One line for each block of `.bin` whose sum differs from the sidecar's; none without a sidecar."""
        if self.sidecar is None:
            return
        block = int(self.sidecar["bin"]["block_bytes"])
        for number, expected in enumerate(self.sidecar["bin"]["crc32"]):
            part = self._bytes[number * block : (number + 1) * block]
            if (found := f"{_crc32(part):08x}") != expected:
                yield (
                    f"{self.bin_path}: crc32 of block {number} (bytes {number * block} to {number * block + len(part)})"
                    f" is {found}, {self.sidecar_path.name} says {expected}. {layout.DAMAGED}"
                )
            progress(len(part))

    @property
    def _bin_size(self) -> int:
        return self.bin_path.stat().st_size

    def _check_sequences(self, start: int, stop: int) -> None:
        name, size, total = self.index_path, self.dtype.itemsize, self._bin_size
        lengths, pointers = self.lengths[start:stop], self.pointers[start:stop]
        if int(lengths.min()) < 0:
            at = int(np.argmax(lengths < 0))
            raise DataError(f"{name}: length of sequence {start + at} is {lengths[at]}, below 0. {layout.DAMAGED}")
        if int(pointers.min()) < 0 or (pointers % size).any():
            at = int(np.argmax((pointers < 0) | (pointers % size != 0)))
            raise DataError(
                f"{name}: sequence {start + at} starts at byte {pointers[at]}, not a multiple of {size}. "
                f"{layout.DAMAGED}"
            )
        past = pointers > total - lengths.astype(np.int64) * size
        if past.any():
            self._refuse_end(start + int(np.argmax(past)), total)
        if not self.has_modes:
            return
        modes = self.modes[start:stop]
        if (unused := (modes & _UNUSED_MODE_BITS) != 0).any():
            at = int(np.argmax(unused))
            byte = int(modes[at]) & 0xFF
            raise DataError(
                f"{name}: mode {byte:#04x} of sequence {start + at} has reserved bits set. {layout.DAMAGED}"
            )
        if self.sidecar is None and modes.any():
            at = int(np.argmax(modes != 0))
            raise DataError(
                f"{name}: mode {int(modes[at]):#04x} of sequence {start + at} is not text. Without a sidecar only text "
                "can be read: what its images were made with is not known."
            )

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
                f"{without} or {with_modes}. {layout.DAMAGED}"
            )
        has_modes = size == with_modes and (header.sequences > 0 or self.sidecar is not None)
        if has_modes and self.sidecar is None and not self.megatron:
            raise DataError(
                f"{self.sidecar_path}: not there, but {self.index_path.name} has modes. Copy it too. If it is text "
                "that Megatron-LM wrote, say so: megatron = true beside its path, --megatron in a tool."
            )
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
                f"not from 0 to {self.sequences}. {layout.DAMAGED}"
            )
        size = self._bin_size
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


def _check_there(prefix: str, index_path: Path, bin_path: Path) -> None:
    if not exists(index_path):
        for ending in (".idx", ".bin", ".json"):
            if prefix.endswith(ending):
                raise DataError(
                    f"prefix='{prefix}' is wrong. Name it without its ending: {prefix.removesuffix(ending)}."
                )
        if Path(prefix).is_dir():
            inside = sorted(path.stem for path in Path(prefix).glob("*.idx"))
            known = ", ".join(str(Path(prefix) / stem) for stem in inside[:5]) or "none is in it"
            raise DataError(f"prefix='{prefix}' is wrong. It is a folder; name a corpus in it: {known}.")
        raise DataError(
            f"{index_path}: not there. Preprocessing was not finished, or the prefix is wrong; run it again."
        )
    if not exists(bin_path):
        raise DataError(f"{bin_path}: not there, but {index_path.name} is. Copy both.")


def _read_header(path: Path, raw: npt.NDArray[np.uint8]) -> layout.Header:
    start = raw[: layout.HEADER_BYTES].tobytes()
    magic = start[: len(layout.MAGIC)]
    if magic != layout.MAGIC:
        shown = " ".join(f"{byte:02x}" for byte in magic[:4]) or "(0 bytes)"
        raise DataError(f"{path}: magic {shown} is not MMIDIDX: not an index file, or cut.")
    if len(start) < layout.HEADER_BYTES:
        raise DataError(f"{path}: {len(start)} bytes, a header alone has {layout.HEADER_BYTES}. {layout.DAMAGED}")
    version, code, sequences, entries = layout.HEADER.unpack(start[len(layout.MAGIC) :])
    if version != layout.VERSION:
        raise DataError(f"{path}: version {version}, this reader knows {layout.VERSION}. {layout.DAMAGED}")
    if code not in layout.DTYPES or np.dtype(layout.DTYPES[code]).kind == "f":
        raise DataError(f"{path}: dtype code {code} is not an integer type (1-5 or 8). {layout.DAMAGED}")
    if entries < 1:
        raise DataError(f"{path}: a document index of 0 entries; it has at least 1. {layout.DAMAGED}")
    return layout.Header(code, sequences, entries)


def _crc32(data: npt.NDArray[np.uint8]) -> int:
    """In parts: pages that were read may leave memory again before the end."""
    total = 0
    for start in range(0, len(data), _BIG_CHUNK):
        total = zlib.crc32(data[start : start + _BIG_CHUNK].data, total)
    return total
