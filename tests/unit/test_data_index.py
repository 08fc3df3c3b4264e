"""The C++ helper gives what its Python twins give."""

import importlib
import importlib.util

import numpy as np
import pytest

from unimega.data import order, packing

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
    assert np.array_equal(whole, order.permute(size, key, 0, size))
    third = size // 3
    assert np.array_equal(native.permute(size, key, third, third), whole[third : 2 * third])


@pytest.mark.parametrize("open_packs", [1, 2, 64])
@pytest.mark.parametrize("pack_length", [1, 7, 96, 1000])
def test_best_fit_equals_its_twin(open_packs, pack_length):
    lengths = np.random.default_rng(pack_length).integers(1, pack_length + 1, 3000)
    for some in (lengths, lengths[:0], lengths[:1], np.full(100, pack_length)):
        starts, items = native.best_fit(some, pack_length, open_packs=open_packs)
        twin = packing.best_fit(some, pack_length, open_packs=open_packs)
        assert np.array_equal(starts, twin.starts)
        assert np.array_equal(items, twin.items)
        assert sorted(items.tolist()) == list(range(len(some)))


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
