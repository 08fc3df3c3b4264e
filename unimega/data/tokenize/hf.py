"""The reference for a `tokenizer.json`: Hugging Face tokenizers, made so that no text yields a special id."""

import hashlib
import json
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from unimega.data.tokenize.common import Encoded, joined, slices
from unimega.errors import DataError

_NOT_A_CHARACTER = "\U0010ffff"
_REPLACEMENT = "\ufffd"


class HuggingFace:
    """A Hugging Face tokenizer. Tokens that are marked special, and those in ``reserved``, are out of reach of text.

    The library's own switch (``encode_special_tokens``) does not look for such tokens in text, but three ways remain:
    a token that was added without the mark; a model whose vocabulary holds the token as a word or piece of its own; a
    merge that builds it. So tokens in ``reserved`` get the mark, and those in the vocabulary another name.
    """

    kind = "hf"
    eos: int | None = None
    pad: int | None = None

    def __init__(self, path: Path, reserved: Collection[str]) -> None:
        """Load a `tokenizer.json`.

        Raises:
            DataError: it is not one.
        """
        try:
            content = json.loads(path.read_bytes())
            self.plain, self._names = _without_specials(content, reserved)
            if self.plain is content:
                self._tokenizer = Tokenizer.from_file(str(path))
            else:
                self._tokenizer = Tokenizer.from_str(json.dumps(self.plain, ensure_ascii=False))
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises bare Exception
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path}: not a tokenizer ({said}).") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._guarded = self.plain is not content and self.plain["model"]["type"] != "BPE"
        """Whether a text could spell the new name of a token: BPE reaches no token that no merge builds."""
        self.sha256 = _fingerprint(content)
        self.size = 1 + max(vocabulary.values(), default=-1)

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

    def encode_words(self, texts: Sequence[str]) -> list[bytes]:
        """The bytes of the int32 ids of each text, in one call of the library."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("i", item.ids).tobytes() for item in encoded]


def _fingerprint(content: dict[str, Any]) -> str:
    """Of the canonical JSON without padding and truncation, which do not change ids."""
    content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


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
        model["merges"] = [merge for merge in model["merges"] if _built(merge) not in moved]
    tokens = [
        token | {"content": spelled[token["content"]], "special": True} if token["content"] in names else token
        for token in added
    ]
    return content | {"model": model, "added_tokens": tokens}, spelled


def _built(merge: str | Sequence[str]) -> str:
    """The token that a merge builds; files of before 2024 write a merge as one string."""
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _is_merged(model: dict[str, Any], name: str) -> bool:
    """Whether a token was learned from text, as code with many ``<pad>`` teaches one: then it is an ordinary one."""
    return any(_built(merge) == name for merge in model.get("merges") or ())
