"""Randomness without state: a hash of 64-bit words, and a permutation that is computed at any position.

Written out here because numpy may change its generators between versions, and an order lives as long as checkpoints.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.data import native

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND, _SHIFT = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(33)
SORTED_BELOW = 4096
"""Up to this size a permutation is a sort by hash; a Feistel network is not uniform enough for small sets."""
_ROUNDS = 8


def mix(words: Words) -> Words:
    """The murmur3 finaliser of each 64-bit word."""
    words = words ^ (words >> _SHIFT)
    words = words * _FIRST
    words = words ^ (words >> _SHIFT)
    words = words * _SECOND
    return words ^ (words >> _SHIFT)


def draw(*words: int | npt.NDArray[Any]) -> Words:
    """Hash of 64-bit words, broadcast over arrays: ``h = mix((h ^ word) + golden)`` for each, from 0."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = mix((state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return state


def draw_word(*words: int) -> int:
    """``draw`` of ints, as an int."""
    return int(draw(*words)[0])


def uniform(*words: int | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """``draw`` as numbers in [0, 1) with 53 bits."""
    return (draw(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(size: int, key: int, start: int, count: int) -> npt.NDArray[np.int64]:
    """Places ``start .. start + count`` of the permutation of ``range(size)`` that belongs to ``key``: int64 [count].

    Time and memory follow ``count``, not ``size`` (above ``SORTED_BELOW``).
    """
    if native.helper is None:
        return permute_python(size, key, start, count)
    places: npt.NDArray[np.int64] = native.helper.permute(size, key, start, count)
    return places


def permute_python(size: int, key: int, start: int, count: int) -> npt.NDArray[np.int64]:
    """``permute`` without the C++ helper."""
    if size <= SORTED_BELOW:
        return permute_whole(size, np.asarray([key], dtype=np.uint64))[0, start : start + count]
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << int(half)) - 1)
    keys = draw(key, np.arange(_ROUNDS))
    out = np.arange(start, start + count, dtype=np.uint64)
    todo = np.arange(count)
    while len(todo):  # cycle walking: what falls outside the range walks on, four turns on average at most
        value = out[todo]
        left, right = value >> half, value & low
        for round_key in keys:
            left, right = right, (left ^ mix(right ^ round_key)) & low
        value = left << half | right
        out[todo] = value
        todo = todo[value >= np.uint64(size)]
    return out.astype(np.int64)


def permute_whole(size: int, keys: Words) -> npt.NDArray[np.int64]:
    """The permutations of a small set (``SORTED_BELOW``) that belong to ``keys`` [n], whole: int64 [n, size]."""
    return np.argsort(draw(keys[:, None], np.arange(size)), axis=1, kind="stable").astype(np.int64)
