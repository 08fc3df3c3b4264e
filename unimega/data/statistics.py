"""What a corpus holds, counted in integers: the counts of its parts add up to those of the whole, exactly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.data.reader import IndexedCorpus
from unimega.data.scan import MODALITIES, Ints

_CHUNK = 1 << 16
"""Documents at a time: their arrays stay in a cache; with four times as many, 10^7 took 1.0 s, not 0.4."""
_TABLE_PER_LENGTH = 4
"""Lengths up to so many times their number are counted in a table; longer ones would make it large."""
PERCENTILES = (0, 1, 10, 25, 50, 75, 90, 99, 100)
KINDS = ("text", "pair", "images alone", "text and images", "questions and answers")
"""Kinds of documents by what they hold; a kind's number is its place."""
_TEXT, _PAIR, _IMAGES, _MIXED, _CHAT = range(5)


@dataclass(frozen=True)
class Lengths:
    """How often each length occurs."""

    values: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Different lengths, rising."""
    counts: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @staticmethod
    def of(lengths: npt.NDArray[np.integer[Any]]) -> "Lengths":
        """Count the lengths of an array, none of them below 0."""
        if len(lengths) and int(lengths.max()) <= _TABLE_PER_LENGTH * len(lengths):  # short ones: nothing is sorted
            table = np.bincount(lengths)
            values = np.flatnonzero(table)
            counts = table[values]
        else:
            values, counts = np.unique(lengths, return_counts=True)
        return Lengths(values.astype(np.int64), counts.astype(np.int64))

    def __add__(self, other: "Lengths") -> "Lengths":
        values, place = np.unique(np.concatenate((self.values, other.values)), return_inverse=True)
        counts = np.zeros(len(values), dtype=np.int64)
        np.add.at(counts, place, np.concatenate((self.counts, other.counts)))
        return Lengths(values, counts)

    @property
    def number(self) -> int:
        """How many were counted."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Their sum."""
        return int((self.values * self.counts).sum())

    def percentile(self, percent: float) -> int:
        """The smallest length that at least ``percent`` of all do not exceed; 0 of none."""
        if not len(self.values):
            return 0
        place = np.searchsorted(np.cumsum(self.counts), max(1, -(-self.number * percent // 100)))
        return int(self.values[min(int(place), len(self.values) - 1)])

    def summary(self) -> dict[str, Any]:
        """Number, total, mean and percentiles, for people and for JSON."""
        mean = round(self.total / self.number, 2) if self.number else 0.0
        return {
            "number": self.number,
            "total": self.total,
            "mean": mean,
            "percentiles": {str(percent): self.percentile(percent) for percent in PERCENTILES},
        }


@dataclass(frozen=True)
class Share:
    """Documents and tokens of a part of a corpus."""

    documents: int = 0
    tokens: tuple[int, ...] = (0,) * len(MODALITIES)
    """Per modality."""

    def __add__(self, other: "Share") -> "Share":
        tokens = tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True))
        return Share(self.documents + other.documents, tokens)


@dataclass(frozen=True)
class Statistics:
    """The counts of some documents; ``+`` joins those of others."""

    documents: Lengths = field(default_factory=Lengths)
    """Stored tokens of each document."""
    sequences: tuple[Lengths, ...] = (Lengths(),) * len(MODALITIES)
    """Tokens of each sequence, per modality."""
    holding: tuple[int, ...] = (0,) * len(MODALITIES)
    """Documents that hold a sequence of each modality."""
    kinds: Mapping[str, Share] = field(default_factory=dict)
    """By what documents hold; a kind that does not occur is absent."""
    roles: Mapping[str, Share] = field(default_factory=dict)
    """By role, ``/context`` behind what carries no loss when instructions are masked: sequences and their tokens."""
    sources: Mapping[str, Share] = field(default_factory=dict)
    """By the file that rows came from."""

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.documents + other.documents,
            tuple(a + b for a, b in zip(self.sequences, other.sequences, strict=True)),
            tuple(a + b for a, b in zip(self.holding, other.holding, strict=True)),
            _joined(self.kinds, other.kinds),
            _joined(self.roles, other.roles),
            _joined(self.sources, other.sources),
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Stored tokens per modality."""
        return tuple(lengths.total for lengths in self.sequences)

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "documents": self.documents.summary(),
            "tokens": dict(zip(MODALITIES, self.tokens, strict=True)),
            "documents_with": dict(zip(MODALITIES, self.holding, strict=True)),
            "sequences": {name: lengths.summary() for name, lengths in zip(MODALITIES, self.sequences, strict=True)},
            "kinds": _shares(self.kinds, "documents"),
            "roles": _shares(self.roles, "sequences"),
            "sources": _shares(self.sources, "documents"),
        }


def collect(
    corpus: IndexedCorpus,
    *,
    documents: tuple[int, int] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """Count a corpus from its index and sidecar; `.bin` is not read and memory does not grow.

    Args:
        corpus: checked.
        documents: first document and the one behind the last; absent: all.
        progress: hears of the documents of each chunk.
    """
    first, last = documents or (0, corpus.num_documents)
    result = Statistics()
    for begin in range(first, last, _CHUNK):
        until = min(last, begin + _CHUNK)
        result = result + _chunk(corpus, begin, until)
        progress(until - begin)
    return result


def _chunk(corpus: IndexedCorpus, begin: int, until: int) -> Statistics:
    borders = corpus.documents[begin : until + 1]
    first, stop = int(borders[0]), int(borders[-1])
    lengths, modes = corpus.lengths[first:stop].astype(np.int64), corpus.modes[first:stop]
    modality, starts = layout.modality_of(modes), borders - first
    is_text, is_image = modality == layout.TEXT, modality == layout.VISION
    parts = [lengths * (modality == number) for number in range(len(MODALITIES))]
    tokens = np.stack([_sums(part, starts) for part in parts])
    texts, images = _sums(is_text, starts), _sums(is_image, starts)
    captions = _sums(layout.role_of(modes) == layout.CAPTION, starts)
    answers = _sums(layout.role_of(modes) == layout.ANSWER, starts)
    kind = np.where(images > 0, np.where(texts > 0, _MIXED, _IMAGES), _TEXT)
    kind = np.where((captions == 1) & (images == 1) & (np.diff(starts) == 2), _PAIR, kind)
    kind = np.where(answers > 0, _CHAT, kind)
    return Statistics(
        Lengths.of(tokens.sum(axis=0)),
        tuple(Lengths.of(lengths[modality == number]) for number in range(len(MODALITIES))),
        (int((texts > 0).sum()), int((images > 0).sum())),
        _grouped(kind, tokens, KINDS),
        _by_role(modes, parts),
        _by_source(corpus, begin, until, tokens),
    )


def _by_role(modes: npt.NDArray[np.int8], parts: Sequence[Ints]) -> dict[str, Share]:
    names = [role + mark for role in layout.ROLES for mark in ("", "/context")]
    number = layout.role_of(modes).astype(np.int64) * 2 + layout.is_context(modes)
    return _grouped(number, parts, names)


def _by_source(corpus: IndexedCorpus, begin: int, until: int, tokens: Ints) -> dict[str, Share]:
    if corpus.sidecar is None or not corpus.sidecar["sources"]:
        return _grouped(np.zeros(until - begin, dtype=np.int64), tokens, [corpus.bin_path.name])
    sources = corpus.sidecar["sources"]
    borders = np.asarray([source["first_document"] for source in sources], dtype=np.int64)
    owner = np.maximum(np.searchsorted(borders, np.arange(begin, until), side="right") - 1, 0)
    return _grouped(owner, tokens, [str(source["path"]) for source in sources])


def _grouped(number: Ints, tokens: Ints | Sequence[Ints], names: Sequence[str]) -> dict[str, Share]:
    """Shares of columns of ``tokens`` [modalities, n] by the number of each; names may repeat."""
    counts = np.bincount(number, minlength=len(names))
    sums = np.zeros((len(tokens), len(names)), dtype=np.int64)
    for row, values in zip(sums, tokens, strict=True):
        np.add.at(row, number, values)
    result: dict[str, Share] = {}
    for at in np.flatnonzero(counts).tolist():
        share = Share(int(counts[at]), tuple(int(value) for value in sums[:, at]))
        result[names[at]] = result.get(names[at], Share()) + share
    return result


def _sums(values: np.ndarray[Any, Any], starts: Ints) -> Ints:
    """Sum of each run of values from one of ``starts`` to the next."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return np.diff(sums[starts])


def _joined(ours: Mapping[str, Share], theirs: Mapping[str, Share]) -> dict[str, Share]:
    return {name: ours.get(name, Share()) + theirs.get(name, Share()) for name in {**ours, **theirs}}


def _shares(shares: Mapping[str, Share], unit: str) -> dict[str, Any]:
    """JSON of shares: what is counted, tokens per modality, and the fraction of all tokens."""
    total = max(1, sum(sum(share.tokens) for share in shares.values()))
    return {
        name: {
            unit: share.documents,
            "tokens": dict(zip(MODALITIES, share.tokens, strict=True)),
            "share": round(sum(share.tokens) / total, 6),
        }
        for name, share in shares.items()
    }
