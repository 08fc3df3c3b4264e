"""What became of the tensors of a folder, and the short list of it: layers that fare alike share a line. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["copied", "carried", "initialised", "dropped"]
"""``carried``: kept for the way back, though the original never uses it."""
_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True)
class Fate:
    """One key of a checkpoint and what it is made of."""

    kind: Kind
    names: tuple[str, ...]
    """Tensors of the folder; none for what is initialised."""
    key: str
    """Of the checkpoint; empty for what is dropped."""
    note: str = ""


def count(fates: Iterable[Fate]) -> dict[Kind, int]:
    """Tensors of each kind; of the folder, or of the checkpoint where the folder has none. A copied one counts once."""
    found: dict[Kind, set[str]] = {"copied": set(), "carried": set(), "initialised": set(), "dropped": set()}
    for fate in fates:
        found[fate.kind] |= set(fate.names or (fate.key,))
    return {kind: len(names) for kind, names in found.items()}


def each(fates: Iterable[Fate]) -> list[str]:
    """A line per key."""
    return [_line(fate.kind, _joined(fate.names, qkv=False), fate.key, fate.note) for fate in fates]


def grouped(fates: Iterable[Fate]) -> list[str]:
    """A line per kind of weight, with the numbers of its layers."""
    groups: dict[tuple[Kind, tuple[str, ...], str, str], list[Fate]] = {}
    for fate in fates:
        pattern = tuple(_LAYER.sub("layers.{}.", name) for name in fate.names)
        groups.setdefault((fate.kind, pattern, _LAYER.sub("layers.{}.", fate.key), fate.note), []).append(fate)
    lines = []
    for (kind, names, key, note), members in groups.items():
        of_names = _ranges(_number(name) for member in members for name in member.names[:1])
        of_keys = _ranges(_number(member.key) for member in members)
        spelled = _joined(names).replace("layers.{}.", f"layers.{of_names}.")
        lines.append(_line(kind, spelled, key.replace("layers.{}.", f"layers.{of_keys}."), note, times=len(members)))
    return lines


def _line(kind: Kind, names: str, key: str, note: str, *, times: int = 0) -> str:
    arrow = f"{names} -> {key}" if names and key else names or key
    counted = f"{times:>4} x " if times else ""
    return f"{kind:<11} {counted}{arrow}{f'  ({note})' if note else ''}"


def _number(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _ranges(numbers: Iterable[int | None]) -> str:
    """``{0-11,30-35}``, or the one number."""
    sorted_ = sorted({number for number in numbers if number is not None})
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(sorted_), 1) if b != a + 1), len(sorted_)]
    runs = [sorted_[a:b] for a, b in pairwise(cuts) if b > a]
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _joined(names: tuple[str, ...], *, qkv: bool = True) -> str:
    """Those of all experts as one name, and q, k and v."""
    experts = [int(found[1]) for name in names if (found := _EXPERT.search(name))]
    if len(experts) > 1:
        return _EXPERT.sub(f"experts.{_ranges(experts)}.", names[0])
    if qkv and len(names) == len("qkv"):
        return names[0].replace("q_proj", "{q,k,v}_proj")
    return " ".join(names)
