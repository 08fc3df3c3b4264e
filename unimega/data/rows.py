"""The arrays of a micro-batch, written from the pieces of its packs: one pass each, and no token is sorted.

``rows_python`` is the definition; ``rows`` takes the C++ helper where it is compiled, with equal output.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.batch import Intervals
from unimega.data import native
from unimega.data.corpus import Ints
from unimega.data.draft import Draft, Elements, Filling, OutOfPlace
from unimega.data.pieces import LITERAL, PAD, VISION, WANTED, Pieces

Row = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """Arrays [T], in modality order unless said otherwise; the fields of ``unimega.batch`` of the same names."""

    tokens: Row
    labels: Row
    loss_weights: npt.NDArray[np.float32]
    loss_rows: Row
    permutation: Row
    inverse: Row
    """In input order."""
    to_documents: Row
    """In document order."""
    from_documents: Row
    positions: Row
    document: Row
    documents: Intervals
    own: Intervals
    words: int
    """Tokens of text without pads."""
    pads: int
    loss_words: int
    """How many of ``loss_rows`` are text."""


def rows(
    draft: Draft, filling: Filling, *, pack_length: int, scale: npt.NDArray[np.float32], cross_document: bool
) -> Rows:
    """Fill the packs of a draft.

    Args:
        draft: packs of ``pack_length`` tokens.
        scale: [M] weight of a target by the modality of its input token.
        cross_document: documents of a pack count as one, and positions run over it.

    Raises:
        OutOfPlace: a stored id is not of its modality.
    """
    if native.helper is None:
        return rows_python(draft, filling, pack_length=pack_length, scale=scale, cross_document=cross_document)
    pieces, vocabulary = draft.pieces, filling.vocabulary
    found = native.helper.collate(
        elements=list(filling.elements),
        literals=filling.literals,
        starts=pieces.starts,
        address=pieces.address,
        length=pieces.length,
        flags=pieces.flags,
        corpus=pieces.corpus,
        pack_starts=draft.pack_starts,
        pack_length=pack_length,
        scale=scale,
        vision_ids=filling.vision_ids,
        text_limit=filling.text_limit,
        offset=vocabulary.starts[-1],
        codebook=vocabulary.codes[VISION] if len(vocabulary.codes) > VISION else 0,
        pad=filling.pad,
        row_separator=filling.row_separator,
        separator=filling.separator,
        cross_document=cross_document,
    )
    if found is None:
        raise OutOfPlace
    *arrays, documents, own, words, pads, loss_words = found
    last_keys = np.arange(1, len(arrays[0]) + 1, dtype=np.int32)
    made: list[Any] = [*arrays, _intervals(documents, last_keys), _intervals(own, last_keys), words, pads, loss_words]
    return Rows(*made)


def _intervals(runs: tuple[Row, Row, tuple[int, ...], int], last_keys: Row) -> Intervals:
    borders, first_keys, lengths, longest = runs
    return Intervals(borders, lengths, longest, first_keys, last_keys, causal=True)


def rows_python(
    draft: Draft, filling: Filling, *, pack_length: int, scale: npt.NDArray[np.float32], cross_document: bool
) -> Rows:
    """``rows`` without the C++ helper."""
    pieces = draft.pieces
    length, flags = pieces.length, pieces.flags
    ends = length.cumsum()
    start, total = ends - length, int(ends[-1])
    ramp = np.arange(total, dtype=np.int32)
    is_pad, is_vision = (flags & PAD) != 0, (flags & VISION) != 0
    pads = is_pad.nonzero()[0]
    by_modality = np.concatenate(((~(is_vision | is_pad)).nonzero()[0], pads, is_vision.nonzero()[0]))
    place = _places(length, by_modality)
    sizes = length[by_modality]

    tokens = _filled(pieces, place, filling)
    follows = np.ones(len(length), dtype=np.bool_)  # whether a piece has one behind it in its document
    follows[pieces.starts[1:] - 1] = False
    behind = np.minimum(np.arange(len(length)) + 1, len(length) - 1)
    last = place + length - 1
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[last] = np.where(follows, tokens[place[behind]], filling.pad)
    wanted = (flags & WANTED) != 0
    weight = scale[is_vision * np.uint8(VISION)] if len(scale) > VISION else np.full(len(flags), scale[0])
    weights = (weight * wanted)[by_modality].repeat(sizes)
    weights[last] = weight * (wanted[behind] & follows)

    loss_rows = weights.nonzero()[0].astype(np.int32)
    num_pads = int(length[pads].sum())
    words = total - num_pads - int(length[is_vision].sum())

    def moved(to: Ints, start: Ints, order: Ints) -> Row:
        """Where each token lies in another order: ``start`` of its piece in the one, ``to`` in the other."""
        result: Row = (to - start)[order].astype(np.int32).repeat(length[order])
        result += ramp
        return result

    permutation = moved(start, place, by_modality)
    inverse = moved(place, start, np.arange(len(length)))
    to_documents, from_documents = inverse, permutation
    if len(pads) and pads[0] != len(length) - len(pads):  # pads between documents: they come last in document order
        by_document = np.concatenate(((~is_pad).nonzero()[0], pads))
        in_documents = _places(length, by_document)
        to_documents = moved(place, in_documents, by_document)
        from_documents = moved(in_documents, place, by_modality)

    group, origin = _groups(draft, start, is_pad, pack_length, cross_document)
    key = (is_vision * np.uint8(2) | is_pad)[by_modality]
    grouped = group[by_modality]
    changes = (grouped[1:] != grouped[:-1]) | (key[1:] != key[:-1])
    borders = np.concatenate(([0], changes.nonzero()[0] + 1))
    return Rows(
        tokens=tokens,
        labels=labels,
        loss_weights=weights,
        loss_rows=loss_rows,
        permutation=permutation,
        inverse=inverse,
        to_documents=to_documents,
        from_documents=from_documents,
        positions=moved(start - origin, place, by_modality),
        document=grouped.astype(np.int32).repeat(sizes),
        documents=Intervals.of_runs(np.bincount(group, weights=length).astype(np.int64)),
        own=Intervals.of_runs(np.add.reduceat(sizes, borders)),
        words=words,
        pads=num_pads,
        loss_words=int(np.searchsorted(loss_rows, words + num_pads)),
    )


def _places(length: Ints, order: Ints) -> Ints:
    """Where each piece starts if the pieces lie in this order."""
    sizes = length[order]
    place = np.empty_like(length)
    place[order] = np.cumsum(sizes) - sizes
    return place


def _groups(
    draft: Draft, start: Ints, is_pad: npt.NDArray[np.bool_], pack_length: int, cross_document: bool
) -> tuple[Ints, Ints]:
    """Number of each piece's document, pads behind all, and where its positions are counted from."""
    pieces = draft.pieces
    owner = pieces.document_of
    pads = is_pad[pieces.starts[:-1]]
    number = (~pads).cumsum() - 1
    origin = start[pieces.starts[:-1]][owner]
    if cross_document:
        pack = np.searchsorted(draft.pack_starts, np.arange(pieces.documents), side="right") - 1
        real = (~pads).nonzero()[0]
        number[real] = (np.diff(pack[real], prepend=-1) > 0).cumsum() - 1
        origin = start // pack_length * pack_length
    behind = int(number[~pads].max(initial=-1)) + 1
    number[pads] = behind + np.arange(int(pads.sum()))
    return number[owner], origin


