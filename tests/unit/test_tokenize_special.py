"""No text yields a special id, whatever a tokenizer's file looks like, and with every library."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.made_tokenizers import CORPUS, SPECIALS, byte_level, saved
from unimega.data.tokenize import TextTokenizer, locate
from unimega.errors import DataError, UnimegaError

SPELLED = [*SPECIALS, "<|im_end|>", "<s>", "</s>", "<pad>", "<unk>", "[PAD]", "<|vision_pad|>"]
TEXTS = st.lists(st.sampled_from([*SPELLED, " ", "<", "|", "a red", "\n", "\U0010ffff", "0"]), max_size=12).map("".join)


def special_ids(tokenizer):
    found = {number for name in SPELLED if (number := tokenizer._reference.token_id(name)) is not None}
    return found | {tokenizer.special.eos, tokenizer.special.pad}


def assert_plain(tokenizer, texts):
    """No special id, and what a text spells is still there."""
    banned = special_ids(tokenizer)
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert not banned & set(ids.tolist()), (tokenizer.backend, text)
        assert not text.strip() or len(ids)


@pytest.mark.parametrize("name", ["reference", "gigatoken", "word-cache"])
@pytest.mark.parametrize("inside", [False, True])
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_byte_level(tmp_path_factory, name, inside, texts):
    key = f"{name}{inside}"
    if key not in _MADE:
        folder = saved(byte_level("qwen2", inside=inside, ignore_merges=inside), tmp_path_factory.mktemp("made"))
        # what transformers does with split_special_tokens=True is the measure
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), split_special_tokens=True)
        _MADE[key] = TextTokenizer(folder, backend=name), theirs
    tokenizer, theirs = _MADE[key]
    assert_plain(tokenizer, texts)
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == expected
    assert tokenizer.special.eos == theirs.convert_tokens_to_ids("<|endoftext|>")


_MADE: dict = {}


def test_a_token_that_was_added_without_the_mark(tmp_path):
    tokenizer = byte_level("qwen2")
    tokenizer.add_tokens(["<|vision_pad|>", "<eos>"])  # special=False, a common slip: the library finds it in text
    folder = saved(tokenizer, tmp_path)
    for name in ("reference", "gigatoken", "word-cache"):
        ours = TextTokenizer(folder, backend=name)
        assert ours.special.vision_pad == tokenizer.token_to_id("<|vision_pad|>")
        assert_plain(ours, ["see <|vision_pad|><eos> here"])
        (called,) = ours.encode(["<tool_call>"])
        assert called.tolist() == [tokenizer.token_to_id("<tool_call>")]


def test_a_token_that_merges_build(tmp_path):
    """A trainer that sees the token's text builds it by merges, to the very id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["<eos>"] * 50 + ["a red bus <eos>"] * 5, trainer)
    assert tokenizer.token_to_id("<eos>") == 0
    tokenizer.encode_special_tokens = True
    assert 0 in tokenizer.encode("<eos>").ids, "the library's own switch does not help here"
    folder = saved(tokenizer, tmp_path)
    assert_plain(TextTokenizer(folder), ["<eos>", "a red bus <eos>", "<pad>"])
    assert TextTokenizer(folder).special.eos == 0


