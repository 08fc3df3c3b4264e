"""tools/inspect_data.py: what it prints, in colour and without, for machines, and for files that are damaged."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import tools.inspect_data as tool
from tests.unit.data_corpora import BOI, EOI, EOS, FIRST_WORD, TEXT, UNCONDITIONAL, VOCABULARY, facts, pair, write
from tests.unit.test_data_preprocess import make_tokenizer
from unimega.data import format as layout
from unimega.data import plan, samples
from unimega.data.corpus import Source
from unimega.data.tokenize import TextTokenizer
from unimega.errors import DataError, run_cli

ROWS = [
    [("text", "a red bus\nthe \x1b[31mred car")],
    [("caption", "a red bus"), ("image", [3, 0, 31, 7])],
    [("image", [1, 2, 3, 4]), ("question", "what?"), ("answer", "a bus")],
    [("text", "the "), ("image", [9] * 6), ("text", "bus")],
]
MODES = {
    "text": layout.MODE_TEXT,
    "caption": layout.MODE_CAPTION,
    "image": layout.MODE_IMAGE,
    "question": layout.MODE_QUESTION,
    "answer": layout.MODE_ANSWER,
}


@pytest.fixture
def corpus(tmp_path):
    """A corpus with its tokenizer beside it; the image of the conversation is context."""
    tokenizer = TextTokenizer(make_tokenizer(tmp_path / "tokenizer"))
    documents = [
        [(MODES[kind], value if kind == "image" else tokenizer.encode([value])[0].tolist()) for kind, value in row]
        for row in ROWS
    ]
    documents[2][0] = (layout.MODE_IMAGE | layout.CONTEXT_BIT, documents[2][0][1])
    return write(tmp_path / "rows", documents, **described(tmp_path, tokenizer))


def described(folder, tokenizer):
    sources = [
        {"path": "a.jsonl", "first_document": 0, "direction": "both"},
        {"path": "a.jsonl", "first_document": 1, "direction": "t2i"},
        {"path": "b.jsonl", "first_document": 3, "direction": "both"},
    ]
    size = tokenizer.size
    vocabulary = {"text": size, "codebook": 32, "codes_per_image": None, "grid": None}
    return {"tokenizer": tokenizer.describe(beside=folder / "rows"), "vocabulary": vocabulary, "sources": sources}


def run(capsys, *words):
    """Exit status, output, errors."""
    status = 0
    try:
        run_cli(tool.main, list(words))
    except SystemExit as ended:
        status = ended.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_stats(corpus, capsys):
    status, out, err = run(capsys, "stats", corpus, "--entropy", "2")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[4][:2] == ["vision", "14"] and lines[4][-2:] == ["3", "3"]
    assert ["a.jsonl", "3"] in [line[:2] for line in lines] and ["b.jsonl", "1"] in [line[:2] for line in lines]
    assert [line[1] for line in lines if line[:1] == ["vision"] and len(line) == 7] == ["1", "2"]
    values = json.loads(run(capsys, "stats", corpus, corpus, "--json", "--entropy", "1")[1])
    assert values["tokens"]["vision"] == 28 and values["documents"]["number"] == 8
    assert [entry["n"] for entry in values["entropy"]] == [1, 1]
    counts = np.unique(np.asarray([3, 0, 31, 7, 1, 2, 3, 4] + [9] * 6), return_counts=True)[1]
    assert values["entropy"][1]["bits"] == pytest.approx(-(counts / 14 * np.log2(counts / 14)).sum())


def test_show_as_stored(corpus, capsys):
    status, out, err = run(capsys, "show", corpus, "0", "2", "-1")
    assert (status, err) == (0, "") and "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    assert r"a red bus\nthe \x1b[31mred car" in out
    assert lines[0][:4] == ["document", "0", "of", corpus] and "(b.jsonl, its document 0)" in out
    assert "(a.jsonl, its document 2)" in out
    assert lines[3] == ["body/context", "vision", "-", "4", "codes", "1", "2", "3", "4"]
    assert lines[4][:3] == ["question/context", "text", "-"] and lines[4][-1] == "what?"
    assert lines[5][:3] == ["answer", "text", "loss"] and lines[5][-2:] == ["a", "bus"]
    _, told, _ = run(capsys, "show", corpus, "2", "--mask-instructions", "false")
    assert " - " not in told
    assert "..." not in out and "codes)" not in out
    assert len(run(capsys, "show", corpus)[1].split("document ")) >= 4


def test_long_runs_are_cut_unless_all_is_asked_for(tmp_path, capsys):
    prefix = write(tmp_path / "a", [[(1, list(range(32)) * 32)]])
    _, out, _ = run(capsys, "show", prefix)
    shown = out.splitlines()[1].split("codes", 1)[1].split("...")
    assert shown[1] == f" ({1024 - len(shown[0].split())} codes more)"
    _, out, _ = run(capsys, "show", prefix, "--full")
    assert len(out.splitlines()[1].split("codes", 1)[1].split()) == 1024


def test_show_as_the_model_sees_it(corpus, capsys):
    words = ("--assembled", "--templates", "none")
    _, out, _ = run(capsys, "show", corpus, "1", *words, "--unconditional-ratio", "0")
    rows = [line.split() for line in out.splitlines()]
    assert "text to image, epoch 0" in out
    assert [row[:3] for row in rows[1:]] == [
        ["stored", "text", "-"],
        ["added", "vision", "-"],
        ["stored", "vision", "loss"],
        ["added", "text", "loss"],
        ["added", "text", "loss"],
    ]
    assert rows[2][-1] == "<|vision_start|>" and rows[4][-1] == "<|vision_end|>" and rows[5][-1] == "<|endoftext|>"
    _, out, _ = run(capsys, "show", corpus, "1", *words, "--unconditional-ratio", "1")
    assert "image without its caption" in out and "<unconditional>" in out
    _, out, _ = run(capsys, "show", corpus, "1", "--assembled", "--unconditional-ratio", "0", "--json")
    sample = json.loads(out)
    prompt = sample["runs"][1]
    assert prompt["label"] == "added" and prompt["text"][:1].isspace() and not prompt["loss"]


def test_what_is_shown_is_what_a_run_gets(tmp_path):
    """Token by token and target by target the pack that the plan of a run builds."""
    words = [FIRST_WORD, FIRST_WORD + 1]
    documents = [
        pair(words, [3, 0, 31, 7]),
        [(0, words * 3)],
        [(9, [1, 2]), (layout.MODE_QUESTION, words), (layout.MODE_ANSWER, words), (layout.MODE_ANSWER, words)],
    ]
    prefix = write(tmp_path / "a", documents)
    for epoch_seed in range(4):
        recipe = plan.Recipe(
            pack_length=64, templates="none", window_tokens=256, seed=epoch_seed, unconditional_ratio=0.3
        )
        run_plan = plan.DataPlan([Source(path=prefix)], VOCABULARY, recipe)
        shown = {}
        for epoch in range(12):
            seen = samples.AsSeen(
                prefix,
                None,
                samples.Recipe(seed=epoch_seed, epoch=epoch, templates="none", unconditional_ratio=0.3),
            )
            for number in range(len(documents)):
                tokens, mask = [], []
                for one in seen.sample(number).runs:
                    is_code = one.label == "stored" and one.modality == "vision"
                    tokens += [value + TEXT * is_code for value in one.ids]
                    mask += [one.is_target] * len(one.ids)
                shown[tuple(tokens), tuple(mask)] = number
        pack = run_plan.pack(0)
        for document in range(1, int(pack.document.max()) + 1):
            places = np.flatnonzero(pack.document == document)
            mask = [False, *pack.mask[places][:-1].tolist()]
            assert (tuple(pack.tokens[places].tolist()), tuple(mask)) in shown
        assert len(shown) == 5  # the pair as text to image, without its caption, and as image to text; the others
    assert {EOS, BOI, EOI, UNCONDITIONAL} <= {token for tokens, _ in shown for token in tokens}


def test_rows_of_an_image_are_separated(tmp_path):
    special = facts()["tokenizer"]["special"] | {"vision_pad": 0}
    prefix = write(tmp_path / "a", [[(1, [7, 8, 9, 10, 11])]], tokenizer=facts()["tokenizer"] | {"special": special})
    seen = samples.AsSeen(prefix, None, samples.Recipe(templates="none", row_separator=2))
    assert [one.ids for one in seen.sample(0).runs] == [(BOI,), (7, 8), (0,), (9, 10), (0,), (11,), (EOI,), (EOS,)]


def test_images_are_drawn_from_their_codes(tmp_path, capsys):
    centres = np.random.default_rng(0).random((32, 4), dtype=np.float32)
    np.savez(tmp_path / "book.npz", centres=centres)
    prefix = write(tmp_path / "a", [[(0, [7])], pair([6], list(range(16))), pair([6], [1, 2])])
    kind, folder = f"digits:{tmp_path / 'book.npz'}", str(tmp_path / "new" / "pictures")
    assert run(capsys, "show", prefix, "0", "1", "--draw", kind, folder)[0] == 0
    (picture,) = Path(folder).iterdir()
    drawn = np.asarray(Image.open(picture))
    assert picture.name == "1-0.png" and drawn.shape == (8, 8, 3)
    assert np.array_equal(drawn[:2, 2:4, 0].ravel(), np.rint(centres[1] * 255))
    for words, line in (
        (("2", "--draw", kind, folder), "document 2: an image of 2 codes"),
        (("1", "--draw", "digits:none", folder), "none: no npz with centres"),
        (("1", "--draw", "vq:none", folder), "image tokenizer 'vq' is not known"),
        (("1", "--draw", kind, str(tmp_path / "a.idx" / "x")), "1-0.png: cannot be written"),
    ):
        status, _, err = run(capsys, "show", prefix, *words)
        assert status == 2 and line in err and err.count("\n") == 1
    np.savez(tmp_path / "book.npz", centres=centres[:31])
    assert "this is one of 31" in run(capsys, "show", prefix, "1", "--draw", kind, folder)[2]


def test_random_documents_follow_from_the_seed(corpus, capsys):
    first = run(capsys, "show", corpus, "--random", "3", "--seed", "5")
    assert first == run(capsys, "show", corpus, "--random", "3", "--seed", "5")
    others = {run(capsys, "show", corpus, "--random", "3", "--seed", str(seed))[1] for seed in range(6)}
    assert len(others) > 1
    assert run(capsys, "show", corpus, "--random", "99")[1].count("as stored") == len(ROWS)


def test_colours_only_where_they_belong(corpus, capsys, monkeypatch):
    def coloured(*words):
        return "\x1b[" in run(capsys, "show", corpus, "1", *words)[1]

    assert not coloured() and coloured("--color", "always")
    for name, value, expected in (("NO_COLOR", "", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "")
        monkeypatch.setenv(name, value)
        with monkeypatch.context() as patch:
            patch.setattr(tool.sys, "stdout", SimpleNamespace(isatty=lambda: True))
            found = [tool._is_coloured(choice) for choice in ("auto", "always", "never")]
        assert found == [expected, True, False]


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_plot(corpus, tmp_path, capsys, suffix):
    path = tmp_path / f"chart{suffix}"
    status, out, err = run(capsys, "plot", corpus, "--output", str(path), "--title", "a $ <b>")
    assert (status, out.strip(), err) == (0, str(path), "")
    start = {".png": b"\x89PNG", ".html": b"<!doctype html>"}[suffix]
    data = path.read_bytes()
    assert data.startswith(start) and len(data) > 5000
    assert suffix != ".html" or (b"a $ &lt;b&gt;" in data and b"src='data:image/png;base64,iVBOR" in data)
    assert not list(tmp_path.glob(".*partial*"))


def test_verify(corpus, capsys):
    status, out, err = run(capsys, "verify", corpus + ".idx", corpus)
    assert (status, err) == (0, "")
    assert out.count("whole. 4 documents") == 2 and "checksums and ids checked" in out
    assert json.loads(run(capsys, "verify", corpus, "--json")[1])[0]["problems"] == []


def test_verify_lists_what_is_wrong_with_each_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK_BYTES", 64)
    prefix = write(tmp_path / "a", [[(0, [7] * 40)], pair([6], [3, 4]), [(0, [8] * 9)]])
    good = write(tmp_path / "good", [[(0, [7])]])
    raw = bytearray(Path(prefix + ".bin").read_bytes())
    raw[4:8], raw[164:168] = struct.pack("<i", TEXT), struct.pack("<i", 32)
    raw[200] ^= 1
    Path(prefix + ".bin").write_bytes(raw)
    status, out, err = run(capsys, "verify", prefix, good)
    lines = err.splitlines()
    assert status == 2 and out.startswith(f"{good}: whole") and out.count("\n") == 1
    assert len(lines) == 5 and all(line.startswith(f"unimega: {prefix}.bin: ") for line in lines)
    assert [line.split("block ")[1][0] for line in lines[:3]] == ["0", "2", "3"]
    assert "id 22 at place 1 of sequence 0 (document 0, text) is outside the vocabulary of 22" in lines[3]
    assert "id 32 at place 0 of sequence 2 (document 1, vision) is outside the codebook of 32" in lines[4]
    listed = run(capsys, "verify", prefix, good, "--json")
    assert listed[0] == 2 and [len(verdict["problems"]) for verdict in json.loads(listed[1])] == [5, 0]


def test_verify_compares_counts(tmp_path, capsys):
    prefix = write(tmp_path / "a", [[(0, [7] * 4)], pair([6], [3, 4])])
    path = Path(prefix + ".json")
    values = json.loads(path.read_text())
    values["counts"]["images"] = 2
    values["counts"]["tokens"]["text"] = 9
    path.write_text(json.dumps(values))
    _, _, err = run(capsys, "verify", prefix)
    assert "1 images, but a.json says 2" in err and "5 text tokens, but a.json says 9" in err


def test_text_of_megatron(tmp_path, capsys):
    """No sidecar: ids are checked against the tokenizer that is named, and decoded with it."""
    folder = make_tokenizer(tmp_path / "tokenizer")
    tokenizer = TextTokenizer(folder)
    ids = tokenizer.encode(["the red car"])[0]
    prefix = str(tmp_path / "m")
    ids.astype("<u2").tofile(prefix + ".bin")
    index = layout.MAGIC + layout.HEADER.pack(1, 8, 1, 2) + struct.pack("<iqqq", len(ids), 0, 0, 1)
    Path(prefix + ".idx").write_bytes(index)
    assert "no checksums" in run(capsys, "verify", prefix, "--tokenizer", str(folder))[1]
    assert str(ids[0]) in run(capsys, "show", prefix)[2] + run(capsys, "show", prefix, "--json")[1]
    assert "the red car" in run(capsys, "show", prefix, "--tokenizer", str(folder))[1]
    assert "the red car" not in run(capsys, "show", prefix)[1]
    assembled = run(capsys, "show", prefix, "--tokenizer", str(folder), "--assembled")
    assert "<|endoftext|>" in assembled[1]
    status, _, err = run(capsys, "show", prefix, "--assembled", "--templates", "none")
    assert status == 2 and "no sidecar names eos. Name the tokenizer's folder" in err
    Path(prefix + ".idx").write_bytes(index + b"\0")
    status, _, err = run(capsys, "show", prefix, "--tokenizer", str(folder))
    assert status == 2 and "has modes. Copy it too. If it is text that Megatron-LM wrote, say so" in err
    assert "the red car" in run(capsys, "show", prefix, "--tokenizer", str(folder), "--megatron")[1]
    Path(prefix + ".idx").write_bytes(index + b"\1")
    status, _, err = run(capsys, "stats", prefix, "--megatron")
    assert status == 2 and "mode 0x01 of sequence 0 is not text" in err


def test_another_tokenizer_is_refused(corpus, tmp_path, capsys):
    other = make_tokenizer(tmp_path / "other", specials=["<|endoftext|>", "<x>"])
    status, out, err = run(capsys, "show", corpus, "--tokenizer", str(other))
    assert (status, out) == (2, "") and "Its ids would say something else" in err and err.count("\n") == 1


WRONG = {
    "no document": (("show", "P", "4"), r"document 4 is not in .*rows. It has documents 0 to 3"),
    "no such file": (("stats", "P_"), r"rows_\.idx: not there"),
    "a folder": (("stats", "F"), r"It is a folder; name a corpus in it: .*rows"),
    "format": (("plot", "P", "--output", "a.gif"), r"--output='a\.gif' is wrong. It ends in none of \.png"),
    "no folder": (("plot", "P", "--output", "none/a.png"), r"none/a\.png: cannot be written \(No such file"),
    "templates": (("show", "P", "--assembled", "--templates", "x"), r"data\.templates='x' is wrong"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_get_one_line(corpus, capsys, case):
    words, line = WRONG[case]
    folder = str(Path(corpus).parent)
    status, out, err = run(capsys, *(word.replace("P", corpus) if word[0] == "P" else folder if word == "F" else word
                                     for word in words))  # fmt: skip
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith("unimega: ")
    with pytest.raises(DataError, match=line):
        raise DataError(err)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "required: stats|verify|show|plot"),
        (("stats",), "required: PREFIX"),
        (("show", "a", "--random", "0"), "argument --random"),
        (("stats", "a", "--entropy", "9"), "argument --entropy"),
        (("show", "a", "--full", "x"), "unrecognized arguments: x"),
        (("stats", "a", "--colour", "b"), "unrecognized arguments: --colour"),
    ],
)
def test_wrong_options_are_explained(capsys, words, line):
    status, out, err = run(capsys, *words)
    assert status == 2 and not out and err.count("\n") == 1
    assert err.startswith("unimega: ") and line in err and err.endswith("--help shows every option.\n")


def test_verify_knows_another_tokenizer(corpus, tmp_path, capsys):
    assert run(capsys, "verify", corpus, "--tokenizer", str(tmp_path / "tokenizer"))[0] == 0
    other = make_tokenizer(tmp_path / "other", specials=["<|endoftext|>", "<|x|>"])
    status, out, err = run(capsys, "verify", corpus, "--tokenizer", str(other))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"rows.json: made with tokenizer \w{12}, the one that is named is \w{12}", err)


def test_options_may_stand_anywhere(corpus, capsys):
    assert run(capsys, "show", corpus, "--full", "1", "-1") == run(capsys, "show", corpus, "1", "-1", "--full")
    assert run(capsys, "verify", corpus, "--json", corpus) == run(capsys, "verify", corpus, corpus, "--json")


def test_help_teaches(capsys):
    assert "corpus/rows --random 5 --assembled" in run(capsys, "--help")[1]
    for command in ("stats", "verify", "show", "plot"):
        assert len(run(capsys, command, "--help")[1].splitlines()) > 8


def test_a_reader_that_leaves_early_is_no_error(corpus):
    root = Path(__file__).parents[2]
    command = f"'{sys.executable}' '{root}/tools/inspect_data.py' show '{corpus}' --random 99 --full | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
