"""One row of a corpus file to the segments of one document: which kind it is, and how each kind is read."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from unimega.data import format as layout
from unimega.data.records import turns
from unimega.data.records.row import BadRow, Kind, Row, Rules, Segment
from unimega.data.records.values import absent, code_lists, parse_codes, pictures, string, text, token_ids

_loads: Callable[[bytes], Any] = (
    importlib.import_module("orjson").loads if importlib.util.find_spec("orjson") is not None else json.loads
)
"""orjson where it is installed is three times as fast; rows that it refuses go to json, so that both give the same."""

_KIND_OF_TYPE: dict[str, Kind] = {
    "text": "text",
    "text_pretrain": "text",
    "image_text": "image_text",
    "t2i": "t2i",
    "i2t": "i2t",
    "i2t_multi": "i2t_multi",
    "i2t_reverse": "i2t_reverse",
}
_DIRECTION_OF_KIND: dict[Kind, str] = {"t2i": "t2i", "i2t": "i2t"}
_IN_ROW_FIELDS = ("image_bytes", "image_base64")
_PICTURE_FIELDS = ("image", "images", "image_path", *_IN_ROW_FIELDS)
_TURN_FIELDS = ("conversations", "messages")
_MAX_CONTENT = 1 << 26
OTHER_CAPTION = "top_caption"
"""Where LAION-COCO keeps its caption, and so the tar files of mllm-npu."""
_OTHER_MEDIA = ("video", "videos", "audio", "voice")
_IMAGE_CONTEXT = layout.mode(layout.VISION, context=True)


def row_of_json(line: bytes, rules: Rules) -> Row:
    """The document of one jsonl line.

    Raises:
        BadRow: says what is wrong with the line.
    """
    try:
        fields = _loads(line)
    except (ValueError, RecursionError):
        fields = _parse_slowly(line)
    if not isinstance(fields, dict):
        name = {"list": "list", "str": "string", "NoneType": "null"}.get(type(fields).__name__, type(fields).__name__)
        raise BadRow(f"a JSON {name}, an object is needed", reason="not an object")
    return row_of_fields(fields, rules)


def _parse_slowly(line: bytes) -> Any:
    """What the fast parser refused: json knows NaN and lone surrogates too, and says what is wrong."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start} of the line)", reason="not UTF-8") from error
    except RecursionError as error:
        raise BadRow("not JSON (nested too deeply)", reason="not JSON") from error
    except ValueError as error:
        raise BadRow(f"not JSON ({error})", reason="not JSON") from error


def row_of_fields(fields: Mapping[str, Any], rules: Rules) -> Row:
    """The document of a row, of the kind that the source has or that its fields show.

    Raises:
        BadRow: no kind fits, several do, or a field breaks a rule.
    """
    if rules.fields:
        fields = _renamed(fields, rules.fields)
    elif OTHER_CAPTION in fields and absent(fields.get("caption")):
        fields = {**fields, "caption": fields[OTHER_CAPTION]}
    kind = rules.kind if rules.kind != "auto" else _recognise(fields)
    row = _BUILDERS[kind](fields, rules)
    if row.direction is not None and rules.direction is not None:
        return row._replace(direction=rules.direction)
    return row


def _renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in names.values() if name not in fields]
    if missing:
        raise BadRow(
            f"field {missing[0]!r} is not there; found: {', '.join(map(str, fields)) or 'none'}",
            reason="field missing",
        )
    renamed = {field: fields[name] for field, name in names.items()}
    if "data_type" not in renamed and "data_type" in fields:
        renamed["data_type"] = fields["data_type"]
    return renamed


def _recognise(fields: Mapping[str, Any]) -> Kind:
    declared = fields.get("data_type")
    if declared is not None and (not isinstance(declared, str) or declared not in _KIND_OF_TYPE):
        raise BadRow(
            f"data_type={declared!r} is not supported; known: {', '.join(_KIND_OF_TYPE)}. Give the source a kind",
            reason="unknown kind",
        )
    if declared is not None and _KIND_OF_TYPE[declared] != "text":
        return _KIND_OF_TYPE[declared]
    found = _candidates(fields, images=declared is None)
    if len(found) > 1:
        told = " or ".join(f"{one.kind} (field {one.field})" for one in found)
        raise BadRow(f"it may be {told}. Give the source a kind, or name its fields", reason="ambiguous kind")
    if not found:
        raise BadRow(
            "none of the fields text, caption + codes or image, conversations, instruction + output, input_ids, items "
            f"is there; found: {', '.join(map(str, fields)) or 'none'}",
            reason="unknown kind",
        )
    return found[0].kind


class _Candidate(NamedTuple):
    kind: Kind
    field: str


