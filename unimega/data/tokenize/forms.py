"""The kinds of `tokenizer.json` that a fast way gives the exact ids of: byte-level BPE behind a known split.

Anything else is refused with its reason, and the reference runs: a setting that is not looked at here could change ids.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from unimega.data.tokenize.common import Unsupported

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the library's `ByteLevel` splits with when it is told no other pattern."""
_LAST_ASSIGNED = 0x2A6DD
"""End of the first plane of ideographs: later ones are so rare that their texts may go the slow way."""


@dataclass(frozen=True)
class ByteLevelForm:
    """What a fast way has to do around its own merges."""

    patterns: tuple[str, ...]
    """Regular expressions that split a text into words, one after another."""
    composes: bool
    """Whether texts are brought to Unicode's form NFC first."""
    ordinary: tuple[str, ...]
    """Tokens beside the merges that text yields by right, such as ``<tool_call>``."""

    def must_go_slowly(self) -> Callable[[str], bool]:
        """A test of one text: whether only the reference knows for sure what it becomes.

        So are texts with ordinary added tokens, whose matching has many switches, and texts with what versions of
        Unicode disagree on: characters that Python's does not know, and what NFC would change.
        """
        find = re.compile("|".join(map(re.escape, self.ordinary))).search if self.ordinary else None
        composes = self.composes

        def is_slow(text: str) -> bool:
            if find is not None and find(text) is not None:
                return True
            if text.isascii():
                return False
            return _unassigned().search(text) is not None or (composes and not unicodedata.is_normalized("NFC", text))

        return is_slow


def byte_level(plain: dict[str, Any]) -> ByteLevelForm:
    """The form of a `tokenizer.json` without special tokens in its model.

    Raises:
        Unsupported: it is of another kind; says what differs.
    """
    _check_model(plain["model"])
    composes = _composes(plain.get("normalizer"))
    ordinary = [token for token in plain.get("added_tokens") or [] if not token["special"]]
    for token in ordinary:
        if composes and token["normalized"] and not re.fullmatch(r"[^\x80-\U0010ffffK;`]+", token["content"]):
            raise Unsupported(f"its token {token['content']!r} may appear after NFC")
    return ByteLevelForm(_patterns(plain.get("pre_tokenizer")), composes, tuple(token["content"] for token in ordinary))


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise Unsupported(f"its model is {model.get('type')}, not BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise Unsupported(f"its model has {setting}={model[setting]!r}")
    if missing := [character for character in ByteLevel.alphabet() if character not in model["vocab"]]:
        raise Unsupported(f"its vocabulary lacks {len(missing)} of 256 bytes")


def _composes(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        return any([_composes(part) for part in normalizer["normalizers"]])
    if normalizer["type"] != "NFC":
        raise Unsupported(f"its normalizer is {normalizer['type']}")
    return True


def _patterns(splitter: dict[str, Any] | None) -> tuple[str, ...]:
    kinds = _sequence(splitter)
    if not kinds or kinds[-1]["type"] != "ByteLevel":
        raise Unsupported(f"its pre-tokenizer is {' + '.join(kind['type'] for kind in kinds) or 'absent'}")
    *splits, last = kinds
    if last.get("add_prefix_space", True):
        raise Unsupported("its pre-tokenizer adds a space before each text")
    for split in splits:
        told = {key: split.get(key) for key in ("type", "behavior", "invert")}
        if told != {"type": "Split", "behavior": "Isolated", "invert": False} or "Regex" not in split["pattern"]:
            raise Unsupported(f"its pre-tokenizer has a step {split['type']} ({split.get('behavior')})")
    patterns = tuple(str(split["pattern"]["Regex"]) for split in splits)
    return (*patterns, GPT2) if last.get("use_regex", True) else patterns


def _sequence(splitter: dict[str, Any] | None) -> list[dict[str, Any]]:
    if splitter is None:
        return []
    if splitter["type"] != "Sequence":
        return [splitter]
    return [kind for part in splitter["pretokenizers"] for kind in _sequence(part)]


@cache
def _unassigned() -> re.Pattern[str]:
    """What Python's Unicode has no character for, or may not: it differs from the libraries' by some years."""
    return re.compile("[^\0-\x7f" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _assigned_ranges()) + "]")


def _assigned_ranges() -> Iterator[tuple[int, int]]:
    assigned = [number for number in range(0x80, 0x20000) if unicodedata.category(chr(number)) not in ("Cn", "Cs")]
    first = last = assigned[0]
    for number in (*assigned[1:], 0x20000):
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield 0x20000, _LAST_ASSIGNED - 1
