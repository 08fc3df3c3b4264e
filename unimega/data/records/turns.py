"""Rows of questions and answers: conversations, flat turn strings, instructions; with images where they are marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from unimega.data import format as layout
from unimega.data.records.row import BadRow, Segment
from unimega.data.records.values import string, text

TURN_SPLIT, PAIR_SPLIT = "^^^turn_split^^^", "^^^pair_split^^^"
_MARKS_END = "_split^^^"
"""One search finds that a text has neither."""
IMAGE_MARK = "<image>"
_QUESTION_ROLES = frozenset(("human", "user", "system", "tool", "function", "observation"))
_ANSWER_ROLES = frozenset(("gpt", "assistant", "model", "bot", "chatgpt"))
_IMAGE_CONTEXT = layout.mode(layout.VISION, context=True)

Turn = tuple[bool, str]
"""(whether it is an answer, its text)."""


def conversation(value: Any, name: str) -> list[Turn]:
    """Turns of ``[{"from": ..., "value": ...}]`` or ``[{"role": ..., "content": ...}]``.

    Raises:
        BadRow: of another shape, or a role that is not known.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
        raise BadRow(f"{name} is not a list of turns", reason="wrong type")
    turns = []
    for number, turn in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{where} is a {type(turn).__name__}, an object is needed", reason="wrong type")
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _QUESTION_ROLES | _ANSWER_ROLES:
            known = ", ".join(sorted(_QUESTION_ROLES | _ANSWER_ROLES))
            raise BadRow(f"{where}: {role_key}={role!r} is not known; known: {known}", reason="unknown role")
        turns.append((role in _ANSWER_ROLES, _content(turn.get(text_key), f"{where}.{text_key}")))
    return turns


def turn_string(value: str, name: str) -> list[Turn]:
    """Turns of a flat string: question, pair split, answer, turn split, question, ...

    Raises:
        BadRow: a turn is not a pair.
    """
    turns = []
    for number, pair in enumerate(value.split(TURN_SPLIT)):
        parts = pair.split(PAIR_SPLIT)
        if len(parts) != 2:
            raise BadRow(
                f"turn {number} of {name} has {len(parts) - 1} {PAIR_SPLIT}, a question and an answer need one",
                reason="wrong turns",
            )
        turns += [(False, parts[0]), (True, parts[1])]
    return turns


def instruction(fields: Mapping[str, Any]) -> list[Turn]:
    """Turns of an alpaca row: instruction, input if there is one, output."""
    turns = [(False, text(fields.get("instruction"), "instruction"))]
    if fields.get("input") not in (None, ""):
        turns.append((False, string(fields["input"], "input")))
    return [*turns, (True, string(fields.get("output"), "output"))]


def document(turns: Sequence[Turn], images: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segments of turns: each image where its mark stands, all of them in front if there is no mark.

    An image in a question is context. A question without a text stands for one that the loader draws, which needs an
    image. An answer of several parts ends in one segment with the role of an answer, so that one eos follows it.

    Raises:
        BadRow: marks and images do not go together, a turn is empty, or nothing is answered.
    """
    marks = sum(value.count(IMAGE_MARK) for _, value in turns)
    if marks != len(images) and marks:
        raise BadRow(f"{marks} {IMAGE_MARK} marks, but {len(images)} images", reason="wrong images")
    left = iter(images)
    segments = [] if marks else [Segment(_IMAGE_CONTEXT, *image[1:]) for image in left]
    for number, (is_answer, value) in enumerate(turns):
        parts = value.split(IMAGE_MARK)
        if len(parts) == 1 and not value.strip() and not (number == 0 and images and not is_answer):
            raise BadRow(f"turn {number} is empty", reason="empty text")
        segments += _turn(is_answer, parts, left)
    if not any(is_answer for is_answer, _ in turns):
        raise BadRow("no turn is an answer", reason="wrong turns")
    return tuple(segments)


def _turn(is_answer: bool, parts: Sequence[str], images: Any) -> list[Segment]:
    role, image_mode = (layout.MODE_TEXT, layout.MODE_IMAGE) if is_answer else (layout.MODE_QUESTION, _IMAGE_CONTEXT)
    segments = []
    for number, part in enumerate(parts):
        if number:  # marks stand on lines of their own: their newline is no content
            segments.append(Segment(image_mode, *next(images)[1:]))
            part = part.removeprefix("\n")
        if number < len(parts) - 1:
            part = part.removesuffix("\n")
        if part.strip() or (len(parts) == 1 and not is_answer):
            segments.append(Segment(role, text=part if part.strip() else ""))
    if is_answer and segments[-1].text is not None:
        segments[-1] = Segment(layout.MODE_ANSWER, text=segments[-1].text)
    elif is_answer:
        segments.append(Segment(layout.MODE_ANSWER, text=""))
    elif all(segment.text is None for segment in segments):
        segments.append(Segment(layout.MODE_QUESTION, text=""))
    return segments


def _content(value: Any, name: str) -> str:
    """A turn's text; the parts of a message that is a list are joined, with a mark for each image."""
    if not isinstance(value, list):
        return string(value, name)
    parts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text"):
            parts.append(string(part.get("text"), f"{name}[{number}].text"))
        elif kind in ("image", "image_url", "input_image"):
            parts.append(IMAGE_MARK)
        else:
            raise BadRow(f"{name}[{number}] is no part of type text or image", reason="wrong type")
    return "".join(parts)


def has_marks(value: Any) -> bool:
    """Whether a text is a flat string of turns."""
    return isinstance(value, str) and _MARKS_END in value and (TURN_SPLIT in value or PAIR_SPLIT in value)
