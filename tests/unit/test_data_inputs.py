"""Files to rows: every format gives the same corpus, blocks lose no line, damage is one line, pictures become codes."""

import gzip
import io
import json
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpora import read
from tests.unit.test_data_preprocess import IMAGE, make_job, make_tokenizer
from unimega.data.preparing import files
from unimega.data.preparing.files import InputFile, lines, lines_of_block
from unimega.data.preparing.report import table
from unimega.data.preprocess import preprocess
from unimega.data.records.row import BadRow
from unimega.errors import DataError

ROWS = [
    {"text": "a red bus"},
    {"caption": "the car", "codes": IMAGE, "data_type": "t2i"},
    {"text": "caf\u00e9 \U0001f68c", "codes": None},
    {"caption": "a blue bus", "codes": [1, 2, 3, 4], "data_type": "t2i"},
] * 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def jsonl(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="pip install 'unimega[data]'")
    half = len(data) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


def parquet(rows=ROWS) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="pip install 'unimega[data]'")
    pq = pytest.importorskip("pyarrow.parquet")
    names = ("text", "caption", "data_type")
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns["codes"] = arrow.array([row.get("codes") for row in rows], arrow.list_(arrow.uint16()))
    columns["unknown"] = [{"x": 1}] * len(rows)
    out = io.BytesIO()
    pq.write_table(arrow.table(columns), out, row_group_size=7)
    return out.getvalue()


def tar(samples, mode="w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def npy(values) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(values))
    return out.getvalue()


def samples(rows=ROWS):
    """Each row as members of a webdataset, in every way that one may be written."""
    for number, row in enumerate(rows):
        key = f"shard/{number:06d}"
        if row.get("codes") is None:
            yield f"{key}.txt", row["text"].encode()
        elif number % 4 == 1:
            yield f"{key}.json", json.dumps(row).encode()
        else:
            yield f"{key}.caption", row["caption"].encode()
            yield f"{key}.codes.npy", npy(row["codes"])
            yield f"{key}.json", json.dumps({"data_type": "t2i"}).encode()


def convert(tmp_path, tokenizer, data, *, name="rows", **values):
    path = tmp_path / name
    path.write_bytes(data)
    values = {"codebook": 32, "codes_per_image": (4,), "overwrite": True, "backend": "reference"} | values
    sidecar = preprocess(make_job(path, output=tmp_path / "out", tokenizer=tokenizer, **values))
    return read(str(tmp_path / "out")), sidecar


FORMATS = {
    "gz": lambda: gzip.compress(jsonl()),
    "gz of two members": lambda: gzip.compress(jsonl(ROWS[:50])) + gzip.compress(jsonl(ROWS[50:])),
    "zst of two frames": lambda: zstd(jsonl()),
    "parquet": parquet,
    "tar": lambda: tar(samples()),
    "tar.gz": lambda: gzip.compress(tar(samples())),
    "tar.zst": lambda: zstd(tar(samples())),
    "byte order mark, CRLF, no last newline": lambda: b"\xef\xbb\xbf" + jsonl().replace(b"\n", b"\r\n")[:-2],
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_corpus(tmp_path, tokenizer, name):
    plain, expected = convert(tmp_path, tokenizer, jsonl())
    found, sidecar = convert(tmp_path, tokenizer, FORMATS[name](), task_mb=0.0005)
    assert found == plain
    assert {**sidecar["counts"]} == {**expected["counts"]}
    (source,) = sidecar["sources"]
    assert source["direction"] == "t2i" and source["rows"] == len(ROWS) and source["documents"] == len(ROWS)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=12).filter(lambda part: b"\n" not in part), max_size=30),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 15),
    st.integers(1, 9),
)
def test_blocks_hold_every_line_once(tmp_path_factory, content, ends, block, limit, chunk):
    data = b"\n".join(content) + (b"\n" if ends else b"")
    path = tmp_path_factory.getbasetemp() / "blocks"
    path.write_bytes(data)
    file = InputFile(
        path=str(path), shown="x", source=0, format="jsonl", compression="", bytes=len(data), mtime_ns=0, spans=()
    )
    expected = data.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    before, files._CHUNK = files._CHUNK, chunk
    try:
        found = [
            raw
            for start in range(0, len(data), block)
            for raw in lines_of_block(file, (start, min(start + block, len(data))), limit=limit)
        ]
    finally:
        files._CHUNK = before
    assert len(found) == len(expected)
    for raw, line in zip(found, expected, strict=True):
        assert data[raw.byte : raw.byte + len(line)] == line
        if len(line) <= limit:
            assert raw.content == (line.removeprefix(b"\xef\xbb\xbf") if raw.byte == 0 else line)
        else:
            assert isinstance(raw.content, BadRow)


