"""Statistics and entropies of corpora: by hand, exact however the work is cut, in bounded memory."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpora import CODEBOOK, TEXT, facts, pair, random_documents, write
from unimega.data import entropy, statistics
from unimega.data import format as layout
from unimega.data.reader import IndexedCorpus
from unimega.data.scan import pieces
from unimega.errors import DataError

SOURCES = [
    {"path": "a.jsonl", "first_document": 0, "direction": "both"},
    {"path": "b.jsonl", "first_document": 1, "direction": "t2i"},
    {"path": "empty.jsonl", "first_document": 3, "direction": "both"},
    {"path": "a.jsonl", "first_document": 3, "direction": "both"},
]


def open_corpus(folder, documents, name="a", **changes):
    corpus = IndexedCorpus(write(folder / name, documents, **changes))
    corpus.check()
    return corpus


def runs(documents, modality):
    return [ids for document in documents for mode, ids in document if mode & 7 == modality]


def plain_entropy(sequences, n):
    ngrams, prefixes = Counter(), Counter()
    for ids in sequences:
        for start in range(len(ids) - n + 1):
            ngrams[tuple(ids[start : start + n])] += 1
            prefixes[tuple(ids[start : start + n - 1])] += 1
    total = sum(ngrams.values())
    return -sum(c / total * math.log2(c / prefixes[key[:-1]]) for key, c in ngrams.items()) if total else 0.0


def test_counts_of_a_small_corpus(tmp_path):
    documents = [
        [(layout.MODE_TEXT, [6, 7, 8])],
        pair([6, 7], [0, 1, 2, 3]),
        pair([9], [5] * 9),
        [(0x09, [1, 2]), (layout.MODE_QUESTION, [6]), (layout.MODE_ANSWER, [7, 8])],
        [(layout.MODE_TEXT, [6]), (layout.MODE_IMAGE, [4]), (layout.MODE_TEXT, [])],
        [(layout.MODE_IMAGE, [4, 4])],
    ]
    found = statistics.collect(open_corpus(tmp_path, documents, sources=SOURCES))
    assert found.tokens == (10, 18) and found.holding == (5, 5)
    assert dict(zip(found.documents.values, found.documents.counts, strict=True)) == {2: 2, 3: 1, 5: 1, 6: 1, 10: 1}
    assert {kind: (share.documents, share.tokens) for kind, share in found.kinds.items()} == {
        "text": (1, (3, 0)),
        "pair": (2, (3, 13)),
        "questions and answers": (1, (3, 2)),
        "text and images": (1, (1, 1)),
        "images alone": (1, (0, 2)),
    }
    assert {name: (share.documents, share.tokens) for name, share in found.sources.items()} == {
        "a.jsonl": (4, (7, 5)),
        "b.jsonl": (2, (3, 13)),
    }
    assert {name: (share.documents, share.tokens) for name, share in found.roles.items()} == {
        "body": (7, (4, 16)),
        "body/context": (1, (0, 2)),
        "caption": (2, (3, 0)),
        "question/context": (1, (1, 0)),
        "answer": (1, (2, 0)),
    }
    summary = found.summary()
    assert summary["documents"]["percentiles"] == {"0": 2, "1": 2, "10": 2, "25": 2, "50": 3, "75": 6, "90": 10} | {
        "99": 10,
        "100": 10,
    }
    assert summary["documents"]["mean"] == round(28 / 6, 2)
    assert math.isclose(sum(share["share"] for share in summary["sources"].values()), 1, abs_tol=1e-5)


def test_percentiles_are_those_of_the_sorted_lengths():
    draw = np.random.default_rng(0)
    for size in (1, 2, 7, 100, 101):
        lengths = np.sort(draw.integers(0, 30, size))
        counted = statistics.Lengths.of(lengths)
        for percent in statistics.PERCENTILES:
            assert counted.percentile(percent) == lengths[max(0, math.ceil(size * percent / 100) - 1)]


@pytest.mark.parametrize("most", [0, 3, 400, 401, 10**12])
def test_lengths_are_counted_however_long_they_are(most):
    """Short ones in a table, long ones sorted: neither is seen from outside."""
    lengths = np.append(np.random.default_rng(1).integers(0, most + 1, 99), most)
    counted = statistics.Lengths.of(lengths)
    assert dict(zip(counted.values.tolist(), counted.counts.tolist(), strict=True)) == Counter(lengths.tolist())
    assert (np.diff(counted.values) > 0).all() and len(statistics.Lengths.of(lengths[:0]).values) == 0


documents_of = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 10**6)))


@settings(max_examples=25, deadline=None)
@given(documents_of, st.lists(st.integers(0, 60), max_size=4), st.integers(1, 4), st.integers(1, 7))
def test_the_counts_of_shards_add_up_to_the_whole(tmp_path_factory, made, cuts, n, chunk):
    number, seed = made
    corpus = open_corpus(tmp_path_factory.mktemp("shards"), random_documents(number, seed), sources=SOURCES)
    borders = sorted({0, number, *(min(cut, number) for cut in cuts)})
    shards = list(itertools.pairwise(borders))
    whole = statistics.collect(corpus)
    parts = [statistics.collect(corpus, documents=shard) for shard in shards]
    added = sum(parts[1:], parts[0])
    assert added.summary() == whole.summary()
    for modality in (0, 1):
        bits = entropy.width([corpus], modality)
        ngrams = [entropy.count(corpus, modality, n, bits=bits, documents=shard) for shard in shards]
        joined = sum(ngrams[1:], ngrams[0]).tally()
        assert joined == entropy.count(corpus, modality, n, bits=bits).tally()
        assert joined == entropy.conditional_entropy([corpus], modality, n)
    found = [
        ids for part in pieces(corpus, 1, chunk_tokens=chunk) for ids in corpus.elements[part.positions()].tolist()
    ]
    assert found == [code for at in np.flatnonzero(corpus.modes & 7 == 1) for code in corpus.sequence(at).tolist()]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [TEXT, 1 << 18])
def test_entropy_is_that_of_the_formula(tmp_path, n, size):
    documents = random_documents(80, 3)
    changed = facts()["tokenizer"] | {"size": size}
    corpora = [open_corpus(tmp_path, documents[:50], tokenizer=changed), open_corpus(tmp_path, documents[50:], "b")]
    for modality in (0, 1):
        expected = plain_entropy(runs(documents, modality), n)
        found = entropy.conditional_entropy(corpora, modality, n)
        assert found.number == sum(max(0, len(ids) - n + 1) for ids in runs(documents, modality))
        assert found.entropy == pytest.approx(expected, abs=1e-9)
        run = [[token for ids in runs(documents, modality) for token in ids]]
        across = entropy.conditional_entropy(corpora, modality, n, across=True)
        assert across.entropy == pytest.approx(plain_entropy(run, n), abs=1e-9)
    codes = entropy.conditional_entropy(corpora, 1, 1)
    assert codes.different == CODEBOOK and codes.largest == max(
        Counter(code for ids in runs(documents, 1) for code in ids).values()
    )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_little_memory_changes_passes_and_no_bit(tmp_path, monkeypatch, n):
    corpus = open_corpus(tmp_path, random_documents(300, 5))
    whole = entropy.conditional_entropy([corpus], 1, n)
    assert whole.different > 900
    rows, passes, shares = [], [], []
    original = entropy._Table.result

    def result(table):
        rows.append(len(table.joined.counts))
        passes.append(1)
        return original(table)

    monkeypatch.setattr(entropy._Table, "result", result)
    found = entropy.conditional_entropy([corpus], 1, n, memory_bytes=100 * 64, progress=shares.append)
    assert found == whole and found.entropy == whole.entropy
    assert len(passes) > 4 and max(rows) <= 150
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_long_sequences_are_read_in_pieces(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    documents = [[(0, draw.integers(0, TEXT, size).tolist())] for size in (1000, 3, 0, 77)]
    corpus = open_corpus(tmp_path, documents)
    parts = list(pieces(corpus, 0, chunk_tokens=64))
    assert max(int(part.length.sum()) for part in parts) <= 64 and len(parts) >= 17
    for n in (1, 3):
        starts = np.concatenate([part.positions(n) for part in parts])
        assert len(starts) == len(set(starts.tolist())) == sum(max(0, len(d[0][1]) - n + 1) for d in documents)


def test_a_corpus_of_nothing_has_no_entropy(tmp_path):
    corpus = open_corpus(tmp_path, [[(0, [])], [(0, [7])]])
    assert entropy.conditional_entropy([corpus], 0, 2).entropy == 0
    assert entropy.conditional_entropy([corpus], 1, 1).entropy == 0
    assert statistics.collect(corpus).summary()["documents"]["percentiles"]["50"] == 0


def test_an_id_outside_the_vocabulary_gets_one_line(tmp_path):
    corpus = open_corpus(tmp_path, [[(0, [7, 1 << 20, 3])]])
    with pytest.raises(DataError, match=r"a\.bin: an id of more than 5 bits.*inspect_data\.py verify .*a says where"):
        entropy.conditional_entropy([corpus], 0, 2)
