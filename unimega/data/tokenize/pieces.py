"""The reference for a sentencepiece model (`*.model`): the sentencepiece library.

Spaces are as the model's own normaliser has them: usually runs of them are one, none is kept at the ends, and every
text begins with one, also a turn or caption in the middle of a document, which is tokenised alone. What the vocabulary
lacks becomes bytes (``<0xE2>``) if the model was trained with byte fallback, else the unknown piece.
"""

import hashlib
import re
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path

from unimega.data.tokenize.common import Encoded, joined, slices, spelled
from unimega.errors import DataError, optional

_MARKER = re.compile(r"<\|.+\|>")
"""How chat and image markers are spelled. sentencepiece has no flag that tells them from other user-defined pieces."""


class SentencePiece:
    """A sentencepiece model. Control pieces, markers and the pieces in ``reserved`` are out of reach of text."""

    kind = "sentencepiece"

    def __init__(self, path: Path, reserved: Collection[str]) -> None:
        """Load a model of any kind that the library knows (BPE, unigram, word, char).

        Raises:
            DataError: it is not one.
            UnimegaError: the library is not installed.
        """
        library = optional("sentencepiece", extra="sentencepiece")
        messages = optional("sentencepiece.sentencepiece_model_pb2", extra="sentencepiece")
        raw = path.read_bytes()
        model = messages.ModelProto()
        try:
            model.ParseFromString(raw)
            kinds = model.SentencePiece
            for piece in model.pieces:
                marks = piece.piece in reserved or _MARKER.fullmatch(piece.piece)
                if piece.type == kinds.USER_DEFINED and marks:
                    piece.type = kinds.CONTROL  # user-defined pieces are found in text, control pieces never
            self._processor = library.SentencePieceProcessor(model_proto=model.SerializeToString())
        except Exception as error:  # protobuf and sentencepiece have no common class below this one
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path}: not a sentencepiece model ({said}).") from error
        self._control = {
            piece.piece: number for number, piece in enumerate(model.pieces) if piece.type == kinds.CONTROL
        }
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.size = len(model.pieces)
        self.eos: int | None = _or_none(self._processor.eos_id())
        self.pad: int | None = _or_none(self._processor.pad_id())

    def token_id(self, name: str) -> int | None:
        """Id of a control piece."""
        return self._control.get(name)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts, without the pieces for begin and end."""
        parts: list[bytes] = []
        for part in slices(texts):
            encoded = self._processor.encode(list(part), out_type=int, num_threads=1)
            parts += [array("i", ids).tobytes() for ids in encoded]
        return joined(parts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control pieces as they are written."""
        names = {number: name for name, number in self._control.items()}
        return spelled(ids, names, lambda run: str(self._processor.decode(run)))


def _or_none(number: int) -> int | None:
    """sentencepiece says -1 for a piece that a model lacks."""
    return number if number >= 0 else None