def _filled(pieces: Pieces, place: Ints, filling: Filling) -> Row:
    """Tokens in modality order, each checked to lie in its modality's range."""
    flags = pieces.flags
    tokens = np.empty(int(pieces.length.sum()), dtype=np.int32)
    for at in (flags & PAD).nonzero()[0].tolist():
        tokens[place[at] : place[at] + pieces.length[at]] = filling.pad
    kind = flags & (VISION | LITERAL | PAD)
    borders = (kind == VISION | LITERAL).nonzero()[0]
    tokens[place[borders]] = filling.literals[pieces.address[borders]]
    _copy(tokens, filling.literals, pieces, place, (kind == LITERAL).nonzero()[0], filling)
    for number, elements in enumerate(filling.elements):
        mine = pieces.corpus == number
        _copy(tokens, elements, pieces, place, (mine & (kind == 0)).nonzero()[0], filling)
        _copy(tokens, elements, pieces, place, (mine & (kind == VISION)).nonzero()[0], filling)
    return tokens


def _copy(tokens: Row, elements: Elements, pieces: Pieces, place: Ints, rows: Ints, filling: Filling) -> None:
    """Copy the elements of pieces of one kind to where they belong; codes are shifted to their ids."""
    if not len(rows):
        return
    sizes = pieces.length[rows]
    ramp = np.arange(int(sizes.sum()))
    before = sizes.cumsum() - sizes
    source = ramp + (pieces.address[rows] - before).repeat(sizes)
    target = ramp + (place[rows] - before).repeat(sizes)
    if not pieces.flags[rows[0]] & VISION:
        ids = elements[source]
        if int(ids.min()) < 0 or int(ids.max()) >= filling.text_limit:
            raise OutOfPlace
        if any(bool((ids == one).any()) for one in filling.vision_ids.tolist()):
            raise OutOfPlace
        tokens[target] = ids
        return
    separators = None
    if filling.row_separator:
        whole, rest = np.divmod(ramp - before.repeat(sizes), filling.row_separator + 1)
        separators = rest == filling.row_separator
        source -= whole + separators  # a separator reads the code before it, and is overwritten
    codes = elements[source]
    if int(codes.min()) < 0 or int(codes.max()) >= filling.vocabulary.codes[VISION]:
        raise OutOfPlace
    ids = codes.astype(np.int32) + np.int32(filling.vocabulary.starts[VISION])
    if separators is not None:
        ids[separators] = filling.separator
    tokens[target] = ids
