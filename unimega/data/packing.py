"""Online best fit of whole documents into packs of one length, with bounded memory and no randomness."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.data import native

OPEN_PACKS = 64


@dataclass(frozen=True)
class Packs:
    """Which items each pack holds: pack p is ``items[starts[p] : starts[p + 1]]``."""

    starts: npt.NDArray[np.int64]
    """int64 [packs + 1]."""
    items: npt.NDArray[np.int64]
    """int64 [items]: places in the list of lengths; each occurs once."""

    @property
    def num_packs(self) -> int:
        """Number of packs."""
        return len(self.starts) - 1


def best_fit(lengths: npt.NDArray[np.int64], pack_length: int, *, open_packs: int = OPEN_PACKS) -> Packs:
    """Put items into packs in the order of the list; packs are numbered in the order they close.

    An item goes to the open pack with the least room that still holds it (equal: the one that got that room last).
    If none does, a new pack is opened, after closing the fullest when ``open_packs`` are open. A full pack closes at
    once; at the end the rest closes, fullest first.

    Args:
        lengths: [items], each in 1 .. ``pack_length`` (the caller has seen to longer ones).
        pack_length: room of a pack.
    """
    if native.helper is None:
        return best_fit_python(lengths, pack_length, open_packs=open_packs)
    return Packs(*native.helper.best_fit(lengths, pack_length, open_packs=open_packs))


def best_fit_python(lengths: npt.NDArray[np.int64], pack_length: int, *, open_packs: int = OPEN_PACKS) -> Packs:
    """``best_fit`` without the C++ helper."""
    outside = np.flatnonzero((lengths < 1) | (lengths > pack_length))
    if len(outside):
        first = int(outside[0])
        raise ValueError(f"item {first} has length {lengths[first]}, which does not lie in 1..{pack_length}")
    rooms: list[int] = []  # ascending; `packs` in the same order
    packs: list[list[int]] = []
    items: list[int] = []
    starts = [0]
    for item, length in enumerate(lengths.tolist()):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            if place == open_packs:
                rooms.pop(0)
                items += packs.pop(0)
                starts.append(len(items))
            room, pack = pack_length, []
        else:
            room, pack = rooms.pop(place), packs.pop(place)
        pack.append(item)
        room -= length
        if room:
            place = bisect_left(rooms, room)
            rooms.insert(place, room)
            packs.insert(place, pack)
        else:
            items += pack
            starts.append(len(items))
    for pack in packs:
        items += pack
        starts.append(len(items))
    return Packs(np.asarray(starts, dtype=np.int64), np.asarray(items, dtype=np.int64))
