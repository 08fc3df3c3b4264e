"""The tokenizer of a corpus or run: a reference, and perhaps a faster way to its ids that is checked against it."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from unimega import log
from unimega.data.format import Ids
from unimega.data.tokenize import common
from unimega.data.tokenize.common import Encoded, Encoder, Reference, SpecialIds, Unsupported, locate
from unimega.data.tokenize.giga import Gigatoken
from unimega.data.tokenize.hf import Description, HuggingFace
from unimega.data.tokenize.pieces import SentencePiece
from unimega.data.tokenize.words import WordTable
from unimega.errors import ConfigError, DataError, UnimegaError

Backend = Literal["auto", "gigatoken", "word-cache", "reference"]
"""How text becomes ids. All give those of `reference`; `auto` takes the first of the others that can run."""

_FAST: dict[str, Callable[[HuggingFace, Description], Encoder]] = {"gigatoken": Gigatoken, "word-cache": WordTable}
_CHECK_FIRST, _CHECK_EVERY = 64, 2000
_CHECK_LONGEST = 1 << 16
"""Characters of a text that is still worth the reference's time."""
_PROBES = (
    "",
    " ",
    "It's we'LL  don't\n\n  indent\r\n\t\ttabs \n x",
    "1234567 3.14 0x1F a1b2 \u0661\u0662\u00b2\u2167",
    "caf\u00e9 cafe\u0301 \u212b \u1e9b\u0323 \uac00\u1100\u1161",
    "\u4e2d\u6587\u3002\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0e44\u0e17\u0e22 \u0627\u0644",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2028\u2029\u3000\xa0\x85\x0b\x1c\x00\x7f end",
    "<|endoftext|><|im_start|>user\n<|vision_start|><unconditional><s></s><unk>[PAD]<pad><eos>",
    "def f(x):\n    return x**2  # note\n\n\n!!??//\n/\\n --> <- === \n",
    "\ud55c\uae00 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05d1\u05e8\u05d9\u05ea \U0001d54f \U00020000 \u0378",
)


