"""Damaged files of a corpus: one line each and status 2, from the tools and on a run's way to its first pack."""

import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tools.inspect_data as tool
from tests.unit.data_corpora import BOI, facts, write
from tests.unit.test_data_format import BIN, EXAMPLE, IDX
from tests.unit.test_data_preprocess import make_tokenizer
from unimega.config.vocabulary import Vocabulary
from unimega.data import format as layout
from unimega.data.corpus import Source, vision_ids
from unimega.data.plan import DataPlan, Recipe
from unimega.data.reader import IndexedCorpus
from unimega.data.tokenize import TextTokenizer
from unimega.errors import DataError, run_cli

TEXT, CODEBOOK = 70_001, 8192
FACTS = {
    "tokenizer": facts()["tokenizer"] | {"size": TEXT},
    "vocabulary": facts()["vocabulary"] | {"text": TEXT, "codebook": CODEBOOK},
}
VOCABULARY = Vocabulary(
    names=("text", "vision"), starts=(0, TEXT), codes=(TEXT, CODEBOOK), rows=TEXT + CODEBOOK, ids=((), (BOI,))
)


def ended(capsys, main, *words):
    """Exit status, output and lines of stderr of a command."""
    status = 0
    try:
        run_cli(main, list(words))
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()


def first_pack(words):
    """What a run does with its corpora before and for its first step."""
    prefix, *megatron = words
    recipe = Recipe(pack_length=32, templates="none", window_tokens=64, unconditional_ratio=0)
    DataPlan([Source(path=prefix, megatron=bool(megatron))], VOCABULARY, recipe).pack(0)


def _open(prefix):
    IndexedCorpus(prefix).check()


def _poke(path, at, data):
    raw = bytearray(Path(path).read_bytes())
    raw[at : at + len(data)] = data
    Path(path).write_bytes(raw)


def _sidecar(prefix, change):
    path = Path(prefix + ".json")
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _folder(path):
    Path(path).unlink()
    Path(path).mkdir()


def _loop(path):
    Path(path).unlink()
    Path(path).symlink_to(Path(path).name)


