"""Conditional entropy of n-grams: ``H_n = - sum p(x_1..x_n) log2 p(x_n | x_1..x_{n-1})``, in bits.

p is a count over C, the number of n-grams, and the condition's count is the sum over its n-grams. So
``H_n = (sum_prefix c log2 c - sum_ngram c log2 c) / C``: it follows from how often each count occurs. Those tables are
integers; parts of a corpus that own whole prefixes add up to the tables of the whole, and the sum is rounded once.
So the number does not depend on how the work was cut.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.data import order
from unimega.data.reader import IndexedCorpus
from unimega.data.scan import Ints, pieces
from unimega.errors import DataError

Words = npt.NDArray[np.uint64]
MAX_N = 8
MEMORY_BYTES = 1 << 30
_COPIES = 4
"""Times that the table of counts is in memory while chunks are joined to it."""
_MOST_PARTS = 1 << 12
"""A prefix alone may outgrow a small memory: no number of parts would help."""


@dataclass(frozen=True)
class Tally:
    """How many n-grams, and how many prefixes, occur how often."""

    ngrams: Mapping[int, int] = field(default_factory=dict)
    prefixes: Mapping[int, int] = field(default_factory=dict)
    largest: int = 0
    """Occurrences of the most frequent n-gram."""

    def __add__(self, other: "Tally") -> "Tally":
        """The tally of both, which have no prefix in common."""
        return Tally(
            _joined(self.ngrams, other.ngrams),
            _joined(self.prefixes, other.prefixes),
            max(self.largest, other.largest),
        )

    @property
    def number(self) -> int:
        """How many n-grams there are, repetitions included."""
        return sum(count * often for count, often in self.ngrams.items())

    @property
    def different(self) -> int:
        """How many different n-grams."""
        return sum(self.ngrams.values())

    @property
    def entropy(self) -> float:
        """Bits; 0 of nothing."""
        return max(0.0, _bits(self.prefixes, self.ngrams) / self.number) if self.ngrams else 0.0


@dataclass(frozen=True)
class Ngrams:
    """Different n-grams and how often each occurs; ``+`` joins those of other documents."""

    n: int
    bits: int
    """Width of an id."""
    keys: tuple[Words, ...]
    """Ids packed into words, the last id lowest in the last word: each [U], sorted by the first word, then the next."""
    counts: Ints
    """[U]"""

    def __add__(self, other: "Ngrams") -> "Ngrams":
        if (self.n, self.bits) != (other.n, other.bits):
            raise ValueError(f"{self.n}-grams of {self.bits} bits and {other.n}-grams of {other.bits} bits")
        keys = tuple(np.concatenate(pair) for pair in zip(self.keys, other.keys, strict=True))
        return _counted(self.n, self.bits, keys, np.concatenate((self.counts, other.counts)))

    def tally(self) -> Tally:
        """How often counts occur; all n-grams of a prefix must be here."""
        if not len(self.counts):
            return Tally()
        changes = _changes(_prefixes(self.keys, self.n, self.bits))
        sums = np.add.reduceat(self.counts, changes)
        return Tally(_histogram(self.counts), _histogram(sums), int(self.counts.max()))


def width(corpora: Sequence[IndexedCorpus], modality: int) -> int:
    """Bits that hold every id of a modality, from the sidecars (``.bin``'s type where there is none)."""
    limits = []
    for corpus in corpora:
        if corpus.sidecar is None:
            limits.append(min(1 << 31, 1 << (8 * corpus.dtype.itemsize - (corpus.dtype.kind == "i"))))
        else:
            limits.append(corpus.sidecar["vocabulary"]["codebook"] if modality else corpus.sidecar["tokenizer"]["size"])
    return max(1, max(int(limit or 1) - 1 for limit in limits).bit_length())


def count(
    corpus: IndexedCorpus, modality: int, n: int, *, bits: int, documents: tuple[int, int] | None = None
) -> Ngrams:
    """All n-grams inside the sequences of one modality: memory follows how many differ.

    Args:
        corpus: checked.
        modality: its number.
        n: 1 .. ``MAX_N``.
        bits: of an id, equal in everything that is joined.
        documents: first document and the one behind the last; absent: all.

    Raises:
        DataError: an id does not fit into the bits.
    """
    table = _Table(n, bits, limit=None)
    for chunk in pieces(corpus, modality, documents=documents):
        table.add(_packed(corpus, corpus.elements, chunk.positions(n), n, bits))
    return table.result()


def conditional_entropy(
    corpora: Sequence[IndexedCorpus],
    modality: int,
    n: int,
    *,
    memory_bytes: int = MEMORY_BYTES,
    across: bool = False,
    progress: Callable[[float], None] = lambda _: None,
) -> Tally:
    """Tally the n-grams of all corpora as if they were one, in bounded memory.

    Prefixes are told apart by a hash. Where the table outgrows its memory, half of them is left for a later pass, which
    reads `.bin` again.

    Args:
        corpora: checked.
        modality: its number.
        n: 1 .. ``MAX_N``; those of 1 have the same, empty prefix and need a place for each id.
        memory_bytes: for the table and its copies, about.
        across: also count n-grams that run from one sequence of the modality into the next, as the original tool does.
        progress: hears the share that is done.

    Raises:
        DataError: an id is outside what the sidecar says.
    """
    bits = width(corpora, modality)
    limit = max(1, memory_bytes // (8 * (1 + len(_words(n, bits))) * _COPIES))
    total, done = Tally(), 0.0
    todo = [(0, 1)]
    while todo:
        part = _Part(*todo.pop())
        table = _Table(n, bits, limit=limit if n > 1 else None)
        for keys, share in _stream(corpora, modality, n, bits, across):
            table.add(part.of(keys, n, bits))
            while table.is_full and part.parts < _MOST_PARTS:  # the other half of the prefixes waits for its own pass
                todo.append(part.halve())
                table.keep(part)
            progress(done + share / part.parts)
        done += 1 / part.parts
        total = total + table.result().tally()
    return total


class _Part:
    """The prefixes whose hash is ``number`` modulo ``parts``, a power of two."""

    def __init__(self, number: int, parts: int) -> None:
        self.number, self.parts = number, parts

    def halve(self) -> tuple[int, int]:
        """Keep half; returns the other."""
        self.parts *= 2
        return self.number + self.parts // 2, self.parts

    def of(self, keys: tuple[Words, ...], n: int, bits: int) -> tuple[Words, ...]:
        """The n-grams that are in this part."""
        if self.parts == 1:
            return keys
        inside = self.holds(keys, n, bits)
        return tuple(word[inside] for word in keys)

    def holds(self, keys: tuple[Words, ...], n: int, bits: int) -> npt.NDArray[np.bool_]:
        hashed = np.zeros(1, dtype=np.uint64)
        for word in _prefixes(keys, n, bits):
            hashed = order.mix(hashed ^ word + np.uint64(1))
        return np.broadcast_to(hashed % np.uint64(self.parts) == self.number, keys[0].shape)


class _Table:
    """N-grams so far: sorted ones with their counts, and chunks that wait until joining them is worth it."""

    def __init__(self, n: int, bits: int, *, limit: int | None) -> None:
        self.n, self.bits, self.limit = n, bits, limit
        empty = tuple(np.zeros(0, dtype=np.uint64) for _ in _words(n, bits))
        self.joined = Ngrams(n, bits, empty, np.zeros(0, dtype=np.int64))
        self._waiting: list[Ngrams] = []
        self._rows = 0

    @property
    def is_full(self) -> bool:
        """Whether more n-grams differ than may."""
        return self.limit is not None and len(self.joined.counts) > self.limit

    def add(self, keys: tuple[Words, ...]) -> None:
        chunk = _counted(self.n, self.bits, keys)
        self._waiting.append(chunk)
        self._rows += len(chunk.counts)
        if self._rows > len(self.joined.counts) // 2:
            self._join()

    def keep(self, part: _Part) -> None:
        """Leave out what is not in the part."""
        inside = part.holds(self.joined.keys, self.n, self.bits)
        keys = tuple(word[inside] for word in self.joined.keys)
        self.joined = Ngrams(self.n, self.bits, keys, self.joined.counts[inside])

    def result(self) -> Ngrams:
        self._join()
        return self.joined

    def _join(self) -> None:
        parts = [self.joined, *self._waiting]
        keys = tuple(np.concatenate(words) for words in zip(*(part.keys for part in parts), strict=True))
        self.joined = _counted(self.n, self.bits, keys, np.concatenate([part.counts for part in parts]))
        self._waiting, self._rows = [], 0


def _stream(
    corpora: Sequence[IndexedCorpus], modality: int, n: int, bits: int, across: bool
) -> Iterator[tuple[tuple[Words, ...], float]]:
    """The n-grams of a chunk, and the share of the corpora behind it."""
    tail = np.zeros(0, dtype=np.int64)
    for number, corpus in enumerate(corpora):
        for chunk in pieces(corpus, modality):
            share = (number + (int(chunk.sequence[-1]) + 1) / corpus.sequences) / len(corpora)
            if across:
                run = np.concatenate((tail, corpus.elements[chunk.positions()]))
                tail = run[max(0, len(run) - n + 1) :]
                yield _packed(corpus, run, np.arange(max(0, len(run) - n + 1)), n, bits), share
            else:
                yield _packed(corpus, corpus.elements, chunk.positions(n), n, bits), share


def _words(n: int, bits: int) -> list[int]:
    """Ids in each word of a key: all in one if they fit, else the last id has a word of its own."""
    if n * bits <= 64:
        return [n]
    most = 64 // bits
    return [min(most, n - 1 - start) for start in range(0, n - 1, most)] + [1]


def _packed(corpus: IndexedCorpus, ids: np.ndarray[Any, Any], positions: Ints, n: int, bits: int) -> tuple[Words, ...]:
    """Keys of the n-grams that start at ``positions`` of ``ids``."""
    words, at = [], 0
    for size in _words(n, bits):
        word = np.zeros(len(positions), dtype=np.uint64)
        for place in range(at, at + size):
            found = ids[positions + place].astype(np.uint64)  # an id below 0 becomes a large one
            if len(found) and int(found.max()) >> bits:
                raise DataError(
                    f"{corpus.bin_path}: an id of more than {bits} bits, which the vocabulary of its sidecar does not "
                    f"have. tools/inspect_data.py verify {corpus.prefix} says where."
                )
            word = word << np.uint64(bits) | found
        words.append(word)
        at += size
    return tuple(words)


def _prefixes(keys: tuple[Words, ...], n: int, bits: int) -> tuple[Words, ...]:
    """The keys of n-grams without their last id."""
    return (keys[0] >> np.uint64(bits),) if len(_words(n, bits)) == 1 else keys[:-1]


def _counted(n: int, bits: int, keys: tuple[Words, ...], counts: Ints | None = None) -> Ngrams:
    """Different keys, sorted, with the sums of their counts (absent: each is there once)."""
    if counts is None and len(keys) == 1:
        found, number = np.unique(keys[0], return_counts=True)
        return Ngrams(n, bits, (found,), number.astype(np.int64))
    counts = np.ones(len(keys[0]), dtype=np.int64) if counts is None else counts
    # Runs that are sorted already, as in a join, make the stable sort one of merging.
    turn = np.argsort(keys[0], kind="stable") if len(keys) == 1 else np.lexsort(keys[::-1])
    keys = tuple(word[turn] for word in keys)
    changes = _changes(keys)
    sums = np.add.reduceat(counts[turn], changes) if len(changes) else counts
    return Ngrams(n, bits, tuple(word[changes] for word in keys), sums)


def _changes(words: tuple[Words, ...]) -> Ints:
    """Where another key begins, in sorted keys."""
    differs = np.ones(len(words[0]), dtype=np.bool_)
    differs[1:] = False
    for word in words:
        differs[1:] |= word[1:] != word[:-1]
    return np.flatnonzero(differs)


def _histogram(counts: Ints) -> dict[int, int]:
    values, often = np.unique(counts, return_counts=True)
    return dict(zip(values.tolist(), often.tolist(), strict=True))


def _joined(ours: Mapping[int, int], theirs: Mapping[int, int]) -> dict[int, int]:
    return {value: ours.get(value, 0) + theirs.get(value, 0) for value in {**ours, **theirs}}


def _bits(plus: Mapping[int, int], minus: Mapping[int, int]) -> float:
    """Sum of often x c log2 c over ``plus``, less that over ``minus``, rounded once."""
    terms = [often * count * math.log2(count) for count, often in plus.items()]
    return math.fsum(terms + [-often * count * math.log2(count) for count, often in minus.items()])