def _candidates(fields: Mapping[str, Any], *, images: bool) -> list[_Candidate]:
    """Every kind that a row without a telling data_type may be."""
    if len(fields) == 1 and isinstance(fields.get("text"), str) and not turns.has_marks(fields["text"]):
        return [_Candidate("text", "text")]  # most rows there are
    found: list[_Candidate] = []
    if fields.get("input_ids") is not None:
        found.append(_Candidate("input_ids", "input_ids"))
    if fields.get("items") is not None:
        found.append(_Candidate("interleaved", "items"))
    elif isinstance(fields.get("texts"), Sequence) and not isinstance(fields["texts"], str):
        found.append(_Candidate("interleaved", "texts"))
    found += [_Candidate("conversations", name) for name in _TURN_FIELDS if _holds(fields, name)]
    if not absent(fields.get("instruction")) and fields.get("output") is not None:
        found.append(_Candidate("alpaca", "instruction"))
    has_image = images and (_codes_field(fields) is not None or _picture_field(fields) is not None)
    body = next((name for name in ("text", "caption")[: 1 + has_image] if not absent(fields.get(name))), None)
    if body is not None and turns.has_marks(fields[body]):
        found.append(_Candidate("turn_split", body))
    elif has_image and (body is not None or not found or found[0].kind == "input_ids"):
        found.append(_Candidate("image_text", _codes_field(fields) or _picture_field(fields) or ""))
    elif body is not None or (not found and "text" in fields):
        found.append(_Candidate("text", "text"))
    return found


def _codes_field(fields: Mapping[str, Any]) -> str | None:
    names = [name for name in fields if (name == "codes" or name.startswith("vqcode_")) and not absent(fields[name])]
    if len(names) > 1:
        raise BadRow(
            f"codes in more than one field: {', '.join(names)}. Name one with fields = {{codes = ...}}",
            reason="ambiguous kind",
        )
    return names[0] if names else None


def _holds(fields: Mapping[str, Any], name: str) -> bool:
    """Whether a field has content; corpora of fixed columns write an empty list for no turns or pictures."""
    value = fields.get(name)
    return not absent(value) and not (isinstance(value, Sequence) and not len(value))


def _turn_field(fields: Mapping[str, Any]) -> str | None:
    return next((name for name in _TURN_FIELDS if _holds(fields, name)), None)


def _picture_field(fields: Mapping[str, Any]) -> str | None:
    names = [name for name in _PICTURE_FIELDS if _holds(fields, name)]
    if len(names) > 1:
        raise BadRow(f"pictures in more than one field: {', '.join(names)}", reason="ambiguous kind")
    return names[0] if names else None


def _images(fields: Mapping[str, Any], rules: Rules) -> list[Segment]:
    """Images of a row: codes if it has them, else pictures; none if it has neither."""
    media = next((name for name in _OTHER_MEDIA if not absent(fields.get(name))), None)
    if media is not None:
        raise BadRow(f"{media}: this modality is not supported", reason="modality not supported")
    codes, picture = _codes_field(fields), _picture_field(fields)
    if codes is not None and picture is not None and rules.encodes_pictures:
        raise BadRow(f"codes in {codes} and a picture in {picture}. Name one of them", reason="ambiguous kind")
    if codes is not None:
        return code_lists(fields[codes], codes, rules)
    return pictures(fields[picture], picture, rules, in_row=picture in _IN_ROW_FIELDS) if picture is not None else []


def _text(fields: Mapping[str, Any], rules: Rules) -> Row:
    if "text" not in fields:
        raise BadRow(
            f"field 'text' is not there; found: {', '.join(map(str, fields)) or 'none'}", reason="field missing"
        )
    return Row((Segment(layout.MODE_TEXT, text=text(fields["text"], "text")),))


def _caption(fields: Mapping[str, Any]) -> str:
    """The text that goes with an image: caption or text, whichever is there."""
    caption, other = fields.get("caption"), fields.get("text")
    if not absent(caption) and not absent(other) and caption != other:
        raise BadRow("caption and text differ. Name one with fields = {caption = ...}", reason="ambiguous kind")
    return text(other if absent(caption) and not absent(other) else caption, "caption")


def _one_image(fields: Mapping[str, Any], rules: Rules) -> Segment:
    codes, picture = _codes_field(fields), _picture_field(fields)
    if codes is not None and (picture is None or not rules.encodes_pictures):
        return Segment(layout.MODE_IMAGE, ids=parse_codes(fields[codes], codes, rules))
    images = _images(fields, rules)
    if len(images) != 1:
        declared = fields.get("data_type")
        before = f"data_type={declared!r}, but " if declared is not None else ""
        raise BadRow(
            f"{before}{f'{len(images)} images, one is needed' if images else 'no field codes or vqcode_* holds codes'}",
            reason="field missing",
        )
    return images[0]


def _pair(kind: Kind) -> Callable[[Mapping[str, Any], Rules], Row]:
    def build(fields: Mapping[str, Any], rules: Rules) -> Row:
        told = _turn_field(fields) is not None or turns.has_marks(fields.get("text"))
        if kind == "i2t" and told:  # the seeds use i2t for questions about one image as well
            return _questions(fields, rules)
        image = _one_image(fields, rules)
        caption = Segment(layout.MODE_CAPTION, text=_caption(fields))
        return Row((caption, image), _DIRECTION_OF_KIND.get(kind, "both"))

    return build


