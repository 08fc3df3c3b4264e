"""The fast ways from text to ids give the reference's ids, or refuse."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.made_tokenizers import CORPUS, ORDINARY, PATTERNS, SPECIALS, byte_level, saved
from unimega.data.tokenize import TextTokenizer, forms, giga, words
from unimega.data.tokenize.common import Encoded, slices
from unimega.errors import ConfigError, DataError

FAST = ("gigatoken", "word-cache")
HOSTILE = [
    *" \t\n\r\x0b\x0c\x1c\x1f\x00\x7f\x85\xa0\u1680\u2000\u2001\u2028\u2029\u202f\u3000\u200b\ufeff\uffff\U0010ffff",
    *"aZ09.,'/-_<>|!\"sStTlLdDmMvVeErR",
    *"\u017f\u212a\u0130\u0131\u00df\u01c5\u02b0\u0301\u0323\u0344\u0345\u1e9b\u212b\u037e\u1fef\u0958\ufb1d",
    *"\u00e9\u0439\u0438\u0306\u0663\u00b2\u2167\u0f33\u4e2d\uf900\uac00\u1100\u1161\u11a8\u0e33\u0627\u0651\u064b",
    *"\U0001f468\u200d\ufe0f\U0001d400\U00020000\U0002a6dd\U0002f800\u0378\U000113c2\U000113b8\U00016d67",
    *("'s", "'LL", "'re", "\r\n", "\n\n", "  ", " \n ", "ing", " the", "12345", "!!\n", "//\n/", "caf\u00e9"),
    *SPECIALS,
    *ORDINARY,
    *("<|", "|>", "<|im_", "<pad>", "</s>", "unconditional", "x" * 70, "\u4e2d\u6587" * 40),
]
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.characters(exclude_categories=["Cs"]), max_size=24).map("".join)
BATCHES = st.lists(TEXTS, max_size=6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(reference, fast ways) of every split, with and without NFC."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for pattern in PATTERNS:
        for nfc in (True, False):
            # one in three holds its special tokens inside the vocabulary, one in two skips merges, as Llama 3 does
            inside, ignore = pattern in ("gpt2", "llama3"), pattern in ("llama3", "qwen35", "o200k")
            folder = saved(byte_level(pattern, nfc=nfc, inside=inside, ignore_merges=ignore), root / f"{pattern}{nfc}")
            found[pattern, nfc] = (TextTokenizer(folder), [TextTokenizer(folder, backend=name) for name in FAST])
            assert [fast.backend for fast in found[pattern, nfc][1]] == list(FAST)
    return found


def assert_equal(reference, fast, texts):
    expected, found = reference.encode_batch(texts), fast.encode_batch(texts)
    assert found.ids.dtype == expected.ids.dtype == np.int32
    assert found.lengths.tolist() == expected.lengths.tolist(), (fast.backend, texts)
    assert found.ids.tolist() == expected.ids.tolist(), (fast.backend, texts)


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_fast_ways_give_the_ids_of_the_reference(made, texts):
    for reference, fast in made.values():
        for other in fast:
            assert_equal(reference, other, texts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet=" \nab'sl1!\u00e9", max_size=40), max_size=4))
def test_fast_ways_agree_on_runs_of_few_characters(made, texts):
    for pattern in ("gpt2", "qwen2", "o200k"):
        reference, fast = made[pattern, True]
        for other in fast:
            assert_equal(reference, other, texts)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fast_ways_know_the_classes_of_all_characters(made, pattern):
    """Letters, numbers, spaces and what NFC does with each: one text per hundred characters of the first planes."""
    reference, fast = made[pattern, True]
    drawn = random.Random(0)
    ideographs = range(0x4E10, 0x9F00), range(0xAC10, 0xD790), range(0xE010, 0xF8F0), range(0x17010, 0x18C00)
    numbers = [n for n in range(0x20000) if not 0xD800 <= n < 0xE000 and not any(n in block for block in ideographs)]
    dense = pattern in ("gpt2", "qwen2")
    numbers = drawn.sample(numbers, len(numbers) // (12 if dense else 60)) + list(range(0x3100 if dense else 0x800))
    texts = [
        "".join(f"a{c} {c}{c}1{c} .{c}\n{c}b" for c in map(chr, numbers[start : start + 100]))
        for start in range(0, len(numbers), 100)
    ]
    for other in fast:
        assert_equal(reference, other, texts)


def test_no_ascii_pair_or_triple_is_cut_otherwise(made):
    """Every pair of ASCII characters, in front of and behind a letter, digit, space and punctuation."""
    characters = [chr(number) for number in range(128)]
    texts = [a + b + c for a in characters for b in characters for c in " \na'"]
    for pattern in PATTERNS:
        reference, fast = made[pattern, False]
        sample = texts if pattern == "qwen2" else texts[::11]
        for other in fast:
            assert_equal(reference, other, ["".join(sample[start : start + 64]) for start in range(0, len(sample), 64)])


def test_a_long_corpus(made, monkeypatch):
    """Past the borders: a table that is emptied, a tokenizer that is loaded anew."""
    monkeypatch.setattr(giga, "_LOOK_EVERY_CHARACTERS", 300)
    monkeypatch.setattr(giga, "_BEGIN_AGAIN_BYTES", -(1 << 40))
    monkeypatch.setattr(words, "_MOST_WORDS", 50)
    drawn = random.Random(1)
    reference, fast = made["qwen2", True]
    loads = []
    load = giga.Gigatoken._load
    monkeypatch.setattr(giga.Gigatoken, "_load", lambda self: (loads.append(1), load(self))[1])
    for _ in range(12):
        texts = ["".join(drawn.choices(HOSTILE, k=drawn.randrange(60))) for _ in range(20)] + ["", *CORPUS]
        for other in fast:
            assert_equal(reference, other, texts)
    assert len(loads) > 3 and len(fast[1]._encoder._table) < 1000
    assert not any(len(word) > 64 for word in fast[1]._encoder._table)


def test_slices_hold_every_text_once():
    texts = ["x" * size for size in (0, 1, 1 << 20, 5, 3 << 20, 0, 7)] + [""] * 2500
    found = [list(part) for part in slices(texts)]
    assert [text for part in found for text in part] == texts and all(found)
    assert max(map(len, found)) <= 1000 and not list(slices([]))


def change(folder: Path, **values) -> Path:
    content = json.loads((folder / "tokenizer.json").read_text())
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(content[key], dict):
            content[key] |= value
        else:
            content[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


REFUSED = {
    "its normalizer is NFKC": {"normalizer": {"type": "NFKC"}},
    "its normalizer is Lowercase": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
    "its pre-tokenizer is absent": {"pre_tokenizer": None},
    "its pre-tokenizer is Whitespace": {"pre_tokenizer": {"type": "Whitespace"}},
    "adds a space": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    "has a step Digits": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        }
    },
    "dropout=0.1": {"model": {"dropout": 0.1}},
    "splits with 'a+'|Unknown pre_tokenizer": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        }
    },
    r"its token '\u212a' may appear after NFC": {
        "added_tokens": [
            {"id": 900, "content": "<eos>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
            {"id": 901, "content": "\u212a", "special": False, "normalized": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
        ]
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_kinds_go_to_the_reference_and_the_log_says_why(tmp_path, caplog, reason):
    folder = change(saved(byte_level("qwen2"), tmp_path), **REFUSED[reason])
    with caplog.at_level("INFO", logger="unimega"):
        tokenizer = TextTokenizer(folder, backend="auto")
    assert tokenizer.backend == "hf" and len(tokenizer.reasons) == 2
    wanted = reason.encode("ascii").decode("unicode_escape") if "u212a" in reason else reason
    assert any(part in said for part in wanted.split("|") for said in tokenizer.reasons), tokenizer.reasons
    assert tokenizer.reasons[0] in caplog.text
    assert tokenizer.encode(["a b"])[0].tolist() == TextTokenizer(folder).encode(["a b"])[0].tolist()
    for name in FAST:
        with pytest.raises(ConfigError, match=f"backend='{name}' cannot run"):
            TextTokenizer(folder, backend=name)


def test_auto_takes_the_fastest_that_is_installed(tmp_path, monkeypatch):
    folder = saved(byte_level("qwen2"), tmp_path)
    assert TextTokenizer(folder, backend="auto").backend == "gigatoken"
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = TextTokenizer(folder, backend="auto")
    assert tokenizer.backend == "word-cache" and "unimega[fast]" in tokenizer.reasons[0]
    with pytest.raises(ConfigError, match=r"pip install 'unimega\[fast\]'"):
        TextTokenizer(folder, backend="gigatoken")
    with pytest.raises(ConfigError, match="backend='quick' is unknown"):
        TextTokenizer(folder, backend="quick")


def test_a_way_that_differs_is_not_taken(tmp_path, monkeypatch):
    folder = saved(byte_level("gpt2"), tmp_path)
    monkeypatch.setattr(words, "for_ascii", lambda pattern: ".")
    with pytest.raises(ConfigError, match="differ from the reference's"):
        TextTokenizer(folder, backend="word-cache")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert TextTokenizer(folder, backend="auto").backend == "hf"


def test_a_difference_in_the_middle_of_a_corpus_stops_it(tmp_path, monkeypatch):
    tokenizer = TextTokenizer(saved(byte_level("gpt2"), tmp_path), backend="word-cache")
    right = tokenizer._encoder.encode_batch

    def wrong(texts):
        ids, lengths = right(texts)
        return Encoded(np.roll(ids, 1), lengths)

    tokenizer.encode_batch(["warm"] * 1999)
    monkeypatch.setattr(tokenizer._encoder, "encode_batch", wrong)
    with pytest.raises(DataError, match=r"word-cache and hf disagree on a text: .* around id 0. Use backend 'ref"):
        tokenizer.encode_batch(["not this", "the quick brown fox", "fox"])


@pytest.mark.parametrize("name", ["reference", *FAST])
def test_what_is_not_text_is_one_line(tmp_path, name):
    tokenizer = TextTokenizer(saved(byte_level("gpt2"), tmp_path), backend=name)
    with pytest.raises(DataError, match="text 1 of the batch is not Unicode: half of a surrogate pair at character 2"):
        tokenizer.encode_batch(["a", "b \ud800 c"])
    with pytest.raises(DataError, match="text 0 of the batch is not a string but int"):
        tokenizer.encode_batch([3])
    ids, lengths = tokenizer.encode_batch([])
    assert len(ids) == len(lengths) == 0 and tokenizer.encode([]) == []
    assert [len(found) for found in tokenizer.encode(["", "a", ""])] == [0, 1, 0]


def test_the_tokens_of_python_and_the_libraries_may_differ_in_age():
    """The texts that go slowly are those with characters that one of them may not know."""
    slow = forms.byte_level(json.loads(byte_level("qwen2").to_str())).must_go_slowly()
    assert not any(map(slow, ["plain", "caf\u00e9 \u4e2d\u6587 \U0001f600", "\U00020000"]))
    assert all(map(slow, ["\u0378", "\U00016d67", "\U0002ebf0", "cafe\u0301", "\u212a", "a <tool_call> b"]))
