"""A corpus inside a run: the pair on disk, its name, its share, and the shapes of its documents."""

import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.data import order
from unimega.data.reader import IndexedCorpus
from unimega.data.tokenize import SpecialIds, locate
from unimega.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]
BOTH, T2I_ONLY, I2T_ONLY = range(3)
DIRECTIONS = ("both", "t2i", "i2t")
"""What may be done with the pairs of a corpus; a direction's number is its place."""
_ADVISED_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus and how a run uses it."""

    path: str
    """Prefix of its files."""
    weight: float = 1.0
    """Share of tokens after assembly, relative to the other corpora's."""
    epochs: float | None = None
    """How often the run reads it, in place of a weight."""
    direction: str = "both"
    name: str = ""
    """Seeds its order; absent: the last part of the path."""
    megatron: bool = False
    """Megatron-LM wrote it: text with mode bytes and without a sidecar. Not needed where it has no mode bytes."""


def vision_ids(prefixes: Sequence[str], *, separators: bool = False) -> tuple[int, ...]:
    """Ids below the codes that belong to vision, as the corpora's tokenizer has them, if it has them.

    Begin of image, and with ``separators`` what ends the rows of an image.

    Raises:
        DataError: a corpus is missing or damaged.
    """
    corpora = [IndexedCorpus(prefix, megatron=not Path(f"{prefix}.json").exists()) for prefix in prefixes]
    sidecars = [corpus.sidecar for corpus in corpora]
    names = ("vision_start", "vision_pad") if separators else ("vision_start",)
    found = {sidecar["tokenizer"]["special"].get(name) for sidecar in sidecars if sidecar for name in names}
    return tuple(sorted(number for number in found if number is not None))


