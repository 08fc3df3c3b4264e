"""The C++ helper gives what its Python twins give."""

import importlib
import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimega.data import order, packing
from unimega.data.native import helper

if importlib.util.find_spec("unimega._data_index") is None:
    pytest.skip(
        "unimega._data_index is not compiled: it needs a C++ compiler, then `make setup`", allow_module_level=True
    )
native = importlib.import_module("unimega._data_index")

SPEC_START = {10: [5, 0, 2, 7, 9, 1, 3, 6, 4, 8], 5000: [4768, 680, 3915, 3249, 1327, 2955]}


@pytest.mark.parametrize("size", sorted(SPEC_START))
def test_permute_gives_the_reference_values(size):
    start = SPEC_START[size]
    assert native.permute(size, 7, 0, len(start)).tolist() == start
    assert native.permute(10**6, 7, 999997, 3).tolist() == [850516, 314142, 622400]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4095, 4096, 4097, 5000, 70000])
@pytest.mark.parametrize("key", [0, 7, 2**64 - 1])
def test_permute_equals_its_twin(size, key):
    whole = native.permute(size, key, 0, size)
    assert sorted(whole.tolist()) == list(range(size))
    assert np.array_equal(whole, order.permute_python(size, key, 0, size))
    third = size // 3
    assert np.array_equal(native.permute(size, key, third, third), whole[third : 2 * third])


@pytest.mark.parametrize("open_packs", [1, 2, 64])
@pytest.mark.parametrize("pack_length", [1, 7, 96, 1000])
def test_best_fit_equals_its_twin(open_packs, pack_length):
    lengths = np.random.default_rng(pack_length).integers(1, pack_length + 1, 3000)
    for some in (lengths, lengths[:0], lengths[:1], np.full(100, pack_length)):
        starts, items = native.best_fit(some, pack_length, open_packs=open_packs)
        twin = packing.best_fit_python(some, pack_length, open_packs=open_packs)
        assert np.array_equal(starts, twin.starts)
        assert np.array_equal(items, twin.items)
        assert sorted(items.tolist()) == list(range(len(some)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=400))),
    st.integers(1, 70),
)
def test_best_fit_equals_its_twin_whatever_the_lengths(case, open_packs):
    room, lengths = case[0], np.asarray(case[1], dtype=np.int64)
    starts, items = native.best_fit(lengths, room, open_packs=open_packs)
    twin = packing.best_fit_python(lengths, room, open_packs=open_packs)
    assert np.array_equal(starts, twin.starts) and np.array_equal(items, twin.items)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 2**64 - 1), st.data())
def test_permute_equals_its_twin_at_any_position(size, key, data):
    start = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(0, min(50, size - start)))
    assert np.array_equal(native.permute(size, key, start, count), order.permute_python(size, key, start, count))


def test_what_is_loaded_is_this_version():
    """An extension that an older checkout left behind must not be called."""
    assert helper is native


PIECES = {
    "elements": [np.arange(5, dtype=np.int32)],
    "literals": np.arange(3, dtype=np.int32),
    "starts": np.asarray([0, 2, 3]),
    "address": np.asarray([0, 0, 0]),
    "length": np.asarray([4, 1, 3]),
    "flags": np.asarray([2, 4, 12], dtype=np.uint8),
    "corpus": np.zeros(3, dtype=np.int16),
    "pack_starts": np.asarray([0, 2]),
    "pack_length": 8,
    "scale": np.ones(2, dtype=np.float32),
    "vision_ids": np.zeros(0, dtype=np.int32),
    "text_limit": 10,
    "offset": 10,
    "codebook": 4,
    "pad": 0,
    "row_separator": 0,
    "separator": 0,
    "cross_document": False,
}


def test_ids_out_of_place_are_told_apart_from_calls_that_are_wrong():
    tokens, labels, *_ = native.collate(**PIECES)
    assert tokens.tolist() == [0, 1, 2, 3, 0, 0, 0, 0] and labels.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    for changes in ({"text_limit": 3}, {"vision_ids": np.asarray([2], dtype=np.int32)}):
        assert native.collate(**PIECES | changes) is None
    wide = np.asarray([0, 1, 2**40, 3, 4])
    assert native.collate(**PIECES | {"elements": [wide]}) is None, "an id that int32 cannot hold"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"address": np.asarray([2, 0, 0])}, "elements 2 \\+ 4 of 5"),
        ({"address": np.asarray([-1, 0, 0])}, "elements -1 \\+ 4 of 5"),
        ({"address": np.asarray([0, 3, 0])}, "literal out of range"),
        ({"corpus": np.ones(3, dtype=np.int16)}, "range"),
        ({"length": np.asarray([4, 1, 4])}, "do not fill 1 packs of 8"),
        ({"length": np.asarray([4, 0, 4])}, "do not fill"),
        ({"starts": np.asarray([0, 2, 4])}, "do not belong together"),
        ({"starts": np.asarray([0, 0, 3])}, "do not belong together"),
        ({"pack_starts": np.asarray([0, 3])}, "do not belong together"),
        ({"flags": np.zeros(2, dtype=np.uint8)}, "do not belong together"),
        ({"row_separator": -1}, "row_separator"),
    ],
)
def test_pieces_out_of_bounds_are_refused(changes, words):
    with pytest.raises((ValueError, IndexError), match=words):
        native.collate(**PIECES | changes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: native.best_fit(np.array([3, 0]), 4, open_packs=2), "item 1 has length 0"),
        (lambda: native.best_fit(np.array([5]), 4, open_packs=2), "item 0 has length 5"),
        (lambda: native.best_fit(np.array([1]), 0, open_packs=2), "pack_length=0"),
        (lambda: native.best_fit(np.array([1]), 4, open_packs=0), "open_packs=0"),
        (lambda: native.best_fit(np.ones((2, 2)), 4, open_packs=2), "2 dims"),
        (lambda: native.permute(10, 7, 8, 3), "8 \\+ 3 do not lie"),
        (lambda: native.permute(10, 7, -1, 3), "do not lie"),
        (lambda: native.permute(-1, 7, 0, 0), "size=-1"),
    ],
)
def test_out_of_bounds_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