def _reverse(fields: Mapping[str, Any], rules: Rules) -> Row:
    """Image, a question that the loader draws, the caption as its answer."""
    image = _one_image(fields, rules)
    return Row(
        (
            image._replace(mode=_IMAGE_CONTEXT),
            Segment(layout.MODE_QUESTION, text=""),
            Segment(layout.MODE_ANSWER, text=_caption(fields)),
        )
    )


def _questions(fields: Mapping[str, Any], rules: Rules) -> Row:
    """Questions about images: conversations, messages or a flat string, with at least one image."""
    images = _images(fields, rules)
    if not images:
        raise BadRow("no field codes, vqcode_* or image holds an image", reason="field missing")
    return Row(turns.document(_turns(fields), images))


def _turns(fields: Mapping[str, Any]) -> list[turns.Turn]:
    name = _turn_field(fields)
    if name is not None:
        return turns.conversation(fields[name], name)
    return turns.turn_string(_caption(fields), "text")


def _conversations(fields: Mapping[str, Any], rules: Rules) -> Row:
    name = _turn_field(fields)
    if name is None:
        raise BadRow("no field conversations or messages holds turns", reason="field missing")
    return Row(turns.document(turns.conversation(fields[name], name), _images(fields, rules)))


def _turn_split(fields: Mapping[str, Any], rules: Rules) -> Row:
    return Row(turns.document(turns.turn_string(_caption(fields), "text"), _images(fields, rules)))


def _alpaca(fields: Mapping[str, Any], rules: Rules) -> Row:
    return Row(turns.document(turns.instruction(fields), _images(fields, rules)))


def _input_ids(fields: Mapping[str, Any], rules: Rules) -> Row:
    return Row((Segment(layout.MODE_TEXT, ids=token_ids(fields.get("input_ids"), rules.text_size)),))


def _interleaved(fields: Mapping[str, Any], rules: Rules) -> Row:
    """Texts and images in the row's order; touching texts become one, touching images stay two."""
    items = fields.get("items")
    name = "items"
    if items is None:
        items, name = _zipped(fields), "texts"
    if not isinstance(items, Sequence) or isinstance(items, str) or not len(items):
        raise BadRow(f"{name} is not a list of texts and codes", reason="wrong type")
    segments: list[Segment] = []
    texts: list[str] = []
    size = 0

    def close() -> None:
        if texts:
            segments.append(Segment(layout.MODE_TEXT, text="".join(texts)))
            texts.clear()

    for number, item in enumerate(items):
        found = _item(item, f"{name}[{number}]", rules)
        content = found.text if found.text is not None else found.ids if found.ids is not None else ()
        size += len(content)
        if size > _MAX_CONTENT:  # pickles and dictionaries of parquet may name one thing a million times
            raise BadRow(f"{name} hold more than {_MAX_CONTENT} characters and codes", reason="row too long")
        if found.text is not None:
            texts.append(found.text)
        else:
            close()
            segments.append(found)
    close()
    return Row(tuple(segments))


def _zipped(fields: Mapping[str, Any]) -> list[Any]:
    """Lists images and texts of one length, of which exactly one is there at each place."""
    texts, images = fields.get("texts"), fields.get("images")
    if not isinstance(texts, Sequence) or not isinstance(images, Sequence) or len(texts) != len(images):
        raise BadRow("texts and images are not lists of one length", reason="wrong type")
    items: list[Any] = []
    for number, (one, image) in enumerate(zip(texts, images, strict=True)):
        if (one is None) == (image is None):
            raise BadRow(f"place {number} of texts and images needs one of them", reason="wrong type")
        items.append({"text": one} if image is None else {"image": image})
    return items


def _item(item: Any, name: str, rules: Rules) -> Segment:
    if isinstance(item, Mapping):
        if (codes := _codes_field(item)) is not None:
            return Segment(layout.MODE_IMAGE, ids=parse_codes(item[codes], name, rules))
        if (picture := _picture_field(item)) is not None:
            value = item[picture]
            if isinstance(value, Sequence) and not isinstance(value, str | bytes):
                return Segment(layout.MODE_IMAGE, ids=parse_codes(value, name, rules))
            return pictures(value, name, rules, in_row=picture in _IN_ROW_FIELDS)[0]
        item = item.get("text")
    elif isinstance(item, Sequence) and not isinstance(item, str):
        return Segment(layout.MODE_IMAGE, ids=parse_codes(item, name, rules))
    return Segment(layout.MODE_TEXT, text=_item_text(item, name))


def _item_text(value: Any, name: str) -> str:
    if value is None or value == "":
        raise BadRow(f"{name} is empty or missing", reason="empty text")
    return string(value, name)


_BUILDERS: dict[Kind, Callable[[Mapping[str, Any], Rules], Row]] = {
    "text": _text,
    "image_text": _pair("image_text"),
    "t2i": _pair("t2i"),
    "i2t": _pair("i2t"),
    "i2t_multi": _questions,
    "i2t_reverse": _reverse,
    "conversations": _conversations,
    "turn_split": _turn_split,
    "alpaca": _alpaca,
    "input_ids": _input_ids,
    "interleaved": _interleaved,
}
