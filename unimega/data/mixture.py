"""Which documents come next: shares of tokens held window by window with integer cursors, interleaved, packed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.data.assemble import Assembler, Choices
from unimega.data.corpus import Corpus, Ints
from unimega.data.packing import Packs, best_fit
from unimega.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """How far a corpus has been read: the only state of the order."""

    documents: int = 0
    tokens: int = 0
    dropped: int = 0
    """Tokens of documents left out by the policy for over-long ones; not part of ``tokens``."""


@dataclass(frozen=True)
class Window:
    """A planned stretch of the run: packs and the documents in them."""

    number: int
    first_pack: int
    packs: Packs
    """Items are places in the arrays below."""
    corpus: npt.NDArray[np.int16]
    document: Ints
    choices: Choices
    pack_targets: Ints
    """int64 [packs, M] targets per modality of the input token."""
    after: tuple[Cursor, ...]
    """Cursors behind the window, one per corpus."""

    @property
    def next_pack(self) -> int:
        """Number of the first pack behind the window."""
        return self.first_pack + self.packs.num_packs

    def hash(self) -> str:
        """16 hex digits that differ if any pack does; equal on all ranks of a run."""
        digest = hashlib.blake2b(digest_size=8)
        choices = self.choices
        for part in (self.packs.starts, self.packs.items, self.corpus, self.document, choices.variant, choices.prompt):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update(np.ascontiguousarray(choices.length).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Brought:
    """What one corpus brings to a window."""

    documents: Ints
    choices: Choices
    cursor: Cursor


class Mixture:
    """Corpora with their weights."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        assembler: Assembler,
        *,
        seed: int,
        pack_length: int,
        window_tokens: int,
        overlong: str = "error",
    ) -> None:
        """Take corpora and sizes that ``config.rules`` has checked.

        Args:
            overlong: error, or drop: what happens to a document longer than a pack.
        """
        self.corpora, self.assembler = tuple(corpora), assembler
        self.seed, self.pack_length, self.window_tokens, self.overlong = seed, pack_length, window_tokens, overlong

    def window(self, number: int, first_pack: int, cursors: Sequence[Cursor]) -> Window:
        """Window ``number`` from ``first_pack`` and these cursors on: each corpus up to its share of tokens."""
        total = sum(corpus.weight for corpus in self.corpora)
        brought = []
        for corpus, cursor in zip(self.corpora, cursors, strict=True):
            goal = (number + 1) * self.window_tokens * corpus.weight // total
            brought.append(self._bring(corpus, cursor, goal))
        return self._packed(number, first_pack, brought)

    def epoch(self) -> Window:
        """One window with every document of every corpus once."""
        brought = []
        for corpus in self.corpora:
            epochs, documents = corpus.stream(self.seed, 0, corpus.num_documents)
            choices, keep, dropped = self._choose(corpus, epochs, documents)
            tokens = int(choices.length.sum())
            brought.append(_Brought(documents[keep], choices, Cursor(corpus.num_documents, tokens, dropped)))
        return self._packed(0, 0, brought)

    def _bring(self, corpus: Corpus, cursor: Cursor, goal: int) -> _Brought:
        """Documents from the cursor until the corpus has brought ``goal`` tokens since the start of the run."""
        position, tokens, dropped = cursor.documents, cursor.tokens, cursor.dropped
        parts: list[tuple[Ints, Choices]] = []
        count, barren = 1024, 0
        while tokens < goal:
            epochs, documents = corpus.stream(self.seed, position, count)
            choices, keep, left_out = self._choose(corpus, epochs, documents)
            sums = tokens + np.cumsum(choices.length)
            kept = np.flatnonzero(keep)
            if len(sums) and sums[-1] >= goal:  # the document that reaches the goal is the last
                enough = int(np.searchsorted(sums, goal)) + 1
                used = int(kept[enough - 1]) + 1
                choices = _take(choices, np.arange(enough))
                left_out = self._dropped(corpus, epochs[:used], documents[:used])
                kept = kept[:enough]
                position += used
            else:
                position += count
            parts.append((documents[kept], choices))
            tokens += int(choices.length.sum())
            dropped += left_out
            barren = 0 if len(kept) else barren + count
            if barren >= corpus.num_documents:
                raise DataError(
                    f"{corpus.name}: every document is longer than data.pack_length={self.pack_length}. Raise it."
                )
            mean = max(1.0, (tokens - cursor.tokens) / max(1, position - cursor.documents))
            count = min(1 << 20, max(1024, int((goal - tokens) / mean * 1.02) + 64))
        if not parts:
            empty = np.zeros(0, dtype=np.int64)
            parts.append((empty, self.assembler.choose(corpus, empty, empty)))
        documents = np.concatenate([part[0] for part in parts])
        return _Brought(documents, _joined([part[1] for part in parts]), Cursor(position, tokens, dropped))

    def _choose(self, corpus: Corpus, epochs: Ints, documents: Ints) -> tuple[Choices, npt.NDArray[np.bool_], int]:
        """Choices of the documents that fit, which those are, and the tokens of the others."""
        choices = self.assembler.choose(corpus, epochs, documents)
        keep = choices.length <= self.pack_length
        if keep.all():
            return choices, keep, 0
        big_image = choices.longest_image > self.pack_length
        if big_image.any():
            self._refuse(corpus, documents, choices.longest_image, "image of ")
        if self.overlong == "error":
            self._refuse(corpus, documents, choices.length, "")
        return _take(choices, np.flatnonzero(keep)), keep, int(choices.length[~keep].sum())

    def _dropped(self, corpus: Corpus, epochs: Ints, documents: Ints) -> int:
        return self._choose(corpus, epochs, documents)[2]

    def _refuse(self, corpus: Corpus, documents: Ints, sizes: Ints, what: str) -> None:
        over = np.flatnonzero(sizes > self.pack_length)
        first = int(over[0])
        document = int(documents[first])
        longest = -(-int(sizes.max()) // 128) * 128
        raise DataError(
            f"{corpus.name} document {document} ({corpus.source_of(document)}): {what}{sizes[first]} tokens, "
            f"data.pack_length is {self.pack_length}; {len(over)} of the {len(sizes)} documents looked at are longer. "
            f"Raise it to >= {longest}" + ("." if what else " or set data.overlong = 'drop'.")
        )

    def _packed(self, number: int, first_pack: int, brought: Sequence[_Brought]) -> Window:
        """Interleave so that in any prefix each corpus is within about one document of its share, then pack."""
        keys = []
        for item in brought:
            length = item.choices.length
            before = np.cumsum(length) - length
            keys.append((before << 32) // max(1, int(length.sum())))
        turn = np.argsort(np.concatenate(keys), kind="stable")
        origin = np.repeat(np.arange(len(brought), dtype=np.int16), [len(item.documents) for item in brought])
        choices = _take(_joined([item.choices for item in brought]), turn)
        packs = best_fit(choices.length, self.pack_length)
        sums = np.zeros((len(packs.items) + 1, choices.targets.shape[1]), dtype=np.int64)
        np.cumsum(choices.targets[packs.items], axis=0, out=sums[1:])
        return Window(
            number=number,
            first_pack=first_pack,
            packs=packs,
            corpus=origin[turn],
            document=np.concatenate([item.documents for item in brought])[turn],
            choices=choices,
            pack_targets=np.diff(sums[packs.starts], axis=0),
            after=tuple(item.cursor for item in brought),
        )


def _take(choices: Choices, places: Ints) -> Choices:
    return Choices(*(getattr(choices, name)[places] for name in Choices.__dataclass_fields__))


def _joined(parts: Sequence[Choices]) -> Choices:
    return Choices(*(np.concatenate([getattr(part, name) for part in parts]) for name in Choices.__dataclass_fields__))