def test_a_row_without_an_end_in_a_compressed_file_is_given_up(monkeypatch):
    monkeypatch.setattr(files, "_GIVE_UP_BYTES", 10_000_000)

    class Endless:
        given = 0

        def read(self, size):
            self.given += size
            return b"x" * size

    stream = Endless()
    with pytest.raises(DataError, match=r"b\.gz:1: the row expands to more than 0.0 GB"):
        list(lines(stream, limit=100, expands="b.gz"))
    assert stream.given < 13_000_000


def damaged_parquet() -> bytes:
    data = bytearray(parquet())
    data[4:400] = bytes(396)
    return bytes(data)


def pax_bomb() -> bytes:
    """An extended header that says it has 100 MB."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 100_000_000
    return member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


DAMAGED = {
    "gz cut": (lambda: gzip.compress(jsonl())[:-20], "rows: the compressed data is damaged or cut"),
    "gz flipped": (lambda: gzip.compress(jsonl())[:40] + b"\xff" * 20, "rows: the compressed data is damaged"),
    "gz then rubbish": (lambda: gzip.compress(jsonl()) + b"rubbish", "rows: the compressed data is damaged"),
    "zst cut": (lambda: zstd(jsonl())[:-9], "rows: the compressed data is damaged or cut .it ends within a frame"),
    "zst rubbish": (lambda: zstd(jsonl()) + b"rubbish", "rows: the compressed data is damaged"),
    "tar cut": (lambda: tar(samples())[:30_000], "rows: the archive is damaged or cut"),
    "tar cut at a header": (lambda: tar(samples())[: 512 * 8], "rows: the archive is damaged or cut .header at byte"),
    "tar with a bad header": (
        lambda: (data := tar(samples()))[:1024] + b"\xff" * 512 + data[1536:],
        "rows: the archive is damaged or cut .header at byte 1024",
    ),
    "tar with a huge header": (pax_bomb, "rows: the archive is damaged or cut"),
    "two tars": (lambda: tar(samples()) * 2, "rows: there is more behind the archive's end. Joined archives"),
    "tar.gz cut": (lambda: gzip.compress(tar(samples()))[:-30], "rows: the compressed data is damaged or cut"),
    "parquet cut": (lambda: parquet()[:-30], "rows: not parquet, damaged or cut"),
    "parquet flipped": (damaged_parquet, "rows: not parquet, damaged or cut"),
    "bzip2": (lambda: b"BZh9" + bytes(99), "rows: bzip2 is not read. Write it as"),
    "zip": (lambda: b"PK\x03\x04" + bytes(99), "rows: zip is not read"),
    "UTF-16": (lambda: jsonl().decode().encode("utf-16"), "rows: UTF-16 is not read"),
    "empty": (lambda: b"", "rows: no rows. A corpus needs at least one document"),
    "blank": (lambda: b"\n \n\n", "rows: no rows"),
    "binary": (lambda: bytes(range(1, 256)) * 40, "rows:1: .*not "),
    "NULs": (lambda: bytes(5000), "rows:1: not JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line_and_leaves_nothing(tmp_path, tokenizer, case):
    make, line = DAMAGED[case]
    with pytest.raises(DataError, match=line) as caught:
        convert(tmp_path, tokenizer, make())
    assert "\n" not in str(caught.value)
    left = {path.name for path in tmp_path.iterdir()} - {"rows", "out.quarantine.jsonl"}
    assert not left


def test_a_list_of_rows_is_told_how_to_convert(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"rows\.json: one JSON list, .* jq -c"):
        convert(tmp_path, tokenizer, json.dumps(ROWS).encode(), name="rows.json")


def test_bad_rows_are_kept_apart(tmp_path, tokenizer):
    """Lines and bytes in the quarantine are those of the file, whatever the blocks."""
    content = [json.dumps({"text": f"row {number}"}).encode() for number in range(400)]
    bad = {7: b'{"text": "\xff"}', 150: b"{", 151: json.dumps({"text": "x" * 300}).encode(), 399: b'{"text": ""}'}
    for line, row in bad.items():
        content[line] = row
    content[20] = b""
    data = b"\n".join(content)
    for compress in (bytes, gzip.compress):
        found, sidecar = convert(tmp_path, tokenizer, compress(data), task_mb=0.0003, row_mb=0.0002, max_bad_share=0.02)
        entries = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
        assert [entry["line"] - 1 for entry in entries] == list(bad)
        assert [entry["reason"] for entry in entries] == ["not UTF-8", "not JSON", "row too long", "empty text"]
        for entry in entries:
            assert data[entry["byte"] :].startswith(bad[entry["line"] - 1])
            assert entry["source"] == entry["file"] == str(tmp_path / "rows") and entry["detail"]
        (source,) = sidecar["sources"]
        assert len(found) == source["documents"] == 395 and source["lines"] == 400 and source["rows"] == 399
        assert source["quarantined"] == {"empty text": 1, "not JSON": 1, "not UTF-8": 1, "row too long": 1}
    convert(tmp_path, tokenizer, jsonl())
    assert not (tmp_path / "out.quarantine.jsonl").exists(), "an old quarantine would be taken for this corpus's"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_of_bad_rows_stops_early(tmp_path, tokenizer, workers):
    """Which bad row is told first is chance with several workers, but its line is right."""
    data = jsonl([{"text": "a"}] * 1500 + [{"text": ""}] * 20_000)
    with pytest.raises(
        DataError, match=r"rows:\d+: text is empty or missing\. \d+ of \d+ rows .* allows \d+: empty text"
    ) as caught:
        convert(tmp_path, tokenizer, data, task_mb=0.01, workers=workers)
    assert int(str(caught.value).split(" of ")[1].split()[0]) < 15_000
    first = json.loads((tmp_path / "out.quarantine.jsonl").read_text().splitlines()[0])
    assert f"rows:{first['line']}:" in str(caught.value) and first["reason"] == "empty text"
    assert first["line"] == 1501 or (workers == 2 and first["line"] == 1 + data[: first["byte"]].count(b"\n") > 1501)
    assert not (tmp_path / "out.work").exists() and not (tmp_path / "out.idx").exists()


def test_validate_writes_no_corpus(tmp_path, tokenizer):
    path = tmp_path / "rows"
    path.write_bytes(jsonl() + b"{\n")
    job = make_job(path, output=tmp_path / "out", tokenizer=tokenizer, codebook=32, validate=True, max_bad_share=0.1)
    facts = preprocess(job)
    (source,) = facts["sources"]
    assert (source["rows"], source["documents"], source["tokens"]["vision"]) == (121, 120, 240)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.quarantine.jsonl", "rows"]
    assert re.split(" {2,}", table(job, facts, seconds=1).splitlines()[1])[1:5] == ["121", "120", "-", "240"]


def test_inputs_are_named_by_globs_in_order(tmp_path, tokenizer):
    for name in ("b/2", "a/3", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([{"text": name}] * 2))
    job = make_job("b/*", "a/3", output=tmp_path / "out", tokenizer=tokenizer, folder=str(tmp_path))
    assert [source["path"] for source in preprocess(job)["sources"]] == ["b/1", "b/2", "a/3"]
    for paths, line in (
        (("c/*",), r"input='c/\*' is wrong. No file"),
        (("b",), "input='b' is a folder. Name its files: 'b/"),
        (("b/1", "b/*"), "input='b/1' is named twice"),
    ):
        with pytest.raises(DataError, match=line):
            preprocess(make_job(*paths, output=tmp_path / "o", tokenizer=tokenizer, folder=str(tmp_path)))


def test_what_changed_since_a_kill_is_read_again(tmp_path, tokenizer):
    """Parts of an input that is no longer the same are not used; those of another job are not thrown away unasked."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(jsonl())
    second.write_bytes(gzip.compress(jsonl())[:-4])
    job = {"output": tmp_path / "out", "tokenizer": tokenizer, "codebook": 32, "task_mb": 0.001}
    with pytest.raises(DataError, match="second: the compressed data"):
        preprocess(make_job(first, second, **job))
    parts = sorted(path.name for path in (tmp_path / "out.work").glob("00000-*.part"))
    assert len(parts) > 3
    with pytest.raises(DataError, match=r"out\.work: holds parts of another job: vocabulary was .*Pass --overwrite"):
        preprocess(make_job(first, second, **{**job, "codebook": 64}))
    part = tmp_path / "out.work" / parts[0]
    content = bytearray(part.read_bytes())
    content[5] ^= 1
    part.write_bytes(content)
    second.write_bytes(gzip.compress(jsonl()))
    with pytest.raises(DataError, match=r"00000-000000\.part: its sum is wrong"):
        preprocess(make_job(first, second, **job))
    assert not (tmp_path / "out.idx").exists() and not (tmp_path / "out.bin").exists()
    first.write_bytes(jsonl(ROWS[::-1]))
    second.write_bytes(gzip.compress(jsonl()))
    preprocess(make_job(first, second, **job))
    once, twice = read(str(tmp_path / "out")), read(str(tmp_path / "out"))
    assert once == twice and len(once) == 2 * len(ROWS) and once[0] == once[-1]
    preprocess(make_job(first, second, **{**job, "output": tmp_path / "fresh"}))
    assert read(str(tmp_path / "fresh")) == once


