"""A fast way without another package: each word goes to the reference once, then its ids are looked up.

Splitting is what Hugging Face tokenizers spend 9 of 10 seconds on. Here `re` splits ASCII text with the tokenizer's own
pattern, its classes written out for ASCII: which letters Unicode has does not matter there. Other text is cut, with a
coarser pattern, only where the tokenizer's pattern cannot match across, and its pieces go to the reference as they are.
"""

import re
from collections.abc import Iterable, Sequence

from unimega.data.tokenize.common import Encoded, Unsupported, joined, slices
from unimega.data.tokenize.forms import GPT2, byte_level
from unimega.data.tokenize.hf import Description, HuggingFace

_MOST_WORDS = 300_000
"""Then the table is emptied: some 60 MB."""
_LONGEST_KEPT = 64
"""Characters; longer words do not come again, and may be as long as a text."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS, _MARKS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
)
QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_PUNCTUATION}{_TAIL}"
QWEN35 = rf"{_CONTRACTIONS}|{_MARKS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_TAIL}"
LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_PUNCTUATION}{_TAIL}"
CL100K = LLAMA3.replace(r"\s*[\r\n]+|", r"\s*[\r\n]|")
O200K = rf"{_CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"

_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BEFORE_SPACE = re.compile(rf"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+")
"""GPT-2's words hold a space in front only, so they end before the first space after something else."""
_BEFORE_SPACE_AFTER_LINE = re.compile(
    rf"[{_SPACE}]*[\r\n]|[{_SPACE}]*[^{_SPACE}]+(?:[\r\n](?:[{_SPACE}]*[\r\n])?)?|[{_SPACE}]+"
)
"""Later patterns let line ends follow punctuation, but a run of spaces is always cut after its last line end."""
_PIECES = {
    GPT2: _BEFORE_SPACE,
    QWEN2: _BEFORE_SPACE_AFTER_LINE,
    QWEN35: _BEFORE_SPACE_AFTER_LINE,
    LLAMA3: _BEFORE_SPACE_AFTER_LINE,
    CL100K: _BEFORE_SPACE_AFTER_LINE,
    O200K: None,  # its line ends may be followed by a slash
}
_ASCII = {
    r"\p{L}": "a-zA-Z",
    r"\p{Lu}": "A-Z",
    r"\p{Ll}": "a-z",
    r"\p{N}": "0-9",
    r"\s": "\t\n\x0b\x0c\r ",
    r"\p{Lt}": "",
    r"\p{Lm}": "",
    r"\p{Lo}": "",
    r"\p{M}": "",
}


class WordTable:
    """The ids of each word that was seen. Memory is bounded."""

    name = "word-cache"

    def __init__(self, reference: HuggingFace, described: Description) -> None:
        """Look at the tokenizer's form.

        Raises:
            Unsupported: its words are not known to be independent of each other.
        """
        form = byte_level(described.plain)
        if len(form.patterns) != 1 or form.patterns[0] not in _PIECES:
            raise Unsupported(f"its pre-tokenizer splits with {' and '.join(map(repr, form.patterns)) or 'no pattern'}")
        pattern = form.patterns[0]
        self._reference = reference
        self._words_of_ascii = re.compile(for_ascii(pattern)).findall
        self._pieces = _PIECES[pattern]
        self._ordinary = re.compile("|".join(map(re.escape, form.ordinary))).search if form.ordinary else None
        self._table: dict[str, bytes] = {}

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts: the reference's."""
        parts: list[bytes] = []
        for part in slices(texts):
            words = [self._words(text) for text in part]
            new = self._learn(words)
            ids_of = self._table.__getitem__
            parts += [b"".join(map(ids_of, found)) for found in words]
            for word in new:
                if len(word) > _LONGEST_KEPT:
                    del self._table[word]
        return joined(parts)

    def _words(self, text: str) -> list[str]:
        if self._ordinary is not None and self._ordinary(text) is not None:
            return [text]
        if text.isascii():
            return self._words_of_ascii(text)
        if self._pieces is None:
            return [text]
        words: list[str] = []
        for piece in self._pieces.findall(text):
            if piece.isascii():
                words += self._words_of_ascii(piece)
            else:
                words.append(piece)
        return words

    def _learn(self, words: Iterable[Sequence[str]]) -> list[str]:
        """Have all these words in the table; returns those that were not."""
        if len(self._table) > _MOST_WORDS:
            self._table.clear()
        new = list(set().union(*words).difference(self._table))
        self._table.update(zip(new, self._reference.encode_words(new), strict=True))
        return new


def for_ascii(pattern: str) -> str:
    r"""A pattern of the library as one of `re` that splits ASCII text the same way.

    ``\p{..}``, ``\s`` and ``\S`` become their ASCII characters; the rest means the same in both.
    """
    result, in_class = "", False
    for token in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if token == r"\S":
            result += "[^" + _ASCII[r"\s"] + "]"
        elif token in _ASCII:
            result += _ASCII[token] if in_class else f"[{_ASCII[token]}]"
        else:
            in_class = token == "[" or (in_class and token != "]")
            result += token
    return result
