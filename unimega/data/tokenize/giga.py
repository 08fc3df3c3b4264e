"""The fastest way: gigatoken, an optional package, for tokenizers and texts that it gives the reference's ids for."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from unimega.data.tokenize.common import Encoded, Unsupported, slices
from unimega.data.tokenize.forms import byte_level
from unimega.data.tokenize.hf import Description, HuggingFace
from unimega.errors import optional

_BEGIN_AGAIN_BYTES = 128 << 20
_LOOK_EVERY_CHARACTERS = 32 << 20
"""Its word table has no bound: where the process has grown by so much, looked at this often, it is loaded anew."""


class Gigatoken:
    """gigatoken with a tokenizer that has neither added tokens nor a normaliser: texts that need them go slowly."""

    name = "gigatoken"

    def __init__(self, reference: HuggingFace, described: Description) -> None:
        """Load the tokenizer a second time.

        Raises:
            Unsupported: its form is not one that gigatoken is known to be exact for.
            UnimegaError: the package is not installed.
        """
        plain = described.plain
        form = byte_level(plain)
        merges = plain["model"]["merges"]
        if len({merge if isinstance(merge, str) else tuple(merge) for merge in merges}) < len(merges):
            raise Unsupported("it has a merge twice")
        self._library = optional("gigatoken", extra="fast")
        self._reference = reference
        self._is_slow = form.must_go_slowly()
        self._content = json.dumps(plain | {"added_tokens": [], "normalizer": None}, ensure_ascii=False)
        self._characters = 0
        self._fast: Any = None
        self._load()

    def _load(self) -> None:
        self._fast = None  # never two of them
        try:
            self._fast = self._library.Tokenizer.from_json(self._content).backend
        except (ValueError, RuntimeError) as error:
            raise Unsupported(f"gigatoken says: {str(error).splitlines()[0]}") from error
        self._base_bytes = psutil.Process().memory_info().rss

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts: the reference's."""
        texts = list(texts)
        slow = [place for place, text in enumerate(texts) if self._is_slow(text)]
        if not slow:
            return self._encode(texts)
        is_slow = np.zeros(len(texts), dtype=np.bool_)
        is_slow[slow] = True
        ours = self._encode([text for place, text in enumerate(texts) if not is_slow[place]])
        theirs = self._reference.encode_batch([texts[place] for place in slow])
        lengths = np.empty(len(texts), dtype=np.int32)
        lengths[is_slow], lengths[~is_slow] = theirs.lengths, ours.lengths
        ids = np.empty(int(lengths.sum()), dtype=np.int32)
        of_slow = np.repeat(is_slow, lengths)
        ids[of_slow], ids[~of_slow] = theirs.ids, ours.ids
        return Encoded(ids, lengths)

    def _encode(self, texts: Sequence[str]) -> Encoded:
        parts = [self._call(part) for part in slices(texts)]
        return Encoded(
            np.concatenate([part.ids for part in parts] or [np.empty(0, np.int32)]),
            np.concatenate([part.lengths for part in parts] or [np.empty(0, np.int32)]),
        )

    def _call(self, texts: Sequence[str]) -> Encoded:
        before, self._characters = self._characters, self._characters + sum(map(len, texts))
        if before // _LOOK_EVERY_CHARACTERS < self._characters // _LOOK_EVERY_CHARACTERS and (
            psutil.Process().memory_info().rss > self._base_bytes + _BEGIN_AGAIN_BYTES
        ):
            self._load()
        # Batches would come as arrays of awkward: its import takes 0.35 s and 52 MB, and they save 0.3 s per 100 MB.
        rows = [self._fast.encode(text) for text in texts]
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        return Encoded(np.concatenate(rows).astype(np.int32), lengths)
