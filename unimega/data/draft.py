"""Packs as lists of pieces, and where their tokens are taken from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.config.vocabulary import Vocabulary
from unimega.data.corpus import Ints
from unimega.data.pieces import LITERAL, PAD, VISION, Pieces

Elements = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Draft:
    """Packs in pieces. The last document of a pack that is not full is its pads."""

    pieces: Pieces
    pack_starts: Ints
    """[packs + 1] first document of each pack."""

    def slice(self, first: int, stop: int) -> "Draft":
        """Packs ``first`` to ``stop``, as views."""
        a, b = int(self.pack_starts[first]), int(self.pack_starts[stop])
        return Draft(self.pieces.slice(a, b), self.pack_starts[first : stop + 1] - a)


@dataclass(frozen=True, kw_only=True)
class Filling:
    """What tokens are taken from."""

    elements: Sequence[Elements]
    """All of `.bin`, per corpus."""
    literals: npt.NDArray[np.int32]
    vocabulary: Vocabulary
    pad: int
    row_separator: int = 0
    separator: int = 0
    """The id behind every ``row_separator`` codes."""

    @cached_property
    def text_limit(self) -> int:
        """Ids of text are below it."""
        return self.vocabulary.starts[1] if len(self.vocabulary.starts) > 1 else self.vocabulary.codes[0]

    @cached_property
    def vision_ids(self) -> npt.NDArray[np.int32]:
        """int32: ids below ``text_limit`` that are not text."""
        return np.asarray([one for ids in self.vocabulary.ids[1:] for one in ids], dtype=np.int32)


class OutOfPlace(Exception):
    """An id is not of the modality that its place asks for: the files are damaged or not what they say."""


@dataclass(frozen=True)
class Stray:
    """Where an id is out of place."""

    pack: int
    """In the draft."""
    document: int
    """In the pack."""
    position: int
    """In the pack."""
    id: int
    in_image: bool


def find_stray(draft: Draft, filling: Filling) -> Stray | None:
    """The first id for which ``collate`` raises ``OutOfPlace``, found one piece after another."""
    pieces, vocabulary = draft.pieces, filling.vocabulary
    for pack in range(len(draft.pack_starts) - 1):
        position, first = 0, int(draft.pack_starts[pack])
        for document in range(first, int(draft.pack_starts[pack + 1])):
            for at in range(int(pieces.starts[document]), int(pieces.starts[document + 1])):
                flags, size, address = int(pieces.flags[at]), int(pieces.length[at]), int(pieces.address[at])
                if flags & VISION and not flags & LITERAL:
                    ids = filling.elements[pieces.corpus[at]][address : address + _codes(size, filling)]
                    bad = (ids < 0) | (ids >= vocabulary.codes[VISION])
                    ids = ids.astype(np.int64) + vocabulary.starts[VISION]
                elif not flags & VISION:
                    source = filling.literals if flags & LITERAL else filling.elements[pieces.corpus[at]]
                    ids = source[address : address + size]
                    bad = (ids < 0) | (vocabulary.modality_of(ids) != 0) | (ids >= vocabulary.rows)
                    bad &= not flags & PAD
                else:
                    bad = np.zeros(1, dtype=np.bool_)
                if bad.any():
                    place = int(np.argmax(bad))
                    inside = (
                        place + place // filling.row_separator if flags & VISION and filling.row_separator else place
                    )
                    return Stray(pack, document - first, position + inside, int(ids[place]), bool(flags & VISION))
                position += size
    return None


def _codes(tokens: int, filling: Filling) -> int:
    """How many codes an image of so many tokens between its borders has."""
    return tokens - tokens // (filling.row_separator + 1) if filling.row_separator else tokens
