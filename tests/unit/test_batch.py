"""Token order: three orders of the same rows, whom each token may see, and what a rank holds."""

import numpy as np
import pytest

from unimega.batch import Intervals, make_microbatch


def made(document, modality, *, modalities=3, **options):
    document, modality = np.asarray(document), np.asarray(modality)
    tokens = np.arange(len(document)) + 100
    options.setdefault("loss_weights", (document > 0) * 1.0)
    options.setdefault("step_tokens", np.count_nonzero(document))
    return make_microbatch(
        tokens, modality=modality, document=document, labels=tokens + 1, modalities=modalities, **options
    )


def sees(batch, scope):
    """The set of (query, key) pairs of input places that a scope allows."""
    order = batch.order
    place = order.permutation if scope == "own" else order.permutation[order.to_documents]
    intervals = order.own if scope == "own" else order.documents
    assert sum(intervals.lengths) == len(place) == intervals.cu_seqlens[-1]
    return {
        (int(place[i]), int(place[j]))
        for i in range(len(place))
        for j in range(int(intervals.lo[i]), int(intervals.hi[i]))
    }


def expected(document, modality, pack, *, own):
    """Said directly: same pack and document, key not behind the query, for ``own`` of the same modality."""
    group = [(p, d) for p, d in zip(pack, document, strict=True)]
    return {
        (i, j)
        for i in range(len(group))
        for j in range(i + 1)
        if group[i] == group[j] and (not own or modality[i] == modality[j])
    }


CASES = {
    "two packs": ([1, 1, 1, 2, 2, 0, 1, 1, 3, 3, 3, 0], [0, 1, 1, 0, 2, 0, 0, 0, 1, 0, 1, 0], 6),
    "pads in front and between": ([0, 0, 1, 1, 0, 2, 2, 2], [0, 0, 1, 0, 0, 1, 0, 1], 8),
    "a document interrupted by another": ([1, 1, 2, 2, 1, 1, 2, 1], [0, 1, 0, 1, 1, 0, 1, 1], 8),
    "pads alone": ([0, 0, 0, 0], [0, 0, 0, 0], 2),
    "one token": ([1], [2], 1),
    "no text": ([1, 1, 2, 2], [1, 2, 1, 1], 4),
}


@pytest.mark.parametrize("case", CASES)
def test_orders_and_who_sees_whom(case):
    document, modality, pack_length = CASES[case]
    batch = made(document, modality, pack_length=pack_length)
    order = batch.order
    assert sorted(order.permutation) == list(range(len(document)))
    assert (batch.tokens[order.inverse] == np.arange(len(document)) + 100).all()
    ranked = np.asarray(modality)[order.permutation] * 2 + (np.asarray(document)[order.permutation] == 0)
    assert (np.diff(ranked) >= 0).all(), "modality order, pads behind the text"
    assert order.counts == tuple(np.bincount(modality, minlength=3))
    assert order.pads == document.count(0)
    pack = [i // pack_length for i in range(len(document))]
    real = [d > 0 for d in document]
    for scope, own in (("document", False), ("own", True)):
        got = {(i, j) for i, j in sees(batch, scope) if real[i]}
        assert got == {(i, j) for i, j in expected(document, modality, pack, own=own) if real[i]}
        assert not {(i, j) for i, j in sees(batch, scope) if real[i] != real[j]}, "pads see nobody and are seen by none"
    seen: dict[tuple[int, int], int] = {}
    for i, key in enumerate(zip(pack, document, strict=True)):
        assert batch.order.positions[order.inverse][i] == seen.setdefault(key, 0)
        seen[key] += 1


def test_cross_document_is_one_document_a_pack_with_absolute_positions():
    batch = made([1, 1, 2, 0, 1, 2, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], pack_length=4, cross_document=True)
    assert {(2, 0), (2, 1), (5, 4)} <= sees(batch, "document")
    assert not {(4, 0), (3, 0)} & sees(batch, "document")
    assert batch.order.positions[batch.order.inverse].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_rows_of_a_rank_under_sequence_parallelism():
    document, modality = [1] * 8, [0, 1, 0, 1, 1, 1, 0, 2]
    parts = [made(document, modality, tp=2, tp_rank=rank, sequence_parallel=True) for rank in (0, 1)]
    assert [part.order.local_counts for part in parts] == [(3, 1, 0), (0, 3, 1)]
    assert made(document, modality).order.local_counts == (3, 4, 1)
    with pytest.raises(ValueError, match="cannot be cut"):
        made([1] * 5, [0] * 5, tp=2, sequence_parallel=True)


def test_the_tokens_of_the_step_are_never_guessed():
    tokens = np.arange(3)
    given = {"modality": tokens * 0, "document": tokens + 1, "labels": tokens, "loss_weights": tokens, "modalities": 1}
    assert make_microbatch(tokens, **given, step_tokens=9).step_tokens == 9
    with pytest.raises(TypeError, match="step_tokens"):
        make_microbatch(tokens, **given)


def test_loss_rows_are_the_weighted_ones_by_modality():
    batch = made([1] * 6, [0, 1, 0, 1, 2, 2], loss_weights=np.array([0, 1, 2, 0, 0, 3.0]))
    assert batch.loss_rows.tolist() == [1, 2, 5]
    assert batch.loss_counts == (1, 1, 1)
    assert batch.loss_weights[batch.loss_rows].tolist() == [2, 1, 3]


def test_intervals_of_runs_with_a_block_that_sees_both_ways():
    intervals = Intervals.of_runs([3, 4], both_ways=[(4, 6)])
    assert not intervals.causal and intervals.longest == 4
    assert intervals.lo.tolist() == [0, 0, 0, 3, 3, 3, 3]
    assert intervals.hi.tolist() == [1, 2, 3, 4, 6, 6, 7]
