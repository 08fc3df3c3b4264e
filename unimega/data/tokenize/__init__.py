"""Text to ids: the only package of `data/` that touches tokenizer libraries.

One tokenizer is the reference (`hf.py` for a `tokenizer.json`, `pieces.py` for a sentencepiece model); `giga.py` and
`words.py` give the same ids faster, for the kinds of tokenizer that `forms.py` knows.
"""

from unimega.data.tokenize.common import UNCONDITIONAL, Encoded, SpecialIds, locate
from unimega.data.tokenize.text import Backend, TextTokenizer

__all__ = ["UNCONDITIONAL", "Backend", "Encoded", "SpecialIds", "TextTokenizer", "locate"]