class TextTokenizer:
    """A `tokenizer.json` of Hugging Face or a sentencepiece model; text never yields a special id."""

    def __init__(self, path: str | Path, *, backend: Backend = "reference") -> None:
        """Load the tokenizer of a folder, or one file; `tokenizer_config.json` and `config.json` beside it are used.

        Raises:
            DataError: the file is missing or not a tokenizer, or it has no end-of-text token.
            ConfigError: the backend is unknown, or cannot run with this tokenizer; says why.
        """
        if backend not in get_args(Backend):
            raise ConfigError(f"backend='{backend}' is unknown. Known: {', '.join(get_args(Backend))}.")
        file = locate(path)
        if file is None:
            raise DataError(
                f"tokenizer='{path}' is wrong. There is no tokenizer.json and no sentencepiece model. "
                "Name a folder that holds one, or a file that ends in .model."
            )
        self.path = Path(path)
        self.folder = file.parent
        config = self._beside("tokenizer_config.json")
        eos, pad = _names(config, "eos_token"), _names(config, "pad_token")
        markers = (common.VISION_START, common.VISION_END, common.VISION_PAD, common.UNCONDITIONAL)
        reserved = frozenset((*eos, *common.EOS, *pad, *common.PAD, *markers))
        described = None if file.suffix == ".model" else Description.read(file, reserved)
        self._reference: Reference = HuggingFace(file, described) if described else SentencePiece(file, reserved)
        self.size = self._reference.size
        """One more than the largest id."""
        self.special = self._special(eos, pad)
        self.backend: str = self._reference.kind
        """What runs: `hf`, `sentencepiece`, `gigatoken` or `word-cache`."""
        self.reasons: tuple[str, ...] = ()
        """Why the faster ones do not."""
        self._encoder: Encoder = self._reference
        self._checked = 0
        if backend != "reference":
            self._choose(backend, described)

    @property
    def sha256(self) -> str:
        """Fingerprint of what decides the ids; the same on every machine."""
        return self._reference.sha256

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts, without special tokens: the way for many.

        Raises:
            DataError: a text is not Unicode, or a fast way and the reference disagree.
        """
        try:
            found = self._encoder.encode_batch(texts)
        except (TypeError, UnicodeError) as error:
            raise DataError(_what_is_wrong(texts)) from error
        if self._encoder is not self._reference:
            self._compare(texts, found)
        return found

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """int32 ids of each text, without special tokens: the way for a few."""
        ids, lengths = self.encode_batch(texts)
        return np.split(ids, np.cumsum(lengths[:-1])) if len(texts) else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, for people to read; an id outside the vocabulary stands as ``<id N?>``."""
        parts = []
        for is_known, group in itertools.groupby(ids, range(self.size).__contains__):
            run = list(group)
            parts.append(self._reference.decode(run) if is_known else "".join(f"<id {number}?>" for number in run))
        return "".join(parts)

    def padded_size(self) -> int:
        """Rows of the base model's embedding: ``vocab_size`` of a `config.json` beside the tokenizer, else ``size``."""
        rows = self._beside("config.json").get("vocab_size", self.size)
        return max(self.size, rows) if isinstance(rows, int) else self.size

    def describe(self, *, beside: str | Path) -> dict[str, Any]:
        """The ``tokenizer`` entry of the sidecar of the corpus ``beside``; ``path`` is relative to its folder."""
        return {
            "kind": self._reference.kind,
            "name": self.path.resolve().name,
            "path": os.path.relpath(self.path.resolve(), Path(beside).resolve().parent),
            "size": self.size,
            "eos": self.special.eos,
            "sha256": self.sha256,
            "special": asdict(self.special),
        }

    def _choose(self, backend: Backend, described: Description | None) -> None:
        """Take the named way, or the first that can run; the reference where none can."""
        logger = log.get(__name__)
        for name, build in _FAST.items():
            if backend not in ("auto", name):
                continue
            try:
                if described is None or not isinstance(self._reference, HuggingFace):
                    raise Unsupported("it is a sentencepiece model")
                encoder = build(self._reference, described)
                _probe(encoder, self._reference)
            except (Unsupported, UnimegaError) as error:
                self.reasons += (f"{name}: {error}",)
                continue
            self.backend, self._encoder = name, encoder
            break
        said = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        if backend != "auto" and self.backend != backend:
            raise ConfigError(f"backend='{backend}' cannot run with tokenizer='{self.path}'{said}. Use auto.")
        logger.info("tokenizer %s: %s%s", self.path, self.backend, said)

    def _compare(self, texts: Sequence[str], found: Encoded) -> None:
        """Send some texts to the reference as well: the first few, then one in two thousand."""
        first = range(min(len(texts), max(0, _CHECK_FIRST - self._checked)))
        later = range(-self._checked % _CHECK_EVERY, len(texts), _CHECK_EVERY)
        places = [place for place in sorted({*first, *later}) if len(texts[place]) <= _CHECK_LONGEST]
        self._checked += len(texts)
        if not places:
            return
        ends = np.cumsum(found.lengths, dtype=np.int64)
        expected = self._reference.encode_batch([texts[place] for place in places])
        for place, wanted in zip(places, np.split(expected.ids, np.cumsum(expected.lengths)[:-1]), strict=True):
            ids = found.ids[ends[place] - found.lengths[place] : ends[place]]
            if not np.array_equal(ids, wanted):
                raise DataError(
                    f"tokenizer='{self.path}': {self.backend} and {self._reference.kind} disagree on a text: "
                    f"{_difference(ids, wanted)}. Use backend 'reference', and report it."
                )

    def _special(self, eos_names: Sequence[str], pad_names: Sequence[str]) -> SpecialIds:
        eos = self._first(eos_names, self._reference.eos, common.EOS)
        if eos is None:
            raise DataError(
                f"{self.path}: no end-of-text token. None of {', '.join(common.EOS)} is in the tokenizer; "
                "name one as eos_token in tokenizer_config.json."
            )
        pad = self._first(pad_names, self._reference.pad, common.PAD)
        whole = self._reference.token_id(common.UNCONDITIONAL)
        pieces = self._reference.encode_batch([common.UNCONDITIONAL]).ids.tolist() if whole is None else [whole]
        return SpecialIds(
            eos=eos,
            pad=eos if pad is None else pad,
            vision_start=self._reference.token_id(common.VISION_START),
            vision_end=self._reference.token_id(common.VISION_END),
            unconditional=tuple(pieces),
            vision_pad=self._reference.token_id(common.VISION_PAD),
        )

    def _first(self, told: Sequence[str], own: int | None, usual: Sequence[str]) -> int | None:
        """The token that `tokenizer_config.json` tells, else the one that the file itself has, else a usual name."""
        found = (*map(self._reference.token_id, told), own, *map(self._reference.token_id, usual))
        return next((number for number in found if number is not None), None)

    def _beside(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: not JSON of an object ({error}).") from error


def _probe(encoder: Encoder, reference: Reference) -> None:
    """Compare on texts that are hard.

    Raises:
        Unsupported: there is a difference.
    """
    for probe in _PROBES:
        ids, wanted = encoder.encode_batch([probe]).ids, reference.encode_batch([probe]).ids
        if not np.array_equal(ids, wanted):
            raise Unsupported(f"its ids of {probe!r} differ from the reference's: {_difference(ids, wanted)}")


def _difference(ids: Ids, wanted: Ids) -> str:
    """Both lists around the first place where they differ."""
    common_length = min(len(ids), len(wanted))
    differs = np.flatnonzero(ids[:common_length] != wanted[:common_length])
    place = int(differs[0]) if len(differs) else common_length
    around = slice(max(0, place - 3), place + 4)
    return f"{ids[around].tolist()} and {wanted[around].tolist()} around id {place}"


def _what_is_wrong(texts: Sequence[str]) -> str:
    for number, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"text {number} of the batch is not Unicode: half of a surrogate pair at character {error.start}."
        except AttributeError:
            return f"text {number} of the batch is not a string but {type(text).__name__}."
    return "a text could not be tokenised."


def _names(config: dict[str, Any], key: str) -> tuple[str, ...]:
    """A token of `tokenizer_config.json`, which writes it as a string or as {"content": ...}."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return (value,) if isinstance(value, str) else ()
