"""The digits corpus: what is in it, that it is the same each time, and that nothing held out is trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.examples import example
from unimega.config.loader import load_run

SETS = {"digits": 4311, "digits_warped": 24429, "held_out_t2i": 360, "held_out_i2t": 360}


corpus = example("corpus")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder") / "demo"
    corpus.build(folder, split=3)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_numbers_of_rows(built):
    assert {name: len(rows(built, name)) for name in SETS} == SETS
    for name, count in SETS.items():
        counts = json.loads((built / f"{name}.json").read_text())["counts"]
        assert (counts["documents"], counts["images"]) == (count, count)


def test_no_held_out_scan_is_trained_on(built):
    with np.load(built / "scans.npz") as data:
        train, held_out = set(data["train"].tolist()), set(data["held_out"].tolist())
        labels = data["labels"]
    assert (len(train), len(held_out), train & held_out) == (1437, 360, set())
    for name in SETS:
        scans = {row["scan"] for row in rows(built, name)}
        assert scans == (held_out if name.startswith("held_out") else train)
        for row in rows(built, name):
            assert row["caption"] in corpus.captions_of(labels[row["scan"]])


def test_every_warped_copy_comes_from_the_scan_it_names(built):
    book, data = codebook(built), corpus.split_scans(3)
    places = {scan: place for place, scan in enumerate(data.train.tolist())}
    warped = {
        copy: book.encode(corpus.warp(data.scans[data.train], np.random.default_rng((3, copy)))) for copy in (1, 16)
    }
    warped[0] = book.encode(data.scans[data.train])
    for row in rows(built, "digits_warped"):
        if row["copy"] in warped:
            assert row["codes"] == warped[row["copy"]][places[row["scan"]]].tolist()
    assert all(row["copy"] == 0 for row in rows(built, "digits"))


def codebook(folder):
    with np.load(folder / "scans.npz") as data:
        return corpus.Codebook(data["centres"])


def test_codes_and_reconstructions(built):
    data, book = corpus.split_scans(3), codebook(built)
    scans = data.scans[data.held_out]
    codes = book.encode(scans)
    assert codes.shape == (360, 16)
    assert len(np.unique(book.encode(data.scans[data.train]))) == 32
    decoded = book.decode(codes)
    assert np.array_equal(book.encode(decoded), codes)
    psnr = 10 * np.log10(1 / np.square(decoded - scans).mean())
    assert 20 < psnr < 21  # 20.5 measured


def test_codes_run_in_raster_order():
    scan = np.zeros((1, 8, 8), dtype=np.float32)
    scan[0, 2, 5] = 1  # second row of patches, third column; in it upper right
    book = corpus.Codebook(np.array([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=np.float32))
    assert np.flatnonzero(book.encode(scan)[0]).tolist() == [6]
    assert np.array_equal(book.decode(book.encode(scan)), scan)


def test_tokenizer_folder(built):
    transformers = pytest.importorskip("transformers", reason="pip install 'unimega[hf]'")
    tokenizer = transformers.AutoTokenizer.from_pretrained(built / "tokenizer")
    assert len(tokenizer) == 22
    assert tokenizer.convert_tokens_to_ids("<|vision_start|>") == 21
    for label in range(10):
        for caption in corpus.captions_of(label):
            ids = tokenizer(caption, add_special_tokens=False).input_ids
            assert len(ids) == len(caption.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == caption
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]


def test_the_same_split_gives_the_same_bytes(built, tmp_path):
    corpus.build(tmp_path, split=3)
    for path in sorted(built.rglob("*")):
        if path.is_file() and path.name != "corpus.json":
            assert path.read_bytes() == (tmp_path / path.relative_to(built)).read_bytes(), path.name


def test_a_whole_corpus_is_kept_and_one_of_another_split_is_not(built):
    before = (built / "digits.bin").stat().st_mtime_ns
    assert corpus.build(built, split=3)["split"] == 3
    assert (built / "digits.bin").stat().st_mtime_ns == before


def test_run_file_is_sound(built):
    config = load_run(["--config", str(example("training").run_file(built))])
    assert [Path(source.path) for source in config.data.train] == [built / "digits", built / "digits_warped"]
    assert config.model.vision_offset == len(corpus.vocabulary())
    assert config.model.vision_ids == (corpus.vocabulary()[corpus.VISION_START],)
    assert config.model.vocabulary_rows == config.model.vision_offset + corpus.CODEBOOK


def test_curve_is_compared_by_means_of_fifty_steps(tmp_path):
    curve = example("curve")
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0, "loss_vision": 9.0, "loss_text": 9.0} for step in range(1, 60)]
    lines += [{"step": step, "loss": 1.0, "loss_vision": 2.24, "loss_text": 0.73} for step in range(51, 151)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 151, "lo')
    (point,) = curve.compare(curve.read_metrics(metrics))
    assert (point.step, point.vision_in_range, point.text_in_range) == (100, True, False)
    assert "*" in curve.table([point])
