"""What a row becomes, what is allowed in it, and why one is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from unimega.data.format import Ids

Kind = Literal[
    "auto",
    "text",
    "image_text",
    "t2i",
    "i2t",
    "i2t_multi",
    "i2t_reverse",
    "conversations",
    "turn_split",
    "alpaca",
    "input_ids",
    "interleaved",
]
"""How the rows of a source are read; ``auto`` recognises each row by its fields."""

FIELDS = (
    "text",
    "caption",
    "codes",
    "image",
    "input_ids",
    "items",
    "texts",
    "images",
    "conversations",
    "instruction",
    "input",
    "output",
    "data_type",
)
"""Names that a field map may give to the fields of a source's rows."""


class BadRow(Exception):
    """A row that cannot become a document.

    The message says why and the caller adds file and line; ``reason`` is the class of mistake that is counted.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Segment(NamedTuple):
    """A run of one modality and role: exactly one of text, ids and picture is there."""

    mode: int
    text: str | None = None
    """Not tokenised yet."""
    ids: Ids | None = None
    picture: bytes | str | None = None
    """Not encoded yet: the bytes of an image file, or its path."""


class Row(NamedTuple):
    """A document before tokenising."""

    segments: tuple[Segment, ...]
    direction: str | None = None
    """What the loader may do with a pair: both, t2i, i2t; None where the document is no pair."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What ids may occur, and how the rows of one source are read."""

    text_size: int
    codebook: int | None
    """Codes are 0 .. codebook - 1; absent: a row with codes is an error."""
    codes_per_image: tuple[int, ...] = ()
    """Allowed numbers of codes; empty: any."""
    encodes_pictures: bool = False
    """Whether there is a tokenizer for pictures."""
    kind: Kind = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    """Name in the rows of each field that matters; if any is given, fields without one are not looked at."""
    direction: str | None = None
    """Overrides what the rows say about pairs."""
    image_root: str = "."
    """Folder that relative paths of pictures start from."""
