"""Packs in pieces to micro-batches: tokens filled in, in the order in which the model holds them.

``unimega.batch.make_microbatch`` says what a micro-batch is, token by token. Here the same comes out of pieces, runs of
tokens of one modality: every array is written in one pass, and no token is sorted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.batch import Intervals, Microbatch, TokenOrder, rows_of_rank
from unimega.config.vocabulary import Vocabulary
from unimega.data.corpus import Ints
from unimega.data.pieces import LITERAL, PAD, VISION, WANTED, Pieces

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


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What of a micro-batch depends on the rank or the model."""

    tp_rank: int = 0
    tp: int = 1
    sequence_parallel: bool = False
    cross_document: bool = False


class OutOfPlace(Exception):
    """An id is not of the modality that its place asks for: the files are damaged or not what they say."""


def collate(
    draft: Draft, filling: Filling, *, pack_length: int, scale: npt.NDArray[np.float32], rank: Rank | None = None
) -> Microbatch:
    """One micro-batch of all packs of a draft.

    Args:
        draft: T tokens in all, a multiple of ``pack_length``.
        scale: [M] weight of a target by the modality of its input token.

    Raises:
        OutOfPlace: a stored id is not of its modality.
    """
    rank = rank or Rank()
    pieces, modalities = draft.pieces, len(filling.vocabulary.names)
    length, flags = pieces.length, pieces.flags
    ends = np.cumsum(length)
    start, total = ends - length, int(ends[-1])
    ramp = np.arange(total, dtype=np.int32)
    is_pad, is_vision = (flags & PAD) != 0, (flags & VISION) != 0
    real, pads = np.flatnonzero(~is_pad), np.flatnonzero(is_pad)
    by_document = np.concatenate((real, pads))
    text, vision = np.flatnonzero(~(is_vision | is_pad)), np.flatnonzero(is_vision)
    by_modality = np.concatenate((text, pads, vision))

    place = _places(length, by_modality)
    counts = [0] * modalities
    counts[0] = int(length[text].sum() + length[pads].sum())
    if modalities > VISION:
        counts[VISION] = total - counts[0]
    num_pads = int(length[pads].sum())

    sizes = length[by_modality]
    tokens = _filled(pieces, place, by_modality, counts[0] - num_pads, filling)
    follows = np.ones(len(length), dtype=np.bool_)  # whether a piece has one behind it in its document
    follows[pieces.starts[1:] - 1] = False
    behind = np.minimum(np.arange(len(length)) + 1, len(length) - 1)
    last = place + length - 1
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[last] = np.where(follows, tokens[place[behind]], filling.pad)
    wanted = (flags & WANTED) != 0
    weight = scale[is_vision * np.uint8(VISION)] if modalities > VISION else np.full(len(flags), scale[0])
    weights = np.repeat((weight * wanted)[by_modality], sizes)
    weights[last] = weight * (wanted[behind] & follows)
    rows = np.flatnonzero(weights)

    def moved(to: Ints, start: Ints, order: Ints) -> npt.NDArray[np.int32]:
        """Where each token lies in another order: ``start`` of its piece in the one, ``to`` in the other."""
        return np.repeat((to - start)[order].astype(np.int32), length[order]) + ramp

    permutation = moved(start, place, by_modality)
    inverse = moved(place, start, np.arange(len(length)))
    to_documents, from_documents = inverse, permutation
    if len(pads) and pads[0] != len(real):  # pads between documents: they come last in document order
        in_documents = _places(length, by_document)
        to_documents = moved(place, in_documents, by_document)
        from_documents = moved(in_documents, place, by_modality)

    group, origin, sizes_of_groups = _groups(draft, start, is_pad, pack_length, rank.cross_document)
    key = (is_vision * np.uint8(2) | is_pad)[by_modality]
    grouped = group[by_modality]
    borders = np.flatnonzero((np.diff(grouped) != 0) | (np.diff(key) != 0)) + 1
    order = TokenOrder(
        permutation=permutation,
        inverse=inverse,
        counts=tuple(counts),
        counts_array=np.asarray(counts, dtype=np.int32),
        local_counts=rows_of_rank(counts, tp_rank=rank.tp_rank, tp=rank.tp, sequence_parallel=rank.sequence_parallel),
        pads=num_pads,
        to_documents=to_documents,
        from_documents=from_documents,
        documents=Intervals.of_runs(sizes_of_groups),
        own=Intervals.of_runs(np.add.reduceat(sizes, np.concatenate(([0], borders)))),
        positions=moved(start - origin, place, by_modality),
        document=np.repeat(grouped.astype(np.int32), sizes),
    )
    edges = np.concatenate(([0], np.cumsum(counts)))
    return Microbatch(
        order=order,
        tokens=tokens,
        labels=labels,
        loss_weights=weights,
        loss_rows=rows.astype(np.int32),
        loss_counts=tuple(np.diff(np.searchsorted(rows, edges)).tolist()),
    )


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