HOSTILE = {
    "idx missing": (lambda p: Path(p + ".idx").unlink(), r"a\.idx: not there. Preprocessing was not finished"),
    "bin missing": (lambda p: Path(p + ".bin").unlink(), r"a\.bin: not there, but a\.idx is"),
    "idx empty": (lambda p: Path(p + ".idx").write_bytes(b""), r"a\.idx: magic \(0 bytes\) is not MMIDIDX"),
    "idx cut": (
        lambda p: Path(p + ".idx").write_bytes(IDX[:96]),
        r"96 bytes, but its header \(S=3, D=3\) needs 94 or 97",
    ),
    "idx cut in the header": (lambda p: Path(p + ".idx").write_bytes(IDX[:20]), r"20 bytes, a header alone has 34"),
    "trailing": (
        lambda p: Path(p + ".idx").write_bytes(IDX + bytes(4)),
        r"101 bytes, but its header \(S=3, D=3\) needs 94 or 97",
    ),
    "cut by S bytes": (
        lambda p: Path(p + ".idx").write_bytes(IDX[:-3]),
        r"94 bytes, no modes, but a\.json is there: 97 are needed",
    ),
    "magic": (lambda p: _poke(p + ".idx", 0, b"\0"), r"a\.idx: magic 00 4d 49 44 is not MMIDIDX: not an index file"),
    "version": (lambda p: _poke(p + ".idx", 9, b"\2"), r"version 2, this reader knows 1"),
    "dtype": (lambda p: _poke(p + ".idx", 17, b"\7"), r"dtype code 7 is not an integer type"),
    "S of 2^60": (lambda p: _poke(p + ".idx", 18, struct.pack("<Q", 2**60)), r"header \(S=1152921504606846976, D=3\)"),
    "D of 2^60": (lambda p: _poke(p + ".idx", 26, struct.pack("<Q", 2**60)), r"D=1152921504606846976\)"),
    "D of 0": (lambda p: _poke(p + ".idx", 26, struct.pack("<Q", 0)), r"document index of 0 entries"),
    "length below 0": (lambda p: _poke(p + ".idx", 34, struct.pack("<i", -1)), r"length of sequence 0 is -1, below 0"),
    "bin cut": (
        lambda p: Path(p + ".bin").write_bytes(BIN[:20]),
        r"a\.bin: 20 bytes, but sequence 2 ends at byte 24. Copy interrupted",
    ),
    "bin empty": (lambda p: Path(p + ".bin").write_bytes(b""), r"a\.bin: 0 bytes, but sequence 2 ends at byte 24"),
    "bin longer": (lambda p: Path(p + ".bin").write_bytes(BIN + bytes(4)), r"a\.bin: 28 bytes, but a\.json says 24"),
    "pointer past the end": (lambda p: _poke(p + ".idx", 54, struct.pack("<q", 400)), r"sequence 1 ends at byte 412"),
    "pointer negative": (lambda p: _poke(p + ".idx", 54, struct.pack("<q", -4)), r"sequence 1 starts at byte -4"),
    "pointer odd": (
        lambda p: _poke(p + ".idx", 54, struct.pack("<q", 7)),
        r"sequence 1 starts at byte 7, not a multiple of 4",
    ),
    "documents falling": (
        lambda p: _poke(p + ".idx", 78, struct.pack("<q", 9)),
        r"document 1 starts at sequence 9, the next at 3",
    ),
    "documents not from 0": (
        lambda p: _poke(p + ".idx", 70, b"\1"),
        r"documents run from sequence 1 to 3, not from 0 to 3",
    ),
    "reserved mode bits": (lambda p: _poke(p + ".idx", 94, b"\x50"), r"mode 0x50 of sequence 0 has reserved bits set"),
    "changed within the rules": (
        lambda p: _poke(p + ".idx", 94, b"\x20"),
        r"a\.idx: crc32 is [0-9a-f]{8}, a\.json says",
    ),
    "sidecar missing": (lambda p: Path(p + ".json").unlink(), r"a\.json: not there, but a\.idx has modes. Copy it too"),
    "sidecar not JSON": (lambda p: Path(p + ".json").write_text("{"), r"a\.json: not a sidecar of unimega-data"),
    "sidecar a list": (lambda p: Path(p + ".json").write_text("[]"), r"a\.json: not a sidecar of unimega-data"),
    "sidecar without a key": (
        lambda p: _sidecar(p, lambda v: v["idx"].pop("crc32")),
        r"a\.json: not a sidecar .*idx\.crc32",
    ),
    "sidecar of tomorrow": (lambda p: _sidecar(p, lambda v: v.update(version=2)), r"version 2, this reader knows"),
    "sidecar of another run": (
        lambda p: _sidecar(p, lambda v: v["counts"].update(documents=5)),
        r"2 documents, but a\.json says 5",
    ),
    "idx cut by its modes and documents": (
        lambda p: Path(p + ".idx").write_bytes(IDX[:70]),
        r"70 bytes, but its header \(S=3, D=3\) needs 94 or 97",
    ),
    "length of 2^31 - 1": (
        lambda p: _poke(p + ".idx", 34, struct.pack("<i", 2**31 - 1)),
        r"a\.bin: 24 bytes, but sequence 0 ends at byte 8589934588",
    ),
    "pointer of 2^62": (
        lambda p: _poke(p + ".idx", 46, struct.pack("<q", 2**62)),
        r"a\.bin: 24 bytes, but sequence 0 ends at byte 4611686018427387912",
    ),
    "flipped token bit": (
        lambda p: _poke(p + ".bin", 4, b"\x06"),
        r"a\.bin: crc32 of block 0 \(bytes 0 to 24\) is [0-9a-f]{8}, a\.json says [0-9a-f]{8}",
    ),
    "a folder for idx": (lambda p: _folder(p + ".idx"), r"a\.idx: a folder, not a file of a corpus"),
    "a folder for bin": (lambda p: _folder(p + ".bin"), r"a\.bin: a folder, not a file of a corpus"),
    "a folder for the sidecar": (lambda p: _folder(p + ".json"), r"a\.json: a folder, not a file of a corpus"),
    "a loop of links for idx": (lambda p: _loop(p + ".idx"), r"a\.idx: cannot be opened \(Too many levels of symbolic"),
    "a loop of links for bin": (lambda p: _loop(p + ".bin"), r"a\.bin: cannot be opened \(Too many levels of symbolic"),
    "a loop of links for the sidecar": (lambda p: _loop(p + ".json"), r"a\.json: cannot be opened \(Too many levels"),
    "a pipe": (lambda p: (Path(p + ".bin").unlink(), os.mkfifo(p + ".bin")), r"a\.bin: a device or pipe, not a file"),
    "sidecar empty": (lambda p: Path(p + ".json").write_text(""), r"a\.json: not a sidecar of unimega-data \(not JSON"),
    "sidecar deep": (lambda p: Path(p + ".json").write_text("[" * 100_000), r"a\.json: not a sidecar .*not JSON"),
    "sidecar of bytes": (lambda p: Path(p + ".json").write_bytes(b"\xff\xfe{"), r"a\.json: not a sidecar .*not JSON"),
    "sidecar with a text for a number": (
        lambda p: _sidecar(p, lambda v: v["bin"].update(bytes="24")),
        r"a\.json: not a sidecar .*bin\.bytes='24' is not a whole number",
    ),
    "sidecar without sums": (
        lambda p: _sidecar(p, lambda v: v["bin"].update(crc32=[])),
        r"a\.json: not a sidecar .*bin\.crc32 does not hold 1 sums of blocks of 67108864 bytes",
    ),
    "sidecar with blocks of 0": (
        lambda p: _sidecar(p, lambda v: v["bin"].update(block_bytes=0)),
        r"a\.json: not a sidecar .*bin\.crc32 does not hold",
    ),
    "sidecar with sources out of order": (
        lambda p: _sidecar(p, lambda v: v["sources"].append({"path": "b", "first_document": -1})),
        r"a\.json: not a sidecar .*sources\[1\] has path='b', first=-1",
    ),
    "sidecar with a number for the tokens": (
        lambda p: _sidecar(p, lambda v: v["counts"].update(tokens=5)),
        r"a\.json: not a sidecar .*counts\.tokens=5 is not a table of whole numbers",
    ),
    "sidecar with a text for an id": (
        lambda p: _sidecar(p, lambda v: v["tokenizer"]["special"].update(eos="x")),
        r"a\.json: not a sidecar .*tokenizer\.special\.eos='x' is no id",
    ),
    "sidecar with a number for the tokenizer's path": (
        lambda p: _sidecar(p, lambda v: v["tokenizer"].update(path=7)),
        r"a\.json: not a sidecar .*tokenizer\.path=7 is not a string",
    ),
    "sidecar with a source beyond 64 bits": (
        lambda p: _sidecar(p, lambda v: v["sources"].append({"path": "b", "first_document": 1 << 63})),
        r"a\.json: not a sidecar .*sources\[1\] has path='b', first=9223372036854775808",
    ),
    "sidecar with a text for a source's documents": (
        lambda p: _sidecar(p, lambda v: v["sources"][0].update(documents="x")),
        r"a\.json: not a sidecar .*sources\[0\]\.documents='x' is not a whole number",
    ),
    "sidecar with a direction that is none": (
        lambda p: _sidecar(p, lambda v: v["sources"][0].update(direction="up")),
        r"a\.json: not a sidecar .*direction='up'",
    ),
}


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "a", EXAMPLE, **FACTS)


