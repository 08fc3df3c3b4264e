"""One row of a corpus file to the segments of one document, with the checks that every row must pass."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimega.data import format as layout
from unimega.data.format import Ids

ABSENT = (None, "", "no")
"""What the seeds' corpora write where a row has no text or no codes."""
_DIRECTIONS = {"t2i": "t2i", "i2t": "i2t"}
_KNOWN_TYPES = (None, "text", "text_pretrain", "image_text", "t2i", "i2t")


class BadRow(Exception):
    """A row that cannot become a document; the message says why, the caller adds file and line."""


@dataclass(frozen=True)
class Segment:
    """A run of one modality and role; a text that is not tokenised yet has ``text`` and no ``ids``."""

    mode: int
    text: str | None = None
    ids: Ids | None = None


@dataclass(frozen=True)
class Row:
    """A document before tokenising."""

    segments: tuple[Segment, ...]
    direction: str = "both"
    """What the loader may do with a pair: both, t2i, i2t."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What ids may occur."""

    text_size: int
    codebook: int | None
    """Codes are 0 .. codebook - 1; absent: a row with codes is an error."""
    codes_per_image: tuple[int, ...] = ()
    """Allowed numbers of codes; empty: any."""


def row_of_json(line: bytes, limits: Limits) -> Row:
    """The document of one jsonl line.

    Raises:
        BadRow: says what is wrong with the line.
    """
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise BadRow(f"a JSON {type(fields).__name__}, an object is needed")
    return row_of_fields(fields, limits)


def row_of_fields(fields: Mapping[str, Any], limits: Limits) -> Row:
    """The document of a row: pre-tokenised, interleaved, caption with codes, or text, recognised by its fields.

    Raises:
        BadRow: no kind fits, or a field breaks a rule.
    """
    kind = fields.get("data_type")
    if kind not in _KNOWN_TYPES:
        raise BadRow(f"data_type={kind!r} is not supported; known: {', '.join(map(str, _KNOWN_TYPES[1:]))}")
    if fields.get("input_ids") is not None:
        return Row((Segment(layout.MODE_TEXT, ids=_token_ids(fields["input_ids"], limits.text_size)),))
    if fields.get("items") is not None:
        return Row(_interleaved(fields["items"], limits))
    name = _codes_field(fields)
    if name is not None:
        caption = fields.get("caption") if fields.get("caption") is not None else fields.get("text")
        codes = parse_codes(fields[name], name, limits)
        segments = (
            Segment(layout.MODE_CAPTION, text=_text(caption, "caption")),
            Segment(layout.MODE_IMAGE, ids=codes),
        )
        return Row(segments, _DIRECTIONS.get(kind or "", "both"))
    if kind in ("image_text", "t2i", "i2t"):
        raise BadRow(f"data_type={kind!r}, but no field codes or vqcode_* holds codes")
    if "text" not in fields:
        raise BadRow(
            f"none of the fields text, caption + codes, input_ids, items is there; found: {', '.join(fields) or 'none'}"
        )
    return Row((Segment(layout.MODE_TEXT, text=_text(fields["text"], "text")),))


def parse_codes(value: Any, name: str, limits: Limits) -> Ids:
    """int32 codes of one image, from a list or from a string that holds one, range and number checked.

    Raises:
        BadRow: not codes, not as many as allowed, or outside the codebook.
    """
    if limits.codebook is None:
        raise BadRow(f"{name} holds codes, but no codebook is given. Pass --codebook K")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{name} is not a list of codes ({error})") from error
    codes = _integers(value, name)
    if limits.codes_per_image and len(codes) not in limits.codes_per_image:
        wanted = " or ".join(map(str, limits.codes_per_image))
        raise BadRow(f"{name} has {len(codes)} codes, codes_per_image is {wanted}")
    if not len(codes):
        raise BadRow(f"{name} has 0 codes")
    outside = (codes < 0) | (codes >= limits.codebook)
    if outside.any():
        at = int(np.argmax(outside))
        raise BadRow(
            f"code {codes[at]} at position {at} is outside the codebook of {limits.codebook}. "
            "Wrong --codebook, or was the offset added already?"
        )
    return codes.astype(np.int32)


def _codes_field(fields: Mapping[str, Any]) -> str | None:
    names = [name for name in fields if (name == "codes" or name.startswith("vqcode_")) and not _absent(fields[name])]
    if len(names) > 1:
        raise BadRow(f"codes in more than one field: {', '.join(names)}")
    return names[0] if names else None


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in ABSENT)


def _interleaved(items: Any, limits: Limits) -> tuple[Segment, ...]:
    """Texts and images in the row's order; touching texts become one, touching images stay two."""
    if not isinstance(items, list) or not items:
        raise BadRow("items is not a list of texts and codes")
    segments: list[Segment] = []
    for number, item in enumerate(items):
        name = f"items[{number}]"
        if isinstance(item, dict):
            field = _codes_field(item)
            item = item[field] if field is not None else _text(item.get("text"), name)
            if field is not None and isinstance(item, str):
                segments.append(Segment(layout.MODE_IMAGE, ids=parse_codes(item, name, limits)))
                continue
        if isinstance(item, list):
            segments.append(Segment(layout.MODE_IMAGE, ids=parse_codes(item, name, limits)))
        elif segments and segments[-1].text is not None:
            segments[-1] = Segment(layout.MODE_TEXT, text=segments[-1].text + _text(item, name))
        else:
            segments.append(Segment(layout.MODE_TEXT, text=_text(item, name)))
    return tuple(segments)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) and value is not None:
        raise BadRow(f"{name} is a {type(value).__name__}, a string is needed")
    if _absent(value):
        raise BadRow(f"{name} is empty or missing")
    assert isinstance(value, str)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} holds half a surrogate pair at character {error.start}") from error
    return value


def _token_ids(value: Any, size: int) -> Ids:
    ids = _integers(value, "input_ids")
    if not len(ids):
        raise BadRow("input_ids is empty")
    outside = (ids < 0) | (ids >= size)
    if outside.any():
        at = int(np.argmax(outside))
        raise BadRow(f"id {ids[at]} at position {at} of input_ids is outside the vocabulary of {size}")
    return ids.astype(np.int32)


def _integers(value: Any, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, a list of integers is needed")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise BadRow(f"{name} is not a flat list of integers") from error
    if len(value) and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise BadRow(f"{name} is not a flat list of integers")
    return np.clip(array, -1, 2**62).astype(np.int64) if array.dtype.kind == "u" else array.astype(np.int64)
