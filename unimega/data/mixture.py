"""Which documents come next: shares of tokens held window by window with integer cursors, interleaved, packed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.data.assemble import Assembler
from unimega.data.corpus import Corpus, Ints
from unimega.data.overlong import Items, items_of
from unimega.data.packing import best_fit
from unimega.errors import DataError

MAX_WINDOW_DOCUMENTS = 1 << 18
"""About so many documents are planned at a time at most: a quarter of a second, some tens of MB."""
_CHUNK_DOCUMENTS = 1 << 16
_SAMPLED_DOCUMENTS = 1 << 20
_WEIGHT_UNIT = 1 << 20


@dataclass(frozen=True)
class Cursor:
    """How far a corpus has been read: the only state of the order."""

    documents: int = 0
    tokens: int = 0
    dropped: int = 0
    """Tokens of documents left out by the policy for over-long ones; not part of ``tokens``."""
    splits: int = 0
    """Cuts made in over-long documents."""


@dataclass(frozen=True)
class Window:
    """A planned stretch of the run. Items are documents or parts of over-long ones, pack after pack; arrays [items]."""

    number: int
    first_pack: int
    starts: Ints
    """[packs + 1] first item of each pack."""
    corpus: npt.NDArray[np.int16]
    document: Ints
    epoch: npt.NDArray[np.int32]
    begin: npt.NDArray[np.int32]
    """First token of the document; above 0 for later parts only."""
    length: npt.NDArray[np.int32]
    pack_targets: Ints
    """int64 [packs, M] targets per modality of the input token."""
    after: tuple[Cursor, ...]
    """Cursors behind the window, one per corpus."""

    @property
    def num_packs(self) -> int:
        """Number of packs."""
        return len(self.starts) - 1

    @property
    def next_pack(self) -> int:
        """Number of the first pack behind the window."""
        return self.first_pack + self.num_packs

    @property
    def has_parts(self) -> bool:
        """Whether any item is a part of a document."""
        return bool(self.begin.any())

    def hash(self) -> str:
        """16 hex digits that differ if any pack does; equal on all ranks of a run."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.starts, self.corpus, self.document, self.epoch, self.begin, self.length, self.pack_targets):
            digest.update(part.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Brought:
    """What one corpus brings to a window; arrays [items]."""

    document: Ints
    epoch: Ints
    begin: Ints
    length: Ints
    targets: Ints
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
            window_tokens: planned at a time, or less where documents are short (``MAX_WINDOW_DOCUMENTS``).
            overlong: what happens to a document longer than a pack: error, drop, split_text.
        """
        self.corpora, self.assembler = tuple(corpora), assembler
        self.seed, self.pack_length, self.overlong = seed, pack_length, overlong
        self.epoch_tokens: tuple[int, ...] | None = None
        """Tokens of each corpus's first epoch, where weights follow from numbers of epochs."""
        if any(corpus.source.epochs for corpus in corpora):
            self.epoch_tokens = tuple(self._tokens_of_epoch(corpus) for corpus in corpora)
            shares = zip(self.corpora, self.epoch_tokens, strict=True)
            self.weights = tuple(max(1, round((corpus.source.epochs or 0) * tokens)) for corpus, tokens in shares)
        else:
            self.weights = tuple(max(1, round(corpus.source.weight * _WEIGHT_UNIT)) for corpus in corpora)
        self.window_tokens = min(window_tokens, self._short_window())

    def window(self, number: int, first_pack: int, cursors: Sequence[Cursor]) -> Window:
        """Window ``number`` from ``first_pack`` and these cursors on: each corpus up to its share of tokens."""
        total = sum(self.weights)
        brought = []
        for corpus, weight, cursor in zip(self.corpora, self.weights, cursors, strict=True):
            goal = (number + 1) * self.window_tokens * weight // total
            brought.append(self._bring(corpus, cursor, goal))
        return self._packed(number, first_pack, brought)

    def epoch(self) -> Window:
        """One window with every document of every corpus once."""
        return self._packed(0, 0, [self._bring(corpus, Cursor(), None) for corpus in self.corpora])

    def _bring(self, corpus: Corpus, cursor: Cursor, goal: int | None) -> _Brought:
        """Documents from the cursor until the corpus has brought ``goal`` tokens since the start of the run.

        None: one epoch.
        """
        position, tokens, dropped, splits = cursor.documents, cursor.tokens, cursor.dropped, cursor.splits
        parts: list[tuple[Ints, Ints, Items]] = []
        count, barren = min(1024, corpus.num_documents), 0
        while (position < corpus.num_documents) if goal is None else (tokens < goal):
            if goal is None:
                count = min(_CHUNK_DOCUMENTS, corpus.num_documents - position)
            epochs, documents = corpus.stream(self.seed, position, count)
            items = self._items(corpus, epochs, documents)
            sums = tokens + np.cumsum(items.length)
            if goal is not None and len(sums) and sums[-1] >= goal:  # the document that reaches the goal is the last
                items = items.first(int(items.place[np.searchsorted(sums, goal)]) + 1)
            parts.append((epochs[items.place], documents[items.place], items))
            position += len(items.dropped)
            tokens += int(items.length.sum())
            dropped += int(items.dropped.sum())
            splits += int(items.splits.sum())
            barren = 0 if len(items.place) else barren + count
            if barren >= corpus.num_documents:
                raise DataError(
                    f"{corpus.name}: every document is longer than data.pack_length={self.pack_length}. Raise it."
                )
            if goal is not None:
                mean = max(1.0, (tokens - cursor.tokens) / max(1, position - cursor.documents))
                count = min(_CHUNK_DOCUMENTS, max(64, int((goal - tokens) / mean * 1.02) + 64))
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            parts.append((none, none, self._items(corpus, none, none)))
        return _Brought(
            document=np.concatenate([part[1] for part in parts]),
            epoch=np.concatenate([part[0] for part in parts]),
            begin=np.concatenate([part[2].begin for part in parts]),
            length=np.concatenate([part[2].length for part in parts]),
            targets=np.concatenate([part[2].targets for part in parts]),
            cursor=Cursor(position, tokens, dropped, splits),
        )

    def _items(self, corpus: Corpus, epochs: Ints, documents: Ints) -> Items:
        stored = corpus.gather(epochs, documents, eos=self.assembler.special.eos)
        return items_of(
            self.assembler.lay_out(stored),
            corpus,
            documents,
            pack_length=self.pack_length,
            policy=self.overlong,
            modalities=self.assembler.modalities,
        )

    def _packed(self, number: int, first_pack: int, brought: Sequence[_Brought]) -> Window:
        """Interleave, then pack."""
        turn = interleaved([item.length for item in brought])
        packs = best_fit(np.concatenate([item.length for item in brought])[turn], self.pack_length)
        turn = turn[packs.items]
        origin = np.repeat(np.arange(len(brought), dtype=np.int16), [len(item.document) for item in brought])
        targets = np.concatenate([item.targets for item in brought])[turn]
        sums = np.zeros((len(targets) + 1, targets.shape[1]), dtype=np.int64)
        np.cumsum(targets, axis=0, out=sums[1:])
        return Window(
            number=number,
            first_pack=first_pack,
            starts=packs.starts,
            corpus=origin[turn],
            document=np.concatenate([item.document for item in brought])[turn],
            epoch=np.concatenate([item.epoch for item in brought])[turn].astype(np.int32),
            begin=np.concatenate([item.begin for item in brought])[turn].astype(np.int32),
            length=np.concatenate([item.length for item in brought])[turn].astype(np.int32),
            pack_targets=np.diff(sums[packs.starts], axis=0),
            after=tuple(item.cursor for item in brought),
        )

    def _short_window(self) -> int:
        """Tokens that hold about ``MAX_WINDOW_DOCUMENTS`` documents, by the mean of what is stored; integers only."""
        documents = 0
        for corpus, weight in zip(self.corpora, self.weights, strict=True):
            documents += weight * -(-(corpus.num_documents << 20) // max(1, corpus.stored_tokens))
        return max(1, (MAX_WINDOW_DOCUMENTS << 20) * sum(self.weights) // documents)

    def _tokens_of_epoch(self, corpus: Corpus) -> int:
        """Tokens that the first epoch brings; of a large corpus from its first million documents, in shuffled order."""
        count = min(corpus.num_documents, _SAMPLED_DOCUMENTS)
        found = 0
        for start in range(0, count, _CHUNK_DOCUMENTS):
            epochs, documents = corpus.stream(self.seed, start, min(_CHUNK_DOCUMENTS, count - start))
            found += int(self._items(corpus, epochs, documents).length.sum())
        return max(1, found * corpus.num_documents // count)


def interleaved(lengths: Sequence[Ints]) -> Ints:
    """An order of all items of several lists, in which any prefix holds of each list about its share of tokens.

    The place of an item is the share of its list's tokens before it: each list stays in order, and none is ever more
    than about one item ahead or behind.

    Args:
        lengths: tokens of each item of each list; items are numbered through.
    """
    totals = [max(1, int(length.sum())) for length in lengths]
    shift = min(32, 62 - max(totals).bit_length())  # less for an evaluation of more than 2^30 tokens
    keys = [(np.cumsum(length) - length << shift) // total for length, total in zip(lengths, totals, strict=True)]
    return np.argsort(np.concatenate(keys), kind="stable")
