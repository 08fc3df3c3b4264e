"""Text to ids: the only module of `data/` that touches a tokenizer package."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from unimega.data.format import Ids
from unimega.errors import DataError

UNCONDITIONAL = "<unconditional>"
_VISION_START, _VISION_END, _VISION_PAD = "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"
_EOS = ("<|endoftext|>", "<eos>")
_PAD = ("<|pad|>", "<pad>", "[PAD]")

Backend = Literal["auto", "hf"]
"""How text becomes ids: all give the ids of `hf`, the reference. `auto` takes the fastest that can run here."""


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


class TextTokenizer:
    """A Hugging Face `tokenizer.json`; text never yields a special id."""

    def __init__(self, folder: str | Path, *, backend: Backend = "hf") -> None:
        """Load ``FOLDER/tokenizer.json``; `tokenizer_config.json` and `config.json` are used if they are there.

        Raises:
            DataError: the file is missing or not a tokenizer, or it has no end-of-text token.
        """
        self.folder = Path(folder)
        self.backend: str = "hf"
        """What runs."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"tokenizer='{folder}' is wrong. {path} is not there. Name a folder that holds a tokenizer.json."
            )
        try:
            self._content = json.loads(path.read_bytes())
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{path}: not a tokenizer ({str(error).splitlines()[0]}).") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the largest id."""
        self.special = self._special()

    @property
    def sha256(self) -> str:
        """Fingerprint: of the canonical `tokenizer.json` without padding and truncation, which do not change ids."""
        content = {key: value for key, value in self._content.items() if key not in ("padding", "truncation")}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts, without special tokens: the way for many."""
        encoded = [item.ids for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, encoded), dtype=np.int32, count=len(encoded))
        return Encoded(np.fromiter(chain.from_iterable(encoded), np.int32, count=int(lengths.sum())), lengths)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """int32 ids of each text, without special tokens: the way for a few."""
        ids, lengths = self.encode_batch(texts)
        return np.split(ids, np.cumsum(lengths[:-1])) if len(texts) else []

    def padded_size(self) -> int:
        """Rows of the base model's embedding: ``vocab_size`` of a `config.json` beside the tokenizer, else ``size``."""
        config = self._beside("config.json")
        rows = config.get("vocab_size", self.size)
        return max(self.size, rows) if isinstance(rows, int) else self.size

    def describe(self, *, beside: str | Path) -> dict[str, Any]:
        """The ``tokenizer`` entry of the sidecar of the corpus ``beside``; ``path`` is relative to its folder."""
        return {
            "kind": "hf",
            "name": self.folder.resolve().name,
            "path": os.path.relpath(self.folder.resolve(), Path(beside).resolve().parent),
            "size": self.size,
            "eos": self.special.eos,
            "sha256": self.sha256,
            "special": asdict(self.special),
        }

    def _special(self) -> SpecialIds:
        config = self._beside("tokenizer_config.json")
        eos = self._first((*_names(config, "eos_token"), *_EOS))
        if eos is None:
            raise DataError(
                f"{self.folder}: no end-of-text token. None of {', '.join(_EOS)} is in tokenizer.json; "
                "name one as eos_token in tokenizer_config.json."
            )
        pad = self._first((*_names(config, "pad_token"), *_PAD))
        whole = self._first((UNCONDITIONAL,))
        pieces = (whole,) if whole is not None else tuple(self.encode([UNCONDITIONAL])[0].tolist())
        return SpecialIds(
            eos=eos,
            pad=eos if pad is None else pad,
            vision_start=self._first((_VISION_START,)),
            vision_end=self._first((_VISION_END,)),
            unconditional=pieces,
            vision_pad=self._first((_VISION_PAD,)),
        )

    def _first(self, names: Sequence[str]) -> int | None:
        """Id of the first of these tokens that exists."""
        found = (self._tokenizer.token_to_id(name) for name in names)
        return next((number for number in found if number is not None), None)

    def _beside(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_bytes()))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}).") from error


def _names(config: dict[str, Any], key: str) -> tuple[str, ...]:
    """A token of `tokenizer_config.json`, which writes it as a string or as {"content": ...}."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return (value,) if isinstance(value, str) else ()
