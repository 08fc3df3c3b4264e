"""The bytes of a corpus: written, read, read by megatron-core, and refused when damaged."""

import json
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unimega.parallel  # noqa: F401 (redirects megatron-core before it is imported)
from tests.unit.data_corpora import facts, read, write
from unimega.data import format as layout
from unimega.data.reader import IndexedCorpus
from unimega.data.writer import CorpusWriter
from unimega.errors import DataError

IDX = bytes.fromhex(
    "4d4d494449445800000100000000000000040300000000000000030000000000"
    "000002000000030000000100000000000000000000000800000000000000140000000000000000000000000000000200000000000000"
    "0300000000000000100100"
)
BIN = bytes.fromhex("0500000007000000ff1f0000000000002c01000070110100")
EXAMPLE = [[(0x10, [5, 7]), (0x01, [8191, 0, 300])], [(0x00, [70000])]]

modes = st.integers(0, 63)
documents = st.lists(
    st.lists(st.tuples(modes, st.lists(st.integers(0, 2**31 - 1), max_size=12)), min_size=1, max_size=4),
    min_size=1,
    max_size=30,
)


def test_the_worked_example_has_these_bytes(tmp_path):
    prefix = write(tmp_path / "tiny", EXAMPLE)
    assert Path(prefix + ".idx").read_bytes() == IDX
    assert Path(prefix + ".bin").read_bytes() == BIN
    assert read(prefix) == EXAMPLE
    assert not list(tmp_path.glob("*.tmp"))