def test_pickles_hold_plain_things_only(tmp_path, tokenizer):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    vast = pickle.dumps({"items": ["b" * 1000] * 100_000})
    good = pickle.dumps({"texts": ["a", None], "images": [None, None]})
    data = tar(
        [("a.pkl", pickle.dumps(Evil())), ("b.pkl", good), ("c.pkl", b"\x80"), ("e.pkl", vast), ("d.txt", b"a bus")]
    )
    found, sidecar = convert(tmp_path, tokenizer, data, max_bad_share=0.9)
    assert len(found) == 1 and sidecar["sources"][0]["quarantined"] == {"pickle": 2, "row too long": 1, "wrong type": 1}
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("at", ["reading", "merging"])
def test_an_input_that_goes_meanwhile(tmp_path, tokenizer, at):
    """One line, no corpus; finished parts wait for the file to come back."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(jsonl())
    second.write_bytes(jsonl())

    def remove(progress):
        if at == "reading" or progress.done_bytes == progress.total_bytes:
            second.unlink(missing_ok=True)

    job = make_job(first, second, output=tmp_path / "out", tokenizer=tokenizer, codebook=32, task_mb=0.001)
    with pytest.raises(DataError, match=r"second: cannot be read \(No such file or directory\)"):
        preprocess(job, remove)
    assert list((tmp_path / "out.work").glob("*.part")) and not list(tmp_path.glob("out.[bi]*"))


def test_members_of_one_name_twice_are_no_row(tmp_path, tokenizer):
    """Neither is taken for the other, and neither is lost in silence."""
    data = tar([("a.txt", b"one"), ("a.TXT", b"two"), ("b.txt", b"three"), ("b.json", b"{}"), ("a.txt", b"four")])
    found, sidecar = convert(tmp_path, tokenizer, data, max_bad_share=0.5)
    assert len(found) == 2 and sidecar["sources"][0]["quarantined"] == {"ambiguous kind": 1}
    (entry,) = map(json.loads, (tmp_path / "out.quarantine.jsonl").read_text().splitlines())
    assert entry["line"] == 1 and entry["detail"] == "more than one member of one name that ends in .txt"
