"""Documents as runs of tokens that are alike: the form in which they are measured, cut, put in order and filled."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.data.corpus import Ints

VISION, WANTED, LITERAL, PAD = 1, 2, 4, 8
"""Bits of a piece: its tokens are vision, are targets of the tokens before them, are not in `.bin`, fill a pack up."""


@dataclass(frozen=True)
class Pieces:
    """n documents of P pieces in all, none of them empty."""

    starts: Ints
    """[n + 1] first piece of each document."""
    address: Ints
    """[P] first element in `.bin`, or in the table of literals."""
    length: Ints
    """[P] tokens."""
    flags: npt.NDArray[np.uint8]
    corpus: npt.NDArray[np.int16]
    """[P] whose `.bin`."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    @property
    def document_of(self) -> Ints:
        """[P] number of each piece's document."""
        return np.repeat(np.arange(self.documents), np.diff(self.starts))

    def totals(self, values: npt.NDArray[np.int64] | None = None) -> Ints:
        """[n] sum over each document's pieces, of their lengths or of ``values`` [P]."""
        sums = np.zeros(len(self.length) + 1, dtype=np.int64)
        np.cumsum(self.length if values is None else values, out=sums[1:])
        return np.diff(sums[self.starts])

    def take(self, documents: Ints) -> "Pieces":
        """The pieces of these documents, in this order."""
        count = np.diff(self.starts)[documents]
        starts = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(count, out=starts[1:])
        at = np.arange(starts[-1]) + np.repeat(self.starts[documents] - starts[:-1], count)
        return Pieces(starts, self.address[at], self.length[at], self.flags[at], self.corpus[at])

    def slice(self, first: int, stop: int) -> "Pieces":
        """Documents ``first`` to ``stop``, as views."""
        a, b = int(self.starts[first]), int(self.starts[stop])
        parts = self.address[a:b], self.length[a:b], self.flags[a:b], self.corpus[a:b]
        return Pieces(self.starts[first : stop + 1] - a, *parts)

    def clip(self, begin: Ints, length: Ints) -> "Pieces":
        """Tokens ``begin`` to ``begin + length`` [n] of each document."""
        owner = self.document_of
        sums = np.cumsum(self.length) - self.length
        offset = sums - sums[self.starts[owner]]
        low = np.clip(begin[owner] - offset, 0, self.length)
        high = np.clip(begin[owner] + length[owner] - offset, 0, self.length)
        keep = np.flatnonzero(high > low)
        starts = np.searchsorted(keep, self.starts)
        return Pieces(starts, (self.address + low)[keep], (high - low)[keep], self.flags[keep], self.corpus[keep])

    def targets(self, modalities: int) -> Ints:
        """int64 [n, M]: targets per modality of the input token; a document's first token is none."""
        wanted = (self.flags & WANTED).astype(np.int64) // WANTED
        count = wanted * (self.length - 1)
        count[:-1] += wanted[1:]
        ends = self.starts[1:] - 1  # a document's first token is no target of the one before it
        inner = ends[ends + 1 < len(wanted)]
        count[inner] -= wanted[inner + 1]
        vision = self.totals(count * (self.flags & VISION))
        result = np.zeros((self.documents, modalities), dtype=np.int64)
        result[:, 0] = self.totals(count) - vision
        if modalities > VISION:
            result[:, VISION] = vision
        return result