def test_the_documentation_shows_these_bytes():
    text = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text()
    for raw, name in ((IDX, ".idx"), (BIN, ".bin")):
        start = text.index(f"{name} 0000")
        shown = bytearray()
        for line in text[start:].splitlines()[: -(-len(raw) // 16)]:
            cells = line.strip().split("  ")[1].replace("|", " ").split()
            shown += bytes(int(cell, 16) for cell in cells)
        assert bytes(shown) == raw


@settings(max_examples=60, deadline=None)
@given(documents)
def test_what_is_written_is_read(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("roundtrip")
    prefix = write(folder / "a", written)
    assert read(prefix) == written
    sidecar = json.loads(Path(prefix + ".json").read_text())
    data = Path(prefix + ".bin").read_bytes()
    assert sidecar["bin"] == {
        "bytes": len(data),
        "block_bytes": 67108864,
        "crc32": [f"{zlib.crc32(data):08x}"] if data else [],
    }
    assert sidecar["counts"]["documents"] == len(written)
    assert sidecar["counts"]["tokens"]["text"] == sum(len(i) for d in written for m, i in d if m & 7 == 0)
    assert sidecar["counts"]["images"] == sum(m & 7 == 1 for d in written for m, _ in d)
    IndexedCorpus(prefix).check_blocks()


def test_blocks_are_summed_across_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK_BYTES", 64)
    draw = np.random.default_rng(0)
    prefix = write(tmp_path / "a", [[(0, draw.integers(0, 9, n).tolist())] for n in (1, 15, 16, 40, 0, 3)])
    data = Path(prefix + ".bin").read_bytes()
    expected = [f"{zlib.crc32(data[at : at + 64]):08x}" for at in range(0, len(data), 64)]
    assert json.loads(Path(prefix + ".json").read_text())["bin"]["crc32"] == expected
    IndexedCorpus(prefix).check_blocks()
    Path(prefix + ".bin").write_bytes(data[:70] + bytes([data[70] ^ 1]) + data[71:])
    with pytest.raises(DataError, match=r"crc32 of block 1"):
        IndexedCorpus(prefix).check_blocks()


def test_megatron_core_reads_ours_and_we_read_its_files(tmp_path):
    torch = pytest.importorskip("torch", reason="megatron-core needs torch")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    draw = np.random.default_rng(1)
    written = [
        [(int(draw.integers(0, 64)), draw.integers(0, 2**31 - 1, draw.integers(0, 20)).tolist()) for _ in range(n)]
        for n in draw.integers(1, 5, 50)
    ]
    prefix = write(tmp_path / "ours", written)
    flat = [item for document in written for item in document]
    for multimodal in (True, False):
        dataset = IndexedDataset(prefix, multimodal=multimodal)
        assert dataset.document_indices.tolist() == np.cumsum([0] + [len(d) for d in written]).tolist()
        for number, (mode, ids) in enumerate(flat):
            found = dataset[number]
            if multimodal:
                found, found_mode = found
                assert int(found_mode) == mode
            assert found.tolist() == ids
    theirs = str(tmp_path / "theirs")
    builder = IndexedDatasetBuilder(theirs + ".bin", dtype=np.int32, multimodal=True)
    for document in written:
        for mode, ids in document:
            builder.add_item(torch.tensor(ids, dtype=torch.int32), mode)
        builder.end_document()
    builder.finalize(theirs + ".idx")
    for ending in (".bin", ".idx"):
        assert Path(theirs + ending).read_bytes() == Path(prefix + ending).read_bytes()

    plain = str(tmp_path / "plain")
    builder = IndexedDatasetBuilder(plain + ".bin", dtype=np.uint16)
    texts = [[int(i) for i in draw.integers(0, 60000, n)] for n in (3, 9, 1)]
    for ids in texts:
        builder.add_document(ids, [len(ids)])
    builder.finalize(plain + ".idx")
    assert read(plain) == [[(0, ids)] for ids in texts]


def test_a_view_outlives_its_corpus(tmp_path):
    prefix = write(tmp_path / "a", EXAMPLE)
    code = f"from unimega.data.reader import IndexedCorpus as C\nx = C({prefix!r}).sequence(1)\nprint(x.tolist())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "[8191, 0, 300]")


def test_ten_million_documents_open_at_once_and_are_checked_within_a_second(tmp_path):
    number, prefix = 10_000_000, str(tmp_path / "big")
    Path(prefix + ".bin").write_bytes(bytes(4))
    with open(prefix + ".idx", "wb") as file:  # sparse: empty sequences at 0, all but the last document empty
        file.write(layout.MAGIC + layout.HEADER.pack(1, 4, number, number + 1))
        file.seek(layout.HEADER_BYTES + 12 * number + 8 * number)
        file.write(struct.pack("<q", number))
    IndexedCorpus(prefix)
    process = psutil.Process()
    memory, start = process.memory_info().rss, time.process_time()
    corpus = IndexedCorpus(prefix)
    assert time.process_time() - start < 0.010
    assert process.memory_info().rss - memory < 20e6
    assert corpus.num_documents == number
    start = time.process_time()
    corpus.check()
    assert time.process_time() - start < 1


def test_pointers_beyond_4_gib(tmp_path):
    prefix, far = str(tmp_path / "big"), 5 << 30
    with open(prefix + ".bin", "wb") as file:
        file.seek(far)
        file.write(np.asarray([7, 8], dtype="<i4").tobytes())
    header = layout.MAGIC + layout.HEADER.pack(1, 4, 1, 2)
    Path(prefix + ".idx").write_bytes(header + struct.pack("<iqqq", 2, far, 0, 1))
    corpus = IndexedCorpus(prefix)
    corpus.check()
    assert corpus.sequence(0).tolist() == [7, 8]


def test_nothing_is_left_of_a_writer_that_failed(tmp_path):
    with pytest.raises(RuntimeError), CorpusWriter(tmp_path / "a") as writer:
        writer.add_document([(0, np.arange(4, dtype=np.int32))])
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_existing_corpus_is_kept_unless_told_otherwise(tmp_path):
    prefix = write(tmp_path / "a", EXAMPLE)
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        CorpusWriter(prefix)
    with pytest.raises(RuntimeError), CorpusWriter(prefix, overwrite=True) as writer:
        writer.add_document([(0, np.arange(4, dtype=np.int32))])
        raise RuntimeError
    assert read(prefix) == EXAMPLE
    with CorpusWriter(prefix, overwrite=True) as writer:
        writer.add_document([(0, np.arange(4, dtype=np.int32))])
        writer.finish(facts())
    assert read(prefix) == [[(0, [0, 1, 2, 3])]]
