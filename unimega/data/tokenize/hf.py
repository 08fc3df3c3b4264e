"""The reference for a `tokenizer.json`: Hugging Face tokenizers, made so that no text yields a special id."""

import hashlib
import json
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from unimega.data.tokenize.common import Encoded, joined, slices, spelled
from unimega.errors import DataError

_NOT_A_CHARACTER = "\U0010ffff"
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Description:
    """A `tokenizer.json` as it is used: tokens that are marked special, and reserved ones, are out of reach of text.

    The library's own switch (``encode_special_tokens``) does not look for such tokens in text, but three ways remain:
    a token that was added without the mark; a model whose vocabulary holds the token as a word or piece of its own; a
    merge that builds it. So reserved tokens get the mark, and those in the vocabulary another name.
    """

    raw: bytes
    plain: dict[str, Any]
    """The content, with these changes. Large: not to be kept."""
    names: dict[str, str]
    """Special and reserved tokens, and the names they have in ``plain``."""
    is_changed: bool

    @staticmethod
    def read(path: Path, reserved: Collection[str]) -> "Description":
        """Read a file.

        Raises:
            DataError: it is not a `tokenizer.json`.
        """
        raw = path.read_bytes()
        try:
            content = json.loads(raw)
            plain, names = _without_specials(content, reserved)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise DataError(f"{path}: not a tokenizer ({type(error).__name__} {error}).") from error
        return Description(raw, plain, names, plain is not content)


class HuggingFace:
    """The library's tokenizer."""

    kind = "hf"
    eos: int | None = None
    pad: int | None = None

    def __init__(self, path: Path, described: Description) -> None:
        """Load a `tokenizer.json`.

        Raises:
            DataError: it is not one.
        """
        plain = described.plain
        try:
            raw = json.dumps(plain, ensure_ascii=False).encode() if described.is_changed else described.raw
            self._tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{path}: not a tokenizer ({str(error).splitlines()[0]}).") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._names, self._raw = described.names, described.raw
        self._guarded = described.is_changed and plain["model"]["type"] != "BPE"
        """Whether a text could spell the new name of a token: BPE reaches no token that no merge builds."""
        vocabulary = plain["model"]["vocab"]
        numbers = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        added = [
            self._tokenizer.token_to_id(token["content"])
            for token in plain.get("added_tokens") or ()
            if described.names.get(token["content"], token["content"]) == token["content"]
        ]
        self.size = 1 + max((*numbers, *added), default=-1)

    @cached_property
    def sha256(self) -> str:
        """Of the canonical JSON without padding and truncation, which do not change ids."""
        content = {key: value for key, value in json.loads(self._raw).items() if key not in ("padding", "truncation")}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_id(self, name: str) -> int | None:
        """Id of a special or reserved token."""
        number = self._tokenizer.token_to_id(self._names[name]) if name in self._names else None
        return None if number is None else int(number)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts."""
        parts: list[bytes] = []
        for part in slices(texts):
            if self._guarded:
                part = [text.replace(_NOT_A_CHARACTER, _REPLACEMENT) for text in part]
            parts += self.encode_words(part)
        return joined(parts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special and reserved tokens as they are written."""
        names = {number: name for name in self._names if (number := self.token_id(name)) is not None}
        return spelled(ids, names, lambda run: str(self._tokenizer.decode(run, skip_special_tokens=False)))

    def encode_words(self, texts: Sequence[str]) -> list[bytes]:
        """The bytes of the int32 ids of each text, in one call of the library."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("i", item.ids).tobytes() for item in encoded]


def _without_specials(content: dict[str, Any], reserved: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """A `tokenizer.json` whose special and reserved tokens no text reaches, and the names they have in it.

    The same object comes back where nothing has to change, which is so for most tokenizers of today.
    """
    model, added = content["model"], content.get("added_tokens") or []
    entries = model.get("vocab") or {}
    vocabulary = {entry[0] for entry in entries} if isinstance(entries, list) else entries
    listed = {token["content"] for token in added}
    names = {token["content"] for token in added if token["special"]}
    names |= {name for name in reserved if name in listed or (name in vocabulary and not _is_merged(model, name))}
    spelled = {
        name: f"{_NOT_A_CHARACTER}{number}{_NOT_A_CHARACTER}" if name in vocabulary else name
        for number, name in enumerate(sorted(names))
    }
    moved = {name for name in names if spelled[name] != name}
    if not moved and all(token["special"] for token in added if token["content"] in names):
        return content, spelled
    model = dict(model)
    if isinstance(entries, list):
        model["vocab"] = [[spelled.get(entry[0], entry[0]), *entry[1:]] for entry in entries]
    else:
        model["vocab"] = {spelled.get(name, name): number for name, number in entries.items()}
    if model.get("unk_token") in spelled:
        model["unk_token"] = spelled[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if moved.isdisjoint((*_parts(merge), _built(merge)))]
    tokens = [
        token | {"content": spelled[token["content"]], "special": True} if token["content"] in names else token
        for token in added
    ]
    # Where the library passes over a special token in text, it passes over an ordinary one inside it, too.
    tokens += [token | {"special": True} for token in added if token["content"] in moved]
    return content | {"model": model, "added_tokens": tokens}, spelled


def _parts(merge: str | Sequence[str]) -> Sequence[str]:
    """The two tokens of a merge; files of before 2024 write it as one string."""
    return merge.split(" ", 1) if isinstance(merge, str) else merge


def _built(merge: str | Sequence[str]) -> str:
    """The token that a merge builds."""
    return "".join(_parts(merge))


def _is_merged(model: dict[str, Any], name: str) -> bool:
    """Whether a token was learned from text, as code with many ``<pad>`` teaches one: then it is an ordinary one."""
    return any(_built(merge) == name for merge in model.get("merges") or ())
