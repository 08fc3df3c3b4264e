"""Documents that are longer than a pack: refused, left out, or cut between tokens of text and between images."""

from dataclasses import dataclass

import numpy as np

from unimega.data.corpus import Corpus, Ints
from unimega.data.pieces import LITERAL, VISION, Pieces
from unimega.errors import DataError

POLICIES = ("error", "drop", "split_text")


@dataclass(frozen=True)
class Items:
    """m items of what n documents bring: documents, or parts of over-long ones; arrays [m] unless said otherwise."""

    place: Ints
    """Which of the n documents, ascending."""
    begin: Ints
    """First token of the document."""
    length: Ints
    targets: Ints
    """int64 [m, M]."""
    dropped: Ints
    """[n] tokens of each document that are left out."""
    splits: Ints
    """[n] cuts made in each document."""

    def first(self, documents: int) -> "Items":
        """Those of the first documents only."""
        stop = int(np.searchsorted(self.place, documents))
        parts = (self.place[:stop], self.begin[:stop], self.length[:stop], self.targets[:stop])
        return Items(*parts, self.dropped[:documents], self.splits[:documents])


def items_of(
    pieces: Pieces, corpus: Corpus, documents: Ints, *, pack_length: int, policy: str, modalities: int
) -> Items:
    """What documents of one corpus bring to packs, by the policy.

    Raises:
        DataError: an image does not fit into a pack, or a document does not and the policy is ``error``.
    """
    length = pieces.totals()
    none = np.zeros(len(length), dtype=np.int64)
    over = np.flatnonzero(length > pack_length)
    place, begin = np.arange(len(length)), none
    if not len(over):
        return Items(place, begin, length, pieces.targets(modalities), none, none)
    long = pieces.take(over)
    longest = _longest_images(long)
    if (longest > pack_length).any():
        _refuse(corpus, documents[over], longest, pack_length, "image of ", len(documents))
    if policy == "error":
        _refuse(corpus, documents[over], length[over], pack_length, "", len(documents))
    if policy == "drop":
        dropped = np.where(length > pack_length, length, 0)
        place = np.flatnonzero(length <= pack_length)
        return Items(place, begin[place], length[place], pieces.take(place).targets(modalities), dropped, none)
    cuts = [_cut(long.slice(at, at + 1), pack_length) for at in range(len(over))]
    splits = none.copy()
    splits[over] = [len(cut) - 1 for cut in cuts]
    place = np.repeat(place, splits + 1)
    begin = np.zeros(len(place), dtype=np.int64)
    first = over + np.cumsum(splits[over]) - splits[over]
    for at, cut in zip(first.tolist(), cuts, strict=True):
        begin[at : at + len(cut)] = cut
    end = np.where(np.append(place[1:], -1) == place, np.append(begin[1:], 0), length[place])
    parts = pieces.take(place).clip(begin, end - begin)
    return Items(place, begin, end - begin, parts.targets(modalities), none, splits)


def _images(pieces: Pieces) -> tuple[Ints, Ints]:
    """First piece of each image and tokens in it: its begin, its codes (none is legal) and its end."""
    at = np.flatnonzero((pieces.flags & (VISION | LITERAL)) == VISION | LITERAL)
    behind = np.minimum(at + 1, len(pieces.flags) - 1)
    codes = np.where((pieces.flags[behind] & (VISION | LITERAL)) == VISION, pieces.length[behind], 0)
    return at, codes + 2


def _longest_images(pieces: Pieces) -> Ints:
    """[n] tokens of the longest image of each document with its borders; 0: none."""
    at, sizes = _images(pieces)
    longest = np.zeros(pieces.documents, dtype=np.int64)
    np.maximum.at(longest, pieces.document_of[at], sizes)
    return longest


def _cut(document: Pieces, pack_length: int) -> list[int]:
    """Where the parts of one document start: each as long as a pack, or shorter where an image would be cut."""
    total = int(document.length.sum())
    at, sizes = _images(document)
    starts = (np.cumsum(document.length) - document.length)[at]
    cuts = [0]
    while total - cuts[-1] > pack_length:
        cut = cuts[-1] + pack_length
        image = int(np.searchsorted(starts, cut)) - 1  # the last one that starts before the cut
        if image >= 0 and cut < starts[image] + sizes[image]:
            cut = int(starts[image])
        cuts.append(cut)
    return cuts


def _refuse(corpus: Corpus, documents: Ints, sizes: Ints, pack_length: int, what: str, looked_at: int) -> None:
    over = np.flatnonzero(sizes > pack_length)
    document, longest = int(documents[over[0]]), -(-int(sizes.max()) // 128) * 128
    raise DataError(
        f"{corpus.name} document {document} ({corpus.source_of(document)}): {what}{sizes[over[0]]} tokens, "
        f"data.pack_length is {pack_length}; {len(over)} of the {looked_at} documents looked at are longer. "
        f"Raise it to >= {longest}" + ("." if what else " or set data.overlong = 'drop' or 'split_text'.")
    )