def test_the_undamaged_corpus_passes(prefix, capsys):
    for words in (("verify", prefix), ("stats", prefix), ("show", prefix)):
        assert ended(capsys, tool.main, *words)[0] == 0
    assert ended(capsys, first_pack, prefix)[0] == 0


@pytest.mark.parametrize("case", HOSTILE)
def test_damage_gets_one_line_from_the_tools_and_from_a_run(case, prefix, capsys):
    damage, line = HOSTILE[case]
    damage(prefix)
    for main, words in (
        (tool.main, ("verify", prefix)),
        (tool.main, ("stats", prefix)),
        (tool.main, ("show", prefix, "--json")),
        (first_pack, (prefix,)),
    ):
        status, out, lines = ended(capsys, main, *words)
        assert (status, out, len(lines)) == (2, "", 1)
        with pytest.raises(DataError, match=line):
            raise DataError(lines[0])


def _rewritten(prefix, documents, **changes):
    write(prefix, documents, **(FACTS | changes))


SOURCES = {
    "the second cut": ([("a", 0, 1)], r"a holds 1 documents from 0 on, but what follows starts at 2"),
    "the first cut": ([("b", 1, 1)], r"b starts at document 1, not at 0"),
    "behind the end": ([("a", 0, 3), ("b", 3, 0)], r"b holds 0 documents from 3 on, but what follows starts at 2"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_do_not_cover_the_corpus(case, prefix, capsys):
    sources, line = SOURCES[case]
    _rewritten(prefix, [[(0, [5])], [(0, [6])]])
    told = [{"path": path, "first_document": first, "documents": number} for path, first, number in sources]
    _sidecar(prefix, lambda v: v.update(sources=told))
    status, _, lines = ended(capsys, tool.main, "verify", prefix)
    assert status == 2
    with pytest.raises(DataError, match=line):
        raise DataError(lines[0])


STRAY = {
    "text id above the vocabulary": ([[(0, [5, TEXT])]], rf"id {TEXT} at place 1 of sequence 0 \(document 0, text\)"),
    "text id below 0": ([[(0, [5])], [(0, [7, 8, -3])]], r"id -3 at place 2 of sequence 1 \(document 1, text\)"),
    "text id of 2^31 - 1": ([[(0, [2**31 - 1])]], r"id 2147483647 at place 0 of sequence 0"),
    "code above the codebook": (
        [[(0, [5])], [(0x10, [5]), (0x01, [3, CODEBOOK])]],
        rf"id {CODEBOOK} at place 1 of sequence 2 \(document 1, vision\) is outside the codebook of {CODEBOOK}",
    ),
    "code below 0": ([[(0x10, [5]), (0x01, [-1, 2])]], r"id -1 at place 0 of sequence 1 \(document 0, vision\)"),
}


@pytest.mark.parametrize("case", STRAY)
def test_an_id_out_of_range_with_sums_that_agree(case, prefix, capsys):
    documents, line = STRAY[case]
    _rewritten(prefix, documents)
    status, out, lines = ended(capsys, tool.main, "verify", prefix)
    assert (status, out, len(lines)) == (2, "", 1)
    with pytest.raises(DataError, match=line):
        raise DataError(lines[0])
    status, out, lines = ended(capsys, first_pack, prefix)
    assert (status, out, len(lines)) == (2, "", 1)
    assert "damaged" in lines[0] or "outside" in lines[0]


def test_a_flipped_bit_of_a_large_file_is_left_to_verify(prefix, capsys, monkeypatch):
    monkeypatch.setattr("unimega.data.reader.CHECKED_BYTES", 23)
    _poke(prefix + ".bin", 4, b"\x06")
    assert ended(capsys, first_pack, prefix)[0] == 0
    assert ended(capsys, tool.main, "verify", prefix)[0] == 2


def test_a_document_of_one_token_is_legal(prefix, capsys):
    for documents in ([[(0, [7])]], [[(0, [])], [(0, [7])]]):
        _rewritten(prefix, documents)
        assert ended(capsys, tool.main, "verify", prefix)[0] == 0
        assert ended(capsys, tool.main, "show", prefix, "0", "--assembled", "--templates", "none")[0] == 0
        assert ended(capsys, first_pack, prefix)[0] == 0


def test_a_corpus_of_no_document(prefix, capsys):
    _rewritten(prefix, [])
    assert ended(capsys, tool.main, "verify", prefix)[0] == 0  # whole, if useless
    for main, words in ((tool.main, ("stats", prefix)), (tool.main, ("show", prefix, "0")), (first_pack, (prefix,))):
        status, _, lines = ended(capsys, main, *words)
        assert status == 2 and len(lines) == 1


def test_a_prefix_that_is_none(prefix, tmp_path, capsys):
    folder = str(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for words, line in (
        ((folder,), rf"prefix='{folder}' is wrong. It is a folder; name a corpus in it: {prefix}\."),
        ((prefix + ".idx",), rf"prefix='{prefix}\.idx' is wrong. Name it without its ending: {prefix}\."),
        ((folder + "/none",), r"none\.idx: not there"),
        ((folder + "/loop/a",), r"loop/a\.idx: cannot be opened \(Too many levels of symbolic links\)"),
        (("a" * 300,), r"a\.idx: cannot be opened \(File name too long\)"),
        (("",), r"prefix='' is wrong. It is a folder; name a corpus in it: none is in it"),
    ):
        status, out, lines = ended(capsys, first_pack, *words)
        assert (status, out, len(lines)) == (2, "", 1)
        with pytest.raises(DataError, match=line):
            raise DataError(lines[0])


def test_two_corpora_with_their_files_swapped(prefix, tmp_path, capsys):
    other = write(tmp_path / "b", [[(0, [5, 6, 7])], [(0, [8, 9, 10])]], **FACTS)
    for ending in (".bin", ".idx", ".json"):
        mixed = str(tmp_path / f"mixed{ending[1:]}")
        for each in (".bin", ".idx", ".json"):
            Path(mixed + each).write_bytes(Path((other if each == ending else prefix) + each).read_bytes())
        assert ended(capsys, tool.main, "verify", mixed)[0] == 2
        assert ended(capsys, first_pack, mixed)[0] == 2


MEGATRON = {
    "u2": 8,
    "i2": 3,
    "i4": 4,
    "i8": 5,
}


@pytest.mark.parametrize("dtype", MEGATRON)
def test_text_of_megatron_opens_as_it_is(tmp_path, dtype, capsys):
    """Any width of integer, sequences in any order and shared, an empty first document, eos in some documents."""
    texts = [[], [7, 8, 1], [9], [7, 8, 1], [10, 11]]
    data = np.asarray([9, 7, 8, 1, 10, 11], dtype="<" + dtype)
    size = data.itemsize
    starts = [0, size, 0, size, 4 * size]
    prefix = str(tmp_path / "m")
    data.tofile(prefix + ".bin")
    index = layout.MAGIC + layout.HEADER.pack(1, MEGATRON[dtype], len(texts), len(texts) + 1)
    index += np.asarray([len(text) for text in texts], dtype="<i4").tobytes()
    index += np.asarray(starts, dtype="<i8").tobytes() + np.arange(len(texts) + 1, dtype="<i8").tobytes()
    Path(prefix + ".idx").write_bytes(index)
    for modes in (b"", bytes(len(texts))):
        Path(prefix + ".idx").write_bytes(index + modes)
        words = ("--megatron",) if modes else ()
        corpus = IndexedCorpus(prefix, megatron=bool(modes))
        corpus.check()
        assert [corpus.sequence(number).tolist() for number in range(len(texts))] == texts
        assert ended(capsys, tool.main, "verify", prefix, *words)[0] == 0
        values = json.loads(ended(capsys, tool.main, "stats", prefix, "--json", *words)[1])
        assert values["tokens"] == {"text": 9, "vision": 0}
    status, _, lines = ended(capsys, first_pack, prefix)
    assert status == 2 and "has modes. Copy it too" in lines[0]
    status, _, lines = ended(capsys, first_pack, prefix, "--megatron")
    assert status == 2 and "data.tokenizer is absent" in lines[0]


@pytest.mark.parametrize("modes", [b"", bytes(3)])
def test_text_of_megatron_trains_with_the_tokenizer_of_the_run(tmp_path, modes):
    folder = make_tokenizer(tmp_path / "tokenizer")
    tokenizer = TextTokenizer(folder)
    eos = tokenizer.special.eos
    texts = [[*tokenizer.encode(["the red car"])[0].tolist(), eos], tokenizer.encode(["a bus"])[0].tolist(), [300]]
    prefix = str(tmp_path / "m")
    np.concatenate(texts).astype("<u2").tofile(prefix + ".bin")
    lengths = np.asarray([len(text) for text in texts], dtype="<i4")
    starts = np.concatenate(([0], np.cumsum(lengths[:-1]))).astype("<i8") * 2
    index = layout.MAGIC + layout.HEADER.pack(1, 8, 3, 4) + lengths.tobytes() + starts.tobytes()
    Path(prefix + ".idx").write_bytes(index + np.arange(4, dtype="<i8").tobytes() + modes)
    recipe = Recipe(pack_length=32, templates="none", window_tokens=64, tokenizer=str(folder))
    assert vision_ids([prefix]) == ()
    vocabulary = replace(VOCABULARY, ids=((), (tokenizer.special.vision_start,)))
    plan = DataPlan([Source(path=prefix, megatron=bool(modes))], vocabulary, recipe)
    found = set()
    for number in range(2):
        pack = plan.pack(number)
        for document in range(1, int(pack.document.max()) + 1):
            found.add(tuple(pack.tokens[pack.document == document].tolist()))
    assert found == {tuple(texts[0]), (*texts[1], eos), (300, eos)}


def test_sums_that_are_wrong_in_the_sidecar_alone(prefix, capsys):
    _sidecar(prefix, lambda v: v["bin"].update(crc32=[f"{zlib.crc32(BIN) ^ 1:08x}"]))
    assert ended(capsys, tool.main, "verify", prefix)[0] == ended(capsys, first_pack, prefix)[0] == 2


def test_every_damaged_byte_of_an_index_is_found(tmp_path):
    prefix = write(tmp_path / "a", EXAMPLE)
    for at in range(len(IDX)):
        for mask in (0x01, 0x80, 0xFF):
            _poke(prefix + ".idx", 0, IDX)
            _poke(prefix + ".idx", at, bytes([IDX[at] ^ mask]))
            with pytest.raises(DataError):
                _open(prefix)


def test_files_cut_anywhere_are_refused(tmp_path):
    prefix = write(tmp_path / "a", EXAMPLE)
    for ending, whole in ((".idx", IDX), (".bin", BIN), (".json", Path(prefix + ".json").read_bytes().rstrip())):
        for size in range(len(whole)):
            Path(prefix + ending).write_bytes(whole[:size])
            with pytest.raises(DataError):
                _open(prefix)
        Path(prefix + ending).write_bytes(whole)
    _open(prefix)
