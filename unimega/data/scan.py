"""Go through the ids of a corpus in bounded memory: a chunk at a time, gathered without a loop over sequences."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.data.reader import IndexedCorpus

Ints = npt.NDArray[np.int64]

CHUNK_TOKENS = 1 << 20
_CHUNK_SEQUENCES = 1 << 18
MODALITIES = ("text", "vision")
"""Names of the modalities; a modality's number is its place."""


@dataclass(frozen=True)
class Pieces:
    """Runs of ids, each inside one sequence; arrays int64 [P]. A sequence that is longer than a chunk is in many."""

    sequence: Ints
    """Number of the sequence."""
    start: Ints
    """First element in `.bin`."""
    length: Ints
    """Ids of the piece."""
    left: Ints
    """Ids from ``start`` to the end of the sequence: at least ``length``."""

    def positions(self, size: int = 1) -> Ints:
        """Elements of `.bin` where a run of ``size`` ids starts in a piece and ends in its sequence."""
        return expand(self.start, np.minimum(self.length, self.left - size + 1))


def expand(start: Ints, length: Ints) -> Ints:
    """``start[0], start[0] + 1, ... (length[0] of them), start[1], ...``; lengths below 0 count as 0."""
    length = np.maximum(length, 0)
    ends = np.cumsum(length)
    places: Ints = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(start - (ends - length), length)
    return places


def pieces(
    corpus: IndexedCorpus, modality: int, *, documents: tuple[int, int] | None = None, chunk_tokens: int = CHUNK_TOKENS
) -> Iterator[Pieces]:
    """All ids of one modality, in the order of the sequences, about ``chunk_tokens`` at a time.

    Args:
        corpus: checked.
        modality: its number.
        documents: first document and the one behind the last; absent: all.
        chunk_tokens: most ids of a chunk.
    """
    first, last = documents or (0, corpus.num_documents)
    stop = int(corpus.documents[last])
    for begin in range(int(corpus.documents[first]), stop, _CHUNK_SEQUENCES):
        until = min(stop, begin + _CHUNK_SEQUENCES)
        chosen = np.flatnonzero(layout.modality_of(corpus.modes[begin:until]) == modality)
        length = corpus.lengths[begin:until][chosen].astype(np.int64)
        start = corpus.pointers[begin:until][chosen] // corpus.dtype.itemsize
        cut = np.maximum(1, -(-length // chunk_tokens))
        part = expand(np.zeros(len(cut), dtype=np.int64), cut)
        whole = _Whole(chosen + begin, start, length)
        yield from _chunks(whole, np.repeat(np.arange(len(cut)), cut), part * chunk_tokens, chunk_tokens)


@dataclass(frozen=True)
class _Whole:
    sequence: Ints
    start: Ints
    length: Ints


def _chunks(whole: _Whole, owner: Ints, offset: Ints, most: int) -> Iterator[Pieces]:
    """Pieces number ``owner`` from ``offset`` on, grouped until a chunk is full."""
    left = whole.length[owner] - offset
    length = np.minimum(left, most)
    sums = np.cumsum(length)
    place = 0
    while place < len(owner):
        before = int(sums[place] - length[place])
        end = max(place + 1, int(np.searchsorted(sums, before + most, side="right")))
        here = slice(place, end)
        start = whole.start[owner[here]] + offset[here]
        yield Pieces(whole.sequence[owner[here]], start, length[here], left[here])
        place = end
