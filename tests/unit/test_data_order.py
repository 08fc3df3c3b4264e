"""Hash and permutation: reference values, bijection, position independence; packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimega.data import order
from unimega.data.packing import best_fit


def test_reference_values():
    assert int(order.mix(np.asarray([1], dtype=np.uint64))[0]) == 0xB456BCFC34C2CB2C
    assert order.draw_word(7, 0, 0, 0) == 0x43EA521DA4960702
    assert order.draw_word(7, 0, 12345, 0) == 0x1695F4E59956B65C
    assert order.permute(10, 7, 0, 10).tolist() == [5, 0, 2, 7, 9, 1, 3, 6, 4, 8]
    assert order.permute(5000, 7, 0, 6).tolist() == [4768, 680, 3915, 3249, 1327, 2955]
    assert order.permute(10**6, 7, 999_997, 3).tolist() == [850516, 314142, 622400]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**64 - 1), st.data())
def test_permute_is_a_bijection_at_any_position(size, key, data):
    whole = order.permute(size, key, 0, size)
    assert np.array_equal(np.sort(whole), np.arange(size))
    start = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(0, size - start))
    assert np.array_equal(order.permute(size, key, start, count), whole[start : start + count])


@pytest.mark.parametrize("size", [4096, 4097, 65536, 65537])
def test_permute_at_the_sizes_where_it_changes(size):
    assert np.array_equal(np.sort(order.permute(size, 3, 0, size)), np.arange(size))


def test_uniform_is_even_and_its_words_are_independent():
    documents = np.arange(100_000)
    values = order.uniform(7, 0, documents, 0)
    counts = np.histogram(values, 100, (0, 1))[0]
    z = (((counts - 1000) ** 2 / 1000).sum() - 99) / np.sqrt(2 * 99)
    assert values.min() >= 0 and values.max() < 1 and abs(z) < 4
    for other in (
        order.uniform(7, 0, documents, 1),
        order.uniform(7, 1, documents, 0),
        order.uniform(8, 0, documents, 0),
    ):
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.015


lengths = st.lists(st.integers(1, 50), max_size=300).map(lambda values: np.asarray(values, dtype=np.int64))


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 8))
def test_packing_loses_nothing_and_overfills_nothing(values, open_packs):
    packs = best_fit(values, 50, open_packs=open_packs)
    assert sorted(packs.items.tolist()) == list(range(len(values)))
    sums = [values[packs.items[a:b]].sum() for a, b in zip(packs.starts, packs.starts[1:], strict=False)]
    assert all(0 < total <= 50 for total in sums)


@settings(max_examples=60, deadline=None)
@given(lengths)
def test_packing_is_best_fit(values):
    """With room for all packs open: each item goes where the least room is left, and a new pack only if none fits."""
    packs = best_fit(values, 50, open_packs=10_000)
    place = np.empty(len(values), dtype=np.int64)
    for number, (a, b) in enumerate(zip(packs.starts, packs.starts[1:], strict=False)):
        place[packs.items[a:b]] = number
    room: dict[int, int] = {}
    for item, length in enumerate(values.tolist()):
        fitting = [free for free in room.values() if free >= length]
        before = room.get(int(place[item]))
        assert before == min(fitting) if fitting else before is None
        room[int(place[item])] = (50 if before is None else before) - length
    ends = [room[number] for number in range(packs.num_packs)]
    still_open = [free for free in ends if free]
    assert still_open == sorted(still_open) and not any(ends[: len(ends) - len(still_open)])


def test_packing_closes_the_fullest_of_the_open():
    packs = best_fit(np.asarray([6, 8, 7, 9, 4], dtype=np.int64), 10, open_packs=2)
    found = [packs.items[a:b].tolist() for a, b in zip(packs.starts, packs.starts[1:], strict=False)]
    assert found == [[1], [2], [0, 4], [3]]


def test_packing_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match=r"item 1 has length 51, which does not lie in 1..50"):
        best_fit(np.asarray([3, 51], dtype=np.int64), 50)
