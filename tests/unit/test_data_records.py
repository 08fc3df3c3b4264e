"""Rows to segments: every kind, how it is recognised, and what is refused."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimega.data.records import kinds
from unimega.data.records.kinds import row_of_fields, row_of_json
from unimega.data.records.row import BadRow, Rules

IMAGE, OTHER = [3, 0, 31, 7], [1, 1, 1, 1]
TEXT, CODES, CONTEXT_CODES, CAPTION, QUESTION, ANSWER = 0x00, 0x01, 0x09, 0x10, 0x28, 0x30
PICTURE = base64.b64encode(b"picture").decode()


def rules(**values) -> Rules:
    return Rules(**({"text_size": 100, "codebook": 32, "codes_per_image": (4,)} | values))


def read(given_row, **values):
    """(mode, content) of each segment, then the direction."""
    row = row_of_fields(given_row, rules(**values))
    segments = []
    for segment in row.segments:
        given = [one for one in (segment.text, segment.ids, segment.picture) if one is not None]
        assert len(given) == 1, "a segment is exactly one of text, ids and picture"
        segments.append((segment.mode, given[0].tolist() if isinstance(given[0], np.ndarray) else given[0]))
    return segments, row.direction


HUMAN, GPT = {"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "no"}
ABSENT = {"text": None, "caption": "no", "vqcode_512": "no", "vqcode_multi768": "", "conversations": None}
CHAT = [(QUESTION, "what is it?"), (ANSWER, "no")]
FLAT = "what is it?^^^pair_split^^^no"
KINDS = {
    "text": ({"text": "a"}, [(TEXT, "a")], None),
    "text among others": ({"id": "1", "score": 2.5, "text": "a", "meta": {"x": 1}}, [(TEXT, "a")], None),
    "text beside absent fields": (ABSENT | {"text": "a"}, [(TEXT, "a")], None),
    "text beside empty lists": (ABSENT | {"text": "a", "conversations": [], "images": []}, [(TEXT, "a")], None),
    "turns beside no pictures": ({"conversations": [HUMAN, GPT], "messages": [], "images": []}, CHAT, None),
    "i2t beside empty turns": (
        {"caption": "a", "codes": IMAGE, "data_type": "i2t", "conversations": []},
        [(CAPTION, "a"), (CODES, IMAGE)],
        "i2t",
    ),
    "text by type": ({"text": "a", "data_type": "text_pretrain", "codes": IMAGE}, [(TEXT, "a")], None),
    "caption": ({"caption": "a", "codes": IMAGE}, [(CAPTION, "a"), (CODES, IMAGE)], "both"),
    "caption of LAION-COCO": (
        {"top_caption": "a", "all_captions": ["b"], "codes": IMAGE},
        [(CAPTION, "a"), (CODES, IMAGE)],
        "both",
    ),
    "two captions, the nearer one": (
        {"top_caption": "b", "caption": "a", "codes": IMAGE},
        [(CAPTION, "a"), (CODES, IMAGE)],
        "both",
    ),
    "caption in text": ({"text": "a", "vqcode_512": str(IMAGE)}, [(CAPTION, "a"), (CODES, IMAGE)], "both"),
    "image_text": (
        ABSENT | {"caption": "a", "vqcode_512": str(IMAGE), "data_type": "image_text"},
        [(CAPTION, "a"), (CODES, IMAGE)],
        "both",
    ),
    "t2i": ({"caption": "a", "codes": IMAGE, "data_type": "t2i"}, [(CAPTION, "a"), (CODES, IMAGE)], "t2i"),
    "i2t": ({"caption": "a", "codes": IMAGE, "data_type": "i2t"}, [(CAPTION, "a"), (CODES, IMAGE)], "i2t"),
    "i2t with questions": (
        {"text": FLAT, "codes": IMAGE, "data_type": "i2t"},
        [(CONTEXT_CODES, IMAGE), *CHAT],
        None,
    ),
    "i2t_reverse": (
        {"caption": "a", "codes": IMAGE, "data_type": "i2t_reverse"},
        [(CONTEXT_CODES, IMAGE), (QUESTION, ""), (ANSWER, "a")],
        None,
    ),
    "i2t_multi": (
        {"text": f"{FLAT}^^^turn_split^^^b^^^pair_split^^^c", "vqcode_512": str(IMAGE), "data_type": "i2t_multi"},
        [(CONTEXT_CODES, IMAGE), *CHAT, (QUESTION, "b"), (ANSWER, "c")],
        None,
    ),
    "i2t_multi of conversations": (
        {"conversations": [HUMAN, GPT], "codes": [IMAGE, OTHER], "data_type": "i2t_multi"},
        [(CONTEXT_CODES, IMAGE), (CONTEXT_CODES, OTHER), *CHAT],
        None,
    ),
    "an empty question is drawn at load": (
        {"text": "^^^pair_split^^^a bus", "codes": IMAGE, "data_type": "i2t_multi"},
        [(CONTEXT_CODES, IMAGE), (QUESTION, ""), (ANSWER, "a bus")],
        None,
    ),
    "turns without an image": ({"text": FLAT}, CHAT, None),
    "conversations": ({"conversations": [HUMAN, GPT]}, CHAT, None),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [{"type": "text", "text": "ho"}]},
            ]
        },
        [(QUESTION, "be kind"), (QUESTION, "hi"), (ANSWER, "ho")],
        None,
    ),
    "marks say where images stand": (
        {
            "conversations": [
                {"from": "human", "value": "<image>\nis it like <image>?"},
                {"from": "gpt", "value": "yes"},
            ],
            "codes": [IMAGE, OTHER],
        },
        [(CONTEXT_CODES, IMAGE), (QUESTION, "is it like "), (CONTEXT_CODES, OTHER), (QUESTION, "?"), (ANSWER, "yes")],
        None,
    ),
    "a mark alone is a question": (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a bus"}], "codes": IMAGE},
        [(CONTEXT_CODES, IMAGE), (QUESTION, ""), (ANSWER, "a bus")],
        None,
    ),
    "an image in an answer is a target": (
        {
            "conversations": [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "here:<image>"}],
            "codes": IMAGE,
        },
        [(QUESTION, "draw"), (TEXT, "here:"), (CODES, IMAGE), (ANSWER, "")],
        None,
    ),
    "alpaca": (
        {"instruction": "add", "input": "1 2", "output": "no"},
        [(QUESTION, "add"), (QUESTION, "1 2"), (ANSWER, "no")],
        None,
    ),
    "alpaca without input": (
        {"instruction": "add", "input": "", "output": "3"},
        [(QUESTION, "add"), (ANSWER, "3")],
        None,
    ),
    "ids": ({"input_ids": [1, 99]}, [(TEXT, [1, 99])], None),
    "interleaved": (
        {"items": ["a", {"text": "b"}, IMAGE, {"codes": str(OTHER)}, "c"]},
        [(TEXT, "ab"), (CODES, IMAGE), (CODES, OTHER), (TEXT, "c")],
        None,
    ),
    "picture": ({"caption": "a", "image": "b.png"}, [(CAPTION, "a"), (CODES, "/images/b.png")], "both"),
    "picture as bytes": ({"text": "a", "image": {"bytes": b"x"}}, [(CAPTION, "a"), (CODES, b"x")], "both"),
    "picture in an address": (
        {"caption": "a", "image": f"data:image/png;base64,{PICTURE}"},
        [(CAPTION, "a"), (CODES, b"picture")],
        "both",
    ),
    "picture in the row": (
        {"caption": "a", "image_base64": PICTURE},  # shorter than many a path
        [(CAPTION, "a"), (CODES, b"picture")],
        "both",
    ),
    "pictures in items": (
        {"items": ["a", {"image_bytes": PICTURE}, {"image_path": "b.png"}]},
        [(TEXT, "a"), (CODES, b"picture"), (CODES, "/images/b.png")],
        None,
    ),
    "interleaved lists": (
        {"texts": ["a", None, "b"], "images": [None, "x.png", None]},
        [(TEXT, "a"), (CODES, "/images/x.png"), (TEXT, "b")],
        None,
    ),
    "llava": (
        {"image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, GPT]},
        [(CONTEXT_CODES, "/images/x.jpg"), *CHAT],
        None,
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_kind(case):
    fields, segments, direction = KINDS[case]
    assert read(fields, encodes_pictures=True, image_root="/images") == (segments, direction)


def test_a_kind_that_is_given_wins():
    both = {"text": "a", "input_ids": [5], "conversations": [HUMAN, GPT], "codes": IMAGE, "caption": "a"}
    assert read(both, kind="text")[0] == [(TEXT, "a")]
    assert read(both, kind="input_ids")[0] == [(TEXT, [5])]
    assert read(both, kind="conversations")[0] == [(CONTEXT_CODES, IMAGE), *CHAT]
    assert read(both, kind="t2i") == ([(CAPTION, "a"), (CODES, IMAGE)], "t2i")
    assert read({"text": FLAT}, kind="text")[0] == [(TEXT, FLAT)]


def test_fields_by_other_names():
    row = {"content": "a", "text": "b", "ids": [3], "vq": IMAGE, "data_type": "t2i"}
    plain = {name: value for name, value in row.items() if name != "data_type"}
    assert read(plain, fields={"text": "content"}) == ([(TEXT, "a")], None)
    assert read(row, fields={"caption": "content", "codes": "vq"}) == ([(CAPTION, "a"), (CODES, IMAGE)], "t2i")
    assert read(plain, fields={"input_ids": "ids"})[0] == [(TEXT, [3])]
    with pytest.raises(BadRow, match="field 'body' is not there; found: content, text"):
        read(plain, fields={"text": "body"})


def test_a_direction_that_is_given_holds_for_pairs():
    assert read({"caption": "a", "codes": IMAGE, "data_type": "t2i"}, direction="both")[1] == "both"
    assert read({"text": "a"}, direction="i2t")[1] is None


AMBIGUOUS = {
    "ids and text": ({"input_ids": [1], "text": "a"}, r"input_ids \(field input_ids\) or text \(field text\)"),
    "alpaca and text": ({"instruction": "a", "output": "b", "text": "c"}, "alpaca .* or text"),
    "turns and text": ({"conversations": [HUMAN, GPT], "text": "c"}, "conversations .* or text"),
    "ids and codes": ({"input_ids": [1], "codes": IMAGE}, "input_ids .* or image_text"),
    "two conversations": ({"conversations": [HUMAN, GPT], "messages": [{}]}, "conversations.* or .*messages"),
    "two codes": ({"caption": "a", "codes": IMAGE, "vqcode_512": IMAGE}, "codes in more than one field: codes, vqcode"),
    "two captions": ({"caption": "a", "text": "b", "codes": IMAGE}, "caption and text differ. Name one"),
    "codes and picture": ({"caption": "a", "codes": IMAGE, "image": "x"}, "codes in codes and a picture in image"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_may_be_two_things_is_refused(case):
    fields, message = AMBIGUOUS[case]
    with pytest.raises(BadRow, match=message) as caught:
        read(fields, encodes_pictures=True)
    assert caught.value.reason == "ambiguous kind"


REFUSED = {
    "unknown type": ({"data_type": "speech"}, "data_type='speech' is not supported; known: text", "unknown kind"),
    "nothing": ({}, "found: none", "unknown kind"),
    "picture without an encoder": ({"caption": "a", "image": "x"}, "nothing encodes it. Pass --image-", "no image tok"),
    "half a pair in a path": ({"caption": "a", "image": "\ud83d"}, "image holds half a surrogate", "not UTF-8"),
    "video": ({"conversations": [HUMAN, GPT], "video": "x.mp4"}, "video: this modality", "modality not supported"),
    "unknown role": ({"conversations": [{"from": "narrator", "value": "x"}]}, "from='narrator' is not", "unknown role"),
    "no list of turns": ({"conversations": "x"}, "not a list of turns", "wrong type"),
    "no turns": ({"conversations": []}, "none of the fields .* is there; found: conversations", "unknown kind"),
    "a turn that is none": ({"conversations": ["x"]}, r"conversations\[0\] is a str", "wrong type"),
    "empty turn": ({"conversations": [{"from": "human", "value": " "}, GPT]}, "turn 0 is empty", "empty text"),
    "empty answer": ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "turn 1 is empty", "empty text"),
    "no answer": ({"conversations": [HUMAN]}, "no turn is an answer", "wrong turns"),
    "marks without images": (
        {"conversations": [{"from": "human", "value": "<image> what?"}, GPT]},
        "1 <image> marks, but 0 images",
        "wrong images",
    ),
    "half a pair": ({"text": "a^^^turn_split^^^b"}, "turn 0 of text has 0 .*pair_split", "wrong turns"),
    "two answers": ({"text": f"{FLAT}^^^pair_split^^^c"}, "turn 0 of text has 2 ", "wrong turns"),
    "questions without an image": ({"text": FLAT, "data_type": "i2t_multi"}, "no field codes, vqcode", "field missing"),
    "reverse without an image": ({"caption": "a", "data_type": "i2t_reverse"}, "no field codes", "field missing"),
    "two images of a caption": ({"caption": "a", "images": ["x", "y"]}, "2 images, one is needed", "field missing"),
    "lists of two lengths": ({"texts": ["a"], "images": []}, "not lists of one length", "wrong type"),
    "neither": ({"texts": [None], "images": [None]}, "place 0 of texts and images", "wrong type"),
    "no base64": ({"caption": "a", "image": "data:image/png;base64,?"}, "image is not base64", "bad picture"),
    "NUL in a path": ({"caption": "a", "image": "x\0"}, "image is not a path", "bad picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    fields, message, reason = REFUSED[case]
    with pytest.raises(BadRow, match=message) as caught:
        read(fields, encodes_pictures=case != "picture without an encoder")
    assert caught.value.reason.startswith(reason)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.just(IMAGE) | st.just("no"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("from", "value", "text")), inner),
    max_leaves=8,
)
NAMES = ("text", "caption", "codes", "vqcode_512", "image", "items", "texts", "images", "conversations", "messages")
rows = st.dictionaries(st.sampled_from((*NAMES, "input_ids", "instruction", "input", "output", "data_type")), anything)


@given(rows, st.sampled_from(list(kinds._BUILDERS)) | st.just("auto"))
def test_any_row_is_a_document_or_refused(fields, kind):
    """Nothing but BadRow comes out of a row, whatever it holds."""
    try:
        found, _ = read(fields, kind=kind, encodes_pictures=True)
    except BadRow as error:
        assert str(error) and error.reason and "\n" not in error.reason
    else:
        assert found and all(mode in (TEXT, CODES, CONTEXT_CODES, CAPTION, QUESTION, ANSWER) for mode, _ in found)


@given(rows)
def test_both_parsers_give_the_same(fields):
    """orjson where it is installed, json where it is not: the same rows and the same refusals."""
    line = json.dumps(fields).encode()
    assert _outcome(line, kinds._loads) == _outcome(line, json.loads)


def _outcome(line, loads):
    before, kinds._loads = kinds._loads, loads
    try:
        row = row_of_json(line, rules())
        return [(one.mode, one.text, None if one.ids is None else one.ids.tolist()) for one in row.segments]
    except BadRow as error:
        return error.reason
    finally:
        kinds._loads = before


@given(
    st.lists(st.integers(0, 40), max_size=6),
    st.sampled_from(("[{}]", "[{}", "{}]", " [{}]", "[{},]", "[,{}]", "[[{}]]")),
)
def test_code_strings_are_json_lists(codes, shape):
    """The fast way takes what json takes, with the same outcome, and nothing else."""
    for separator in (", ", ",", " ,", ",,", " ", ",  "):
        text = shape.format(separator.join(map(str, codes)))
        fields = {"caption": "a", "codes": text}
        try:
            expected = json.loads(text)
        except ValueError:
            expected = None
        try:
            found = read(fields, codes_per_image=())[0][1][1]
        except BadRow:
            assert not expected or min(map(type, expected), key=str) is list or max(expected) >= 32
        else:
            assert found == expected
