"""A corpus inside a run: the pair on disk, its name, its share, and the shapes of its documents."""

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.data import order
from unimega.data.reader import IndexedCorpus
from unimega.data.tokenize import SpecialIds
from unimega.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]
BOTH, T2I_ONLY, I2T_ONLY = range(3)
DIRECTIONS = ("both", "t2i", "i2t")
"""What may be done with the pairs of a corpus; a direction's number is its place."""
_WEIGHT_UNIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus and how a run uses it."""

    path: str
    """Prefix of its files."""
    weight: float = 1.0
    """Share of tokens after assembly, relative to the other corpora's."""
    direction: str = "both"
    name: str = ""
    """Seeds its order; absent: the last part of the path."""


def vision_ids(prefixes: Sequence[str]) -> tuple[int, ...]:
    """Ids below the codes that belong to vision, as the corpora's tokenizer has them: begin of image, if it has one.

    Raises:
        DataError: a corpus is missing or damaged.
    """
    sidecars = [IndexedCorpus(prefix).sidecar for prefix in prefixes]
    found = {sidecar["tokenizer"]["special"].get("vision_start") for sidecar in sidecars if sidecar}
    return tuple(sorted(number for number in found if number is not None))


@dataclass(frozen=True)
class Shapes:
    """What the length of n documents follows from; all arrays [n]."""

    is_pair: npt.NDArray[np.bool_]
    """Exactly one caption and one image: the only documents whose direction is free."""
    direction: npt.NDArray[np.int8]
    """What may be done with a pair."""
    caption: Ints
    """Tokens of a pair's caption."""
    codes: Ints
    """Codes of a pair's image."""
    longest_image: Ints
    """Codes of the longest image; 0: none."""
    tokens: Ints
    """Tokens after assembly of a document in its stored order, begin and end of images and eos included."""
    targets: tuple[Ints, Ints]
    """Targets per modality of the input token, text and vision, of a document in its stored order."""


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
        self.weight = max(1, round(source.weight * _WEIGHT_UNIT))
        self.reader = IndexedCorpus(source.path)
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
        return folder if (folder / "tokenizer.json").is_file() else None

    @property
    def has_images(self) -> bool:
        """Whether any image is stored."""
        return bool(self.reader.sidecar and self.reader.sidecar["counts"]["images"])

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

    def source_of(self, document: int) -> str:
        """The file that a document came from, for messages."""
        if self.reader.sidecar is None:
            return self.reader.bin_path.name
        sources = self.reader.sidecar["sources"]
        at = bisect_right([item["first_document"] for item in sources], document) - 1
        return str(sources[at]["path"])

    def shapes(self, documents: Ints, *, eos: int, mask_instructions: bool) -> Shapes:
        """Shapes of the given documents, vectorised over them."""
        reader = self.reader
        first = reader.documents[documents]
        count = reader.documents[documents + 1] - first
        ends = np.cumsum(count)
        starts = ends - count
        sequence = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - starts, count)
        length = reader.lengths[sequence].astype(np.int64)
        mode = reader.modes[sequence]
        image = layout.modality_of(mode) == layout.VISION
        context = layout.is_context(mode)
        answer = layout.role_of(mode) == layout.ANSWER
        caption = mode == layout.MODE_CAPTION

        def total(values: np.ndarray[Any, Any]) -> Ints:
            sums = np.zeros(len(values) + 1, dtype=np.int64)
            np.cumsum(values, out=sums[1:])
            result: Ints = sums[ends] - sums[starts]
            return result

        emitted = length + 2 * image + answer
        wanted = ~context if mask_instructions else np.ones_like(context)
        ends_in_eos = self._end_in_eos(first, count, answer, starts, eos)
        tokens = total(emitted) + ~ends_in_eos
        vision = total((length + 1) * (image & wanted))
        text = total(np.where(image, 1, emitted) * wanted) - self._first_wanted(emitted, wanted, starts, ends)
        text += ~ends_in_eos & (tokens > 1)
        is_pair = (count == 2) & (total(image & ~context) == 1) & (total(caption) == 1)
        return Shapes(
            is_pair=is_pair,
            direction=self._directions(documents),
            caption=total(length * caption),
            codes=total(length * image),
            longest_image=_longest(length * image, starts, count),
            tokens=tokens,
            targets=(text, vision),
        )

    def _end_in_eos(
        self, first: Ints, count: Ints, answer: npt.NDArray[np.bool_], starts: Ints, eos: int
    ) -> npt.NDArray[np.bool_]:
        """Whether a document's own sequences end in eos already: after an answer, or a Megatron-LM text."""
        some = count > 0
        last = np.where(some, starts + count - 1, 0)
        ended = some & (answer[last] if len(answer) else False)
        if self.may_hold_eos:
            plain = some & ~ended
            at = np.where(plain, first + count - 1, 0)
            is_text = layout.modality_of(self.reader.modes[at]) == layout.TEXT if self.reader.sequences else plain
            plain &= is_text
            ended[plain] = self.reader.last_ids(at[plain]) == eos
        return np.asarray(ended, dtype=np.bool_)

    @staticmethod
    def _first_wanted(emitted: Ints, wanted: npt.NDArray[np.bool_], starts: Ints, ends: Ints) -> Ints:
        """1 where a document's first token lies in a wanted sequence: nothing predicts that token."""
        filled = np.flatnonzero(emitted > 0)
        if not len(filled):
            return np.zeros(len(starts), dtype=np.int64)
        place = np.minimum(np.searchsorted(filled, starts), len(filled) - 1)
        at = filled[place]
        inside = (at >= starts) & (at < ends)
        return (inside & wanted[at]).astype(np.int64)

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


def _longest(values: Ints, starts: Ints, count: Ints) -> Ints:
    """Largest value of each run of ``count`` values from ``starts``; 0 of none."""
    out = np.zeros(len(starts), dtype=np.int64)
    some = count > 0
    if some.any():
        out[some] = np.maximum.reduceat(values, starts[some])
    return out