def _places(length: Ints, order: Ints) -> Ints:
    """Where each piece starts if the pieces lie in this order."""
    sizes = length[order]
    place = np.empty_like(length)
    place[order] = np.cumsum(sizes) - sizes
    return place


def _groups(
    draft: Draft, start: Ints, is_pad: npt.NDArray[np.bool_], pack_length: int, cross_document: bool
) -> tuple[Ints, Ints, Ints]:
    """Number of each piece's document, pads behind all; where positions are counted from; tokens per number."""
    pieces = draft.pieces
    owner = pieces.document_of
    first = start[pieces.starts[:-1]]
    pads = is_pad[pieces.starts[:-1]]
    kind = np.cumsum(~pads) - 1  # numbers of documents
    origin = first[owner]
    if cross_document:
        pack = np.searchsorted(draft.pack_starts, np.arange(pieces.documents), side="right") - 1
        kind = np.cumsum((np.diff(pack, prepend=-1) > 0) & ~pads) - 1
        origin = (start // pack_length) * pack_length
    real = int(kind[~pads].max(initial=-1)) + 1
    number = np.where(pads, real + np.cumsum(pads) - 1, kind)
    group = number[owner]
    sizes = np.bincount(group, weights=pieces.length).astype(np.int64)
    return group, origin, sizes


def _filled(pieces: Pieces, place: Ints, by_modality: Ints, real_text: int, filling: Filling) -> npt.NDArray[np.int32]:
    """int32 [T] tokens in modality order, each checked to lie in its modality's range."""
    vocabulary = filling.vocabulary
    flags = pieces.flags
    tokens = np.empty(int(pieces.length.sum()), dtype=np.int32)
    literal = (flags & LITERAL) != 0
    pads = np.flatnonzero(flags & PAD)
    for at in pads.tolist():
        tokens[place[at] : place[at] + pieces.length[at]] = filling.pad
    _copy(tokens, filling.literals, pieces, place, np.flatnonzero(literal & ~(flags & PAD != 0)))
    stored = ~literal
    for number in np.unique(pieces.corpus[stored]).tolist():
        mine = stored & (pieces.corpus == number)
        elements = filling.elements[number]
        _copy(tokens, elements, pieces, place, np.flatnonzero(mine & (flags & VISION == 0)))
        _copy_codes(tokens, elements, pieces, place, np.flatnonzero(mine & (flags & VISION != 0)), filling)
    words = tokens[:real_text]
    limit = vocabulary.starts[1] if len(vocabulary.starts) > 1 else vocabulary.codes[0]
    outside = len(words) and (int(words.min()) < 0 or int(words.max()) >= limit)
    if outside or any(bool((words == one).any()) for ids in vocabulary.ids[1:] for one in ids):
        raise OutOfPlace
    return tokens


def _copy(tokens: npt.NDArray[np.int32], elements: Elements, pieces: Pieces, place: Ints, rows: Ints) -> None:
    """Copy the elements of these pieces to where they belong."""
    sizes = pieces.length[rows]
    ramp = np.arange(int(sizes.sum()))
    before = np.cumsum(sizes) - sizes
    tokens[ramp + np.repeat(place[rows] - before, sizes)] = elements[
        ramp + np.repeat(pieces.address[rows] - before, sizes)
    ]


def _copy_codes(
    tokens: npt.NDArray[np.int32], elements: Elements, pieces: Pieces, place: Ints, rows: Ints, filling: Filling
) -> None:
    """The same for codes: shifted to their ids, with separators between them."""
    if not len(rows):
        return
    sizes = pieces.length[rows]
    ramp = np.arange(int(sizes.sum()))
    before = np.cumsum(sizes) - sizes
    source = ramp + np.repeat(pieces.address[rows] - before, sizes)
    separators = None
    if filling.row_separator:
        inside = ramp - np.repeat(before, sizes)
        whole, rest = np.divmod(inside, filling.row_separator + 1)
        separators = rest == filling.row_separator
        source -= whole + separators  # a separator reads the code before it, and is overwritten
    codes = elements[source]
    if int(codes.min()) < 0 or int(codes.max()) >= filling.vocabulary.codes[VISION]:
        raise OutOfPlace
    values = codes.astype(np.int32) + np.int32(filling.vocabulary.starts[VISION])
    if separators is not None:
        values[separators] = filling.separator
    tokens[ramp + np.repeat(place[rows] - before, sizes)] = values
