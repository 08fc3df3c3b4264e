"""What every way from text to ids shares."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from unimega.data.format import Ids
from unimega.errors import DataError

UNCONDITIONAL = "<unconditional>"
VISION_START, VISION_END, VISION_PAD = "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"
EOS = ("<|endoftext|>", "<eos>")
PAD = ("<|pad|>", "<pad>", "[PAD]")
_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SLICE_TEXTS, _SLICE_CHARACTERS = 1000, 1 << 20


class Encoded(NamedTuple):
    """The ids of a batch of texts, one text after another."""

    ids: Ids
    lengths: npt.NDArray[np.int32]
    """[texts] how many of them each text has."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids that the loader adds; a corpus stores none of them."""

    eos: int
    pad: int
    vision_start: int | None
    vision_end: int | None
    unconditional: tuple[int, ...]
    """The ids of ``<unconditional>``: one if the tokenizer has it as a special token, else its pieces."""
    vision_pad: int | None = None
    """Ends the rows of an image where a run asks for it."""

    @staticmethod
    def from_sidecar(values: dict[str, Any]) -> "SpecialIds":
        """Inverse of ``asdict`` after a trip through JSON.

        Raises:
            DataError: an entry is missing or unknown.
        """
        try:
            return SpecialIds(**(values | {"unconditional": tuple(values["unconditional"])}))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"special ids {values} of a sidecar are not complete ({error}). Write the corpus again."
            ) from error


class Encoder(Protocol):
    """A way from text to ids."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts; no text yields a special id.

        Raises:
            TypeError, UnicodeError: a text is not Unicode (it holds half of a surrogate pair).
        """
        ...


class Reference(Encoder, Protocol):
    """The library that a tokenizer file was made for: it defines the ids."""

    kind: str
    size: int
    """One more than the largest id."""
    eos: int | None
    """As the file itself names it, if it does."""
    pad: int | None

    @property
    def sha256(self) -> str:
        """Fingerprint of what decides the ids; the same on every machine."""
        ...

    def token_id(self, name: str) -> int | None:
        """Id of the token that is written ``name`` and that no text can yield."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids below ``size``, tokens that no text can yield as they are written."""
        ...


def spelled(ids: Sequence[int], names: Mapping[int, str], decode: Callable[[list[int]], str]) -> str:
    """Text of ids: those in ``names`` by their name, each run between them by ``decode``."""
    parts = []
    for is_name, group in itertools.groupby(ids, names.__contains__):
        run = list(group)
        parts.append("".join(names[number] for number in run) if is_name else decode(run))
    return "".join(parts)


class Unsupported(Exception):
    """A fast way does not know this kind of tokenizer; says why."""


def locate(path: str | Path) -> Path | None:
    """The tokenizer file that a path means: itself, or the `tokenizer.json` or sentencepiece model of a folder."""
    path = Path(path)
    if path.is_file():
        return path if path.suffix in (".json", ".model") else None
    return next((path / name for name in _FILES if (path / name).is_file()), None)


def slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in runs that are small enough for a library's objects, some 100 bytes per token, to be few."""
    start = characters = 0
    for number, text in enumerate(texts):
        if number > start and (characters + len(text) > _SLICE_CHARACTERS or number - start == _SLICE_TEXTS):
            yield texts[start:number]
            start, characters = number, 0
        characters += len(text)
    if start < len(texts):
        yield texts[start:]


def joined(parts: Sequence[bytes]) -> Encoded:
    """int32 ids given as the bytes of each text."""
    lengths = np.fromiter(map(len, parts), dtype=np.int32, count=len(parts)) // 4
    return Encoded(np.frombuffer(b"".join(parts), dtype=np.int32), lengths)