def test_an_ordinary_word_is_no_special_token(tmp_path):
    """``<pad>`` learned from text and never added is a word like others: not the pad, and text keeps it."""
    tokenizer = byte_level("gpt2")
    tokenizer.train_from_iterator(
        ["<pad>"] * 50,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    content = json.loads(tokenizer.to_str())
    merges = [["<", "p"], ["a", "d"], ["<p", "ad"], ["<pad", ">"]]
    base = {name: number for name, number in content["model"]["vocab"].items() if len(name) == 1}
    number = len(base)
    for left, right in merges:
        base[left + right] = number
        number += 1
    content["model"] |= {"vocab": base, "merges": merges}
    content["pre_tokenizer"] |= {"use_regex": False}
    content["added_tokens"] = [
        {"id": number, "content": "<eos>", "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = TextTokenizer(tmp_path)
    assert ours.special.pad == ours.special.eos == number
    assert ours.encode(["<pad>"])[0].tolist() == [base["<pad>"]]


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram", "WordPiece"])
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_vocabularies_that_hold_the_token_as_a_word(tmp_path_factory, kind, texts):
    if kind not in _MADE:
        words = ["<unk>", "</s>", "<pad>", "<|vision_start|>", "a", "red", "<", "|", ">", "s", "/", "pad"]
        made = {
            "WordLevel": lambda: models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"),
            "WordPiece": lambda: models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="<unk>"),
            "Unigram": lambda: models.Unigram([(word, -float(n > 3)) for n, word in enumerate(words)], 0, False),
        }
        tokenizer = Tokenizer(made[kind]())
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
        tokenizer.encode_special_tokens = True
        assert 1 in tokenizer.encode("a </s>").ids, "the library's own switch does not help here"
        folder = saved(tokenizer, tmp_path_factory.mktemp("words"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}')
        _MADE[kind] = TextTokenizer(folder)
    tokenizer = _MADE[kind]
    assert tokenizer.size == 12 and tokenizer.special.eos == 1 and tokenizer.special.vision_start == 3
    assert_plain(tokenizer, [*texts, "a </s> red <pad>", "<|vision_start|>", "\U0010ffff0\U0010ffff"])
    assert tokenizer.encode(["zzz"])[0].tolist() == [0], "unknown words still are the unknown token"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A BPE model with byte fallback, its markers user-defined, and a unigram one without."""
    folder, drawn = tmp_path_factory.mktemp("pieces"), random.Random(0)
    lines = [" ".join(drawn.choices(" ".join(CORPUS).split(), k=12)) for _ in range(200)]
    for kind, options in {
        "bpe": {"byte_fallback": True, "user_defined_symbols": [*SPECIALS, "\n", "<tab>"]},
        "unigram": {"control_symbols": SPECIALS, "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    }.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=kind,
            vocab_size=420 if kind == "bpe" else 110,
            hard_vocab_limit=False,
            character_coverage=0.98,
            minloglevel=2,
            **options,
        )
        (folder / f"{kind}.model").write_bytes(written.getvalue())
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXTS | st.text(max_size=20), min_size=1, max_size=4))
def test_sentencepiece(pieces, kind, texts):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    tokenizer = TextTokenizer(pieces / f"{kind}.model")
    banned = special_ids(tokenizer)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces / f"{kind}.model"))
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert ids.dtype == np.int32 and not banned & set(ids.tolist())
        if "<|" not in text and "<unconditional>" not in text:
            assert ids.tolist() == theirs.encode(text)


def test_sentencepiece_facts(pieces, tmp_path):
    tokenizer = TextTokenizer(pieces / "bpe.model", backend="auto")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "bpe.model"))
    assert tokenizer.backend == "sentencepiece" and tokenizer.reasons[0].endswith("it is a sentencepiece model")
    assert tokenizer.special.eos == theirs.eos_id() and tokenizer.size == theirs.get_piece_size()
    assert tokenizer.special.vision_start == theirs.piece_to_id("<|vision_start|>")
    described = tokenizer.describe(beside=pieces / "corpus")
    assert described["kind"] == "sentencepiece" and described["path"] == described["name"] == "bpe.model"
    # what the vocabulary lacks becomes its bytes; spaces are one, and one is in front
    lacks = tokenizer.encode(["\u16a0"])[0].tolist()
    assert [theirs.id_to_piece(number) for number in lacks] == ["\u2581", "<0xE1>", "<0x9A>", "<0xA0>"]
    assert tokenizer.encode(["the  fox "])[0].tolist() == tokenizer.encode(["the fox"])[0].tolist()
    assert theirs.id_to_piece(int(tokenizer.encode(["the"])[0][0])).startswith("\u2581")
    assert tokenizer.encode(["<tab>"])[0].tolist()[-1] == theirs.piece_to_id("<tab>"), "other user-defined pieces stay"
    # a model that keeps spaces keeps them, and one without bytes has an unknown piece
    other = TextTokenizer(pieces / "unigram.model")
    assert len(other.encode(["a  a"])[0]) > len(other.encode(["a a"])[0])
    assert other.encode(["\u16a0"])[0].tolist() == [0]
    (tmp_path / "tokenizer.model").write_bytes((pieces / "bpe.model").read_bytes())
    assert TextTokenizer(tmp_path).sha256 == tokenizer.sha256 != other.sha256
    assert locate(tmp_path) == tmp_path / "tokenizer.model" and locate(tmp_path / "none") is None
    with pytest.raises(DataError, match="text 0 of the batch is not Unicode"):
        tokenizer.encode_batch(["\udfff"])
    assert [len(ids) for ids in tokenizer.encode(["", "a"])] == [0, 1 + (tokenizer.encode(["a"])[0].size - 1)]


def test_sentencepiece_errors(tmp_path, monkeypatch, pieces):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"x\.model: not a sentencepiece model"):
        TextTokenizer(tmp_path / "x.model")
    with pytest.raises(DataError, match=r"There is no tokenizer\.json and no sentencepiece model"):
        TextTokenizer(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UnimegaError, match=r"pip install 'unimega\[sentencepiece\]'"):
        TextTokenizer(pieces / "bpe.model")


def test_the_fingerprint_is_of_what_decides_ids(tmp_path):
    """Fixed bytes, fixed print: on every machine, in every order of keys, padded or not."""
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": 2, "content": "<eos>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
        "model": {"type": "WordLevel", "vocab": {"caf\u00e9": 0, "<unk>": 1}, "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    first = TextTokenizer(tmp_path).sha256
    assert first == "0bc84284dc9977c8c3d5a880605bd4034edaabda3123fb156e3932c2569bb7e3"
    path.write_text(json.dumps({"padding": None} | dict(reversed(content.items())), ensure_ascii=False, indent=1))
    assert TextTokenizer(path).sha256 == first
    content["model"]["vocab"] = {"caf\u00e9": 1, "<unk>": 0}
    path.write_text(json.dumps(content))
    assert TextTokenizer(tmp_path).sha256 != first