@dataclass(frozen=True)
class Stored:
    """n documents as the files hold them, S sequences in all."""

    corpus: npt.NDArray[np.int16]
    """[n] number of each document's corpus in the run."""
    key: npt.NDArray[np.uint64]
    """[n] what seeds the draws of its corpus."""
    epoch: Ints
    document: Ints
    direction: npt.NDArray[np.int8]
    """[n] what may be done with it if it is a pair."""
    ended: npt.NDArray[np.bool_]
    """[n] whether its last sequence ends in eos once it is laid out, by being an answer or by what is stored."""
    starts: Ints
    """[n + 1] places in the arrays below."""
    address: Ints
    """[S] first element in `.bin`."""
    length: Ints
    mode: npt.NDArray[np.int8]

    @staticmethod
    def joined(parts: Sequence["Stored"]) -> "Stored":
        """All documents of the parts, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in Stored.__dataclass_fields__
        }
        counts = np.concatenate([np.diff(part.starts) for part in parts])
        columns["starts"] = np.concatenate(([0], np.cumsum(counts)))
        return Stored(**columns)


class Corpus:
    """An opened and checked corpus of a run."""

    def __init__(self, source: Source) -> None:
        """Open the files and check all of the index.

        Raises:
            ConfigError: the rows leave no such direction.
            DataError: the files are missing, damaged or hold no document.
        """
        self.source = source
        self.name = source.name or Path(source.path).name
        self.key = zlib.crc32(self.name.encode())
        self.reader = IndexedCorpus(source.path, megatron=source.megatron)
        self.reader.check()
        self.num_documents = self.reader.num_documents
        if self.num_documents == 0:
            raise DataError(f"{self.reader.index_path}: 0 documents. A corpus needs at least one.")
        self._check_modalities()
        sidecar = self.reader.sidecar
        self.special = SpecialIds.from_sidecar(sidecar["tokenizer"]["special"]) if sidecar else None
        self.fingerprint: str | None = sidecar["tokenizer"]["sha256"] if sidecar else None
        self._check_direction()
        self.may_hold_eos = sidecar is None or bool(sidecar["counts"].get("text_documents_with_eos", 1))

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        """The sidecar's vocabulary with the tokenizer's size, or None without a sidecar."""
        sidecar = self.reader.sidecar
        return {**sidecar["vocabulary"], "size": sidecar["tokenizer"]["size"]} if sidecar else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer lay when the corpus was written, if it is still there."""
        sidecar = self.reader.sidecar
        if sidecar is None or "path" not in sidecar["tokenizer"]:
            return None
        folder = self.reader.sidecar_path.parent / sidecar["tokenizer"]["path"]
        return folder if locate(folder) else None

    @property
    def has_images(self) -> bool:
        """Whether any image is stored."""
        return bool(self.reader.sidecar and self.reader.sidecar["counts"]["images"])

    @cached_property
    def stored_tokens(self) -> int:
        """Elements of all sequences."""
        return int(self.reader.lengths.sum(dtype=np.int64))

    def stream(self, seed: int, start: int, count: int) -> tuple[Ints, Ints]:
        """Epochs and documents at places [start, start + count) of the endless shuffled stream: int64 [count] each."""
        size = self.num_documents
        if size <= order.SORTED_BELOW:  # many epochs at once
            first, last = start // size, (start + count + size - 1) // size
            keys = order.draw(seed, self.key, np.arange(first, last))
            places = np.arange(start, start + count, dtype=np.int64)
            return places // size, order.permute_whole(size, keys).ravel()[places - first * size]
        epochs, documents = [], []
        while count:
            epoch, place = divmod(start, size)
            take = min(count, size - place)
            key = order.draw_word(seed, self.key, epoch)
            documents.append(order.permute(size, key, place, take))
            epochs.append(np.full(take, epoch, dtype=np.int64))
            start, count = start + take, count - take
        return np.concatenate(epochs), np.concatenate(documents)

    def read_ahead(self, address: Ints, length: Ints) -> None:
        """Ask the operating system for runs of elements; short ones are not worth a call and come with their page."""
        if not hasattr(os, "posix_fadvise"):
            return
        if not len(address):
            return
        size = self.reader.dtype.itemsize
        borders = np.flatnonzero(address[1:] != address[:-1] + length[:-1]) + 1  # a document is mostly one run
        first = np.concatenate(([0], borders))
        starts = address[first] * size
        bytes_of_run = np.add.reduceat(length, first) * size
        long = bytes_of_run >= _ADVISED_BYTES
        for start, count in zip(starts[long].tolist(), bytes_of_run[long].tolist(), strict=True):
            os.posix_fadvise(self._file.fileno(), start, count, os.POSIX_FADV_WILLNEED)

    @cached_property
    def _file(self) -> FileIO:
        return self.reader.bin_path.open("rb", buffering=0)

    def source_of(self, document: int) -> str:
        """The file that a document came from, for messages."""
        if self.reader.sidecar is None:
            return self.reader.bin_path.name
        sources = self.reader.sidecar["sources"]
        at = bisect_right([item["first_document"] for item in sources], document) - 1
        return str(sources[at]["path"])

    def gather(self, epochs: Ints, documents: Ints, *, eos: int, number: int = 0) -> Stored:
        """Look documents up in the index, vectorised over them; ``number`` is this corpus's in the run."""
        reader = self.reader
        first = reader.documents[documents]
        count = reader.documents[documents + 1] - first
        starts = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(count, out=starts[1:])
        sequence = np.arange(starts[-1]) + np.repeat(first - starts[:-1], count)
        mode = reader.modes[sequence]
        return Stored(
            corpus=np.full(len(documents), number, dtype=np.int16),
            key=np.full(len(documents), self.key, dtype=np.uint64),
            epoch=epochs,
            document=documents,
            direction=self._directions(documents),
            ended=self._end_in_eos(first, count, mode, starts[:-1], eos),
            starts=starts,
            address=reader.pointers[sequence] // reader.dtype.itemsize,
            length=reader.lengths[sequence].astype(np.int64),
            mode=mode,
        )

    def _end_in_eos(
        self, first: Ints, count: Ints, mode: npt.NDArray[np.int8], starts: Ints, eos: int
    ) -> npt.NDArray[np.bool_]:
        """Whether a document's own sequences end in eos already: after an answer, or a Megatron-LM text."""
        ended = np.zeros(len(first), dtype=np.bool_)
        some = np.flatnonzero(count > 0)
        last = mode[starts[some] + count[some] - 1]
        ended[some] = layout.role_of(last) == layout.ANSWER
        if self.may_hold_eos:
            plain = some[(layout.modality_of(last) == layout.TEXT) & ~ended[some]]
            ended[plain] = self.reader.last_ids(first[plain] + count[plain] - 1) == eos
        return ended

    def _check_modalities(self) -> None:
        highest = int(layout.modality_of(self.reader.modes).max(initial=0))
        if highest > layout.VISION:
            raise DataError(f"{self.reader.index_path}: a sequence of modality {highest}; known are 0 text, 1 vision.")

    def _check_direction(self) -> None:
        run = DIRECTIONS.index(self.source.direction)
        for number in set(self._source_table[1].tolist()) - {BOTH, run}:
            if run != BOTH:
                raise ConfigError(
                    f"data.train direction='{self.source.direction}' of {self.name} is wrong. Rows of "
                    f"{self.reader.sidecar_path} are {DIRECTIONS[number]} only. Use 'both'."
                )

    @cached_property
    def _source_table(self) -> tuple[Ints, npt.NDArray[np.int8]]:
        sources = self.reader.sidecar["sources"] if self.reader.sidecar else []
        borders = np.asarray([item["first_document"] for item in sources], dtype=np.int64)
        return borders, np.asarray([DIRECTIONS.index(item.get("direction", "both")) for item in sources], dtype=np.int8)

    def _directions(self, documents: Ints) -> npt.NDArray[np.int8]:
        """What may be done with each document: the run's direction where the rows leave it open, else the rows'."""
        run = DIRECTIONS.index(self.source.direction)
        borders, stored = self._source_table
        if not len(borders) or not stored.any():
            return np.full(len(documents), run, dtype=np.int8)
        own = stored[np.searchsorted(borders, documents, side="right") - 1]
        return np.where(own == BOTH, run, own).astype(np.int8)
