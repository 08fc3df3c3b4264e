"""Single values of a row, checked: texts, ids, codes, pictures."""

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimega.data import format as layout
from unimega.data.format import Ids
from unimega.data.records.row import BadRow, Rules, Segment

ABSENT = (None, "", "no")
"""What the seeds' corpora write where a row has no text or no codes."""
_LONGEST_PATH = 1024
_PICTURES_IN_BASE64 = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
"""How PNG, JPEG, WebP and GIF begin: no path does."""


def absent(value: Any) -> bool:
    """Whether a row says that it has no such thing."""
    return value is None or (isinstance(value, str) and value in ABSENT)


def text(value: Any, name: str) -> str:
    """A text that is there.

    Raises:
        BadRow: of another type, empty, or not Unicode.
    """
    if not isinstance(value, str) and value is not None:
        raise BadRow(f"{name} is a {type(value).__name__}, a string is needed", reason="wrong type")
    if absent(value):
        raise BadRow(f"{name} is empty or missing", reason="empty text")
    return string(value, name)


def string(value: Any, name: str) -> str:
    """A string, which may be empty.

    Raises:
        BadRow: of another type, or not Unicode.
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, a string is needed", reason="wrong type")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(
                f"{name} holds half a surrogate pair at character {error.start}", reason="not UTF-8"
            ) from error
    return value


def token_ids(value: Any, size: int) -> Ids:
    """int32 ids of a tokenised text.

    Raises:
        BadRow: not a list of ids, empty, or outside the vocabulary of ``size``.
    """
    ids = _integers(value, "input_ids")
    if not len(ids):
        raise BadRow("input_ids is empty", reason="empty text")
    at = _first_outside(ids, size)
    if at is not None:
        raise BadRow(
            f"id {ids[at]} at position {at} of input_ids is outside the vocabulary of {size}", reason="id out of range"
        )
    return ids.astype(np.int32)


def parse_codes(value: Any, name: str, rules: Rules) -> Ids:
    """int32 codes of one image, from a list or from a string that holds one, range and number checked.

    Raises:
        BadRow: not codes, not as many as allowed, or outside the codebook.
    """
    if rules.codebook is None:
        raise BadRow(f"{name} holds codes, but no codebook is given. Pass --codebook K", reason="no codebook")
    if isinstance(value, str):
        value = _plain_list(value)
        value = _list_of_string(value, name) if isinstance(value, str) else value
    codes = _integers(value, name)
    if rules.codes_per_image and len(codes) not in rules.codes_per_image:
        wanted = " or ".join(map(str, rules.codes_per_image))
        raise BadRow(f"{name} has {len(codes)} codes, codes_per_image is {wanted}", reason="number of codes")
    if not len(codes):
        raise BadRow(f"{name} has 0 codes", reason="number of codes")
    at = _first_outside(codes, rules.codebook)
    if at is not None:
        raise BadRow(
            f"code {codes[at]} at position {at} is outside the codebook of {rules.codebook}. "
            "Wrong --codebook, or was the offset added already?",
            reason="code out of range",
        )
    return codes.astype(np.int32)


def code_lists(value: Any, name: str, rules: Rules) -> list[Segment]:
    """Images from codes: one list of codes, or a list of such lists."""
    if isinstance(value, str):
        value = _list_of_string(value, name)
    if isinstance(value, Sequence) and value and all(isinstance(one, list | str | np.ndarray) for one in value):
        return [Segment(layout.MODE_IMAGE, ids=parse_codes(one, f"{name}[{n}]", rules)) for n, one in enumerate(value)]
    return [Segment(layout.MODE_IMAGE, ids=parse_codes(value, name, rules))]


def pictures(value: Any, name: str, rules: Rules, *, in_row: bool) -> list[Segment]:
    """Images from pictures: one or a list of paths, data: addresses, base64 strings, bytes, or {"bytes", "path"}.

    Args:
        in_row: the field holds the picture itself: a string is base64 however short it is, never a path.

    Raises:
        BadRow: none of these, or there is nothing that encodes pictures.
    """
    if not rules.encodes_pictures:
        raise BadRow(
            f"{name} holds a picture, but nothing encodes it. Pass --image-tokenizer NAME:PATH",
            reason="no image tokenizer",
        )
    if isinstance(value, list):
        return [_picture(one, f"{name}[{n}]", rules, in_row=in_row) for n, one in enumerate(value)]
    return [_picture(value, name, rules, in_row=in_row)]


def _picture(value: Any, name: str, rules: Rules, *, in_row: bool) -> Segment:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        if in_row or value.startswith(("data:", *_PICTURES_IN_BASE64)) or len(value) > _LONGEST_PATH:
            data = value.partition(",")[2] if value.startswith("data:") else value
            try:
                return Segment(layout.MODE_IMAGE, picture=base64.b64decode(data, validate=True))
            except (binascii.Error, ValueError) as error:
                raise BadRow(f"{name} is not base64 ({error})", reason="bad picture") from error
        if "\0" in value:
            raise BadRow(f"{name} is not a path: it holds a NUL", reason="bad picture")
        return Segment(layout.MODE_IMAGE, picture=os.path.join(rules.image_root, string(value, name)))
    if isinstance(value, bytes) and value:
        return Segment(layout.MODE_IMAGE, picture=value)
    raise BadRow(
        f"{name} is a {type(value).__name__}: a path, a base64 string or the bytes of a picture are needed",
        reason="bad picture",
    )


def _plain_list(value: str) -> str | np.ndarray[Any, np.dtype[np.int64]]:
    """The integers of "[1, 2, 3]", five times as fast as a JSON parser; anything else comes back as it is."""
    body = value[1:-1]
    if value[:1] != "[" or value[-1:] != "]" or not body.isascii():
        return value
    between = body.encode().translate(None, b"0123456789")
    spaced = between[:2] == b", "
    borders = len(between) // (1 + spaced)
    if between != (b", " if spaced else b",") * borders or (spaced and body.count(", ") != borders):
        return value
    try:
        codes = np.fromstring(body, dtype=np.int64, sep=",")
    except ValueError:  # a place without a number
        return value
    return codes if len(codes) == borders + 1 else value


def _list_of_string(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} is not a list of codes ({error})", reason="wrong type") from error


def _first_outside(values: np.ndarray[Any, np.dtype[np.int64]], size: int) -> int | None:
    if not len(values) or (int(values.min()) >= 0 and int(values.max()) < size):
        return None
    return int(np.argmax((values < 0) | (values >= size)))


def _integers(value: Any, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise BadRow(f"{name} is a {type(value).__name__}, a list of integers is needed", reason="wrong type")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise BadRow(f"{name} is not a flat list of integers", reason="wrong type") from error
    if len(value) and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise BadRow(f"{name} is not a flat list of integers", reason="wrong type")
    return np.clip(array, -1, 2**62).astype(np.int64) if array.dtype.kind == "u" else array.astype(np.int64)
