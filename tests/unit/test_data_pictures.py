"""Pictures to codes, workers that grow or die, and jobs from a file."""

import base64
import io
import json
import os
import signal
import textwrap

import numpy as np
import pytest

from tests.unit.data_corpora import read
from tests.unit.test_data_inputs import convert, jsonl, tar
from tests.unit.test_data_preprocess import make_job, make_tokenizer
from unimega.data import images
from unimega.data.preparing import pool
from unimega.data.preparing.job import read_job
from unimega.data.preprocess import preprocess
from unimega.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Means:
    """An image tokenizer for tests: the mean of each quarter, in 32 steps."""

    codebook, grid, fingerprint = 32, (2, 2), "means"

    def encode(self, pictures):
        quarters = [
            [int(half.mean()) // 8 for rows in np.array_split(one, 2) for half in np.array_split(rows, 2, axis=1)]
            for one in pictures
        ]
        return np.asarray(quarters, dtype=np.int32)


def png(colour, size=(6, 4), mode="RGB") -> bytes:
    image_module = pytest.importorskip("PIL.Image", reason="pip install 'unimega[data]'")
    out = io.BytesIO()
    image_module.new(mode, size, colour).save(out, "PNG")
    return out.getvalue()


def test_pictures_become_codes(tmp_path, tokenizer):
    values = [8 * (number % 32) for number in range(70)]
    members = []
    for number, value in enumerate(values):
        members.append((f"{number:03d}.png", b"no picture" if number == 50 else png((value,) * 3)))
        members.append((f"{number:03d}.txt", b"a bus"))
    expected = [[value // 8] * 4 for number, value in enumerate(values) if number != 50]
    for workers, task_mb in ((1, 16), (2, 0.002)):
        found, sidecar = convert(
            tmp_path,
            tokenizer,
            tar(members),
            image_tokenizer=Means,
            image_tokenizer_name="means:",
            codebook=None,
            codes_per_image=(),
            max_bad_share=0.05,
            workers=workers,
            task_mb=task_mb,
        )
        assert [document[1] for document in found] == [(0x01, codes) for codes in expected]
        assert sidecar["vocabulary"]["codebook"] == 32 and sidecar["vocabulary"]["grid"] == [2, 2]
        assert sidecar["vocabulary"]["codes_per_image"] == 4
        assert sidecar["vocabulary"]["image_tokenizer"]["sha256"] == "means"
        assert sidecar["sources"][0]["quarantined"] == {"bad picture": 1}


def test_pictures_beside_their_rows(tmp_path, tokenizer):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png((0, 0, 0)))
    rows = [{"caption": "a", "image": "pictures/a.png"}, {"caption": "a", "image": "gone.png"}]
    values = {"image_tokenizer": Means, "max_bad_share": 0.5, "codebook": 32}
    found, sidecar = convert(tmp_path, tokenizer, jsonl(rows), **values)
    assert [document[1] for document in found] == [(0x01, [0, 0, 0, 0])]
    assert sidecar["sources"][0]["quarantined"] == {"bad picture": 1}
    with pytest.raises(DataError, match=r"--codebook=64 is wrong\. The image tokenizer has 32"):
        convert(tmp_path, tokenizer, jsonl(rows), **{**values, "codebook": 64})
    with pytest.raises(DataError, match=r"--codes-per-image=9 is wrong\. The image tokenizer gives 4"):
        convert(tmp_path, tokenizer, jsonl(rows), **values, codes_per_image=(9,))


def test_pictures_in_parquet(tmp_path, tokenizer):
    """As datasets writes them: a structure of bytes and path, and turns as lists of structures."""
    arrow = pytest.importorskip("pyarrow", reason="pip install 'unimega[data]'")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a bus"}]
    rows = [
        {"image": {"bytes": png((shade,) * 3), "path": None}, "conversations": turns, "id": number}
        for number, shade in enumerate((0, 80, 248))
    ]
    out = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), out)
    found, _ = convert(tmp_path, tokenizer, out.getvalue(), image_tokenizer=Means, workers=2)
    assert [[mode for mode, _ in document] for document in found] == [[0x09, 0x28, 0x30]] * 3
    assert [document[0][1] for document in found] == [[0] * 4, [10] * 4, [31] * 4]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_base64_of_a_small_picture_is_no_path(tmp_path, tokenizer, kind):
    """Lists of images of pickles (mllm-npu) hold base64; a thumbnail is shorter than a path may be."""
    out = io.BytesIO()
    pytest.importorskip("PIL.Image", reason="pip install 'unimega[data]'").new("RGB", (6, 4)).save(out, kind)
    text = base64.b64encode(out.getvalue()).decode()
    assert len(text) < 1024
    rows = [{"texts": ["a", None], "images": [None, text]}, {"caption": "a", "image": text}]
    found, _ = convert(tmp_path, tokenizer, jsonl(rows), image_tokenizer=Means, max_bad_share=0)
    assert [document[1][0] for document in found] == [0x01, 0x01]


def test_a_picture_that_is_no_file_is_refused(tmp_path, tokenizer):
    """A pipe is not waited for, and what is said of bytes that are no picture is the same in every run."""
    os.mkfifo(tmp_path / "pipe")
    rows = [{"caption": "a", "image": name} for name in ("pipe", "/dev/zero", ".")]
    rows += [{"caption": "a", "image_bytes": "AAAA"}, {"text": "a"}]
    convert(tmp_path, tokenizer, jsonl(rows), image_tokenizer=Means, max_bad_share=0.9)
    told = [json.loads(line)["detail"] for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert told == [
        f"{tmp_path}/pipe: not a file",
        "/dev/zero: not a file",
        f"{tmp_path}/.: not a file",
        "not a picture of a known format",
    ]


def test_decoding():
    white_where_clear = images.decode(png((255, 0, 0, 0), mode="RGBA"))
    assert white_where_clear.shape == (4, 6, 3) and (white_where_clear == 255).all()
    assert (images.decode(png(7, mode="L")) == 7).all()
    with pytest.raises(images.BadImage, match="6 x 4 pixels, at most 23"):
        images.decode(png(7, mode="L"), max_pixels=23)
    with pytest.raises(images.BadImage, match="not a picture"):
        images.decode(png((1, 2, 3))[:-30])


class Deadly(Means):
    """Ends its worker."""

    def encode(self, pictures):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_block_that_kills_two_workers_ends_the_job(tmp_path, tokenizer):
    (tmp_path / "a.png").write_bytes(png((0, 0, 0)))
    for name, row in (("a", {"text": "a"}), ("b", {"caption": "a", "image": "a.png"})):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([row] * 3))
    job = make_job(
        *(tmp_path / f"{name}.jsonl" for name in "ab"),
        output=tmp_path / "out",
        tokenizer=tokenizer,
        image_tokenizer=Deadly,
        workers=2,
        backend="reference",
    )
    with pytest.raises(
        DataError, match=r"b\.jsonl, bytes 0 to \d+: two workers died there \(signal 9\)\. Out of memory"
    ):
        preprocess(job)
    assert not (tmp_path / "out.idx").exists() and len(list((tmp_path / "out.work").glob("*.part"))) == 1


def test_workers_that_have_grown_are_replaced(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pool, "_RECYCLE_BYTES", 0)
    path = tmp_path / "rows"
    path.write_bytes(jsonl([{"text": "a red bus"}] * 40))
    values = {"tokenizer": tokenizer, "workers": 2, "task_mb": 0.0003, "backend": "reference"}
    preprocess(make_job(path, output=tmp_path / "out", **values))
    assert len(read(str(tmp_path / "out"))) == 40


TOML = """
[output]
prefix = "corpus/mix"
[tokenizer]
path = "tokenizer"
[vision]
codebook = 32
codes_per_image = [4]
[[source]]
name = "web"
paths = ["web/*.jsonl"]
fields = {{ text = "content" }}
[[source]]
name = "pairs"
paths = ["pairs.jsonl"]
direction = "{direction}"
"""


def test_job_files(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(TOML.format(direction="t2i"))
    job = read_job(str(path))
    assert [source.name for source in job.source] == ["web", "pairs"] and job.source[0].fields == {"text": "content"}
    for change, line in (
        (("direction =", "way ="), r"unknown key 'source\[1\]\.way'"),
        (('"{direction}"', '"up"'), r"'source\[1\]\.direction' wants one of 'auto', 'both', 't2i', 'i2t', found 'up'"),
        (("prefix", "name"), r"unknown key 'output\.name'"),
        (('path = "tokenizer"', ""), r"'tokenizer.path' is missing. Set it in \[tokenizer\]"),
        (("paths", "path"), r"unknown key 'source\[0\]\.path'. Did you mean 'source\[0\]\.paths'"),
    ):
        path.write_text(TOML.replace(*change).format(direction="t2i"))
        with pytest.raises(ConfigError, match=line):
            read_job(str(path))
    path.write_text(textwrap.dedent("[output]\nprefix = 'a'\n[tokenizer]\npath = 'b'\n"))
    with pytest.raises(ConfigError, match=r"no source. Add a table \[\[source\]\]"):
        read_job(str(path))
