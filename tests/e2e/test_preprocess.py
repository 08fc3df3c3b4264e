"""The preprocessing tool as a process: killed, out of disk, out of memory, and with the bytes of an undisturbed run."""

import gzip
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_corpora import read
from tests.unit.test_data_pictures import png
from tests.unit.test_data_preprocess import make_tokenizer

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "preprocess_data.py")
WORDS = ("a", "red", "bus", "the", "car", "blue", "draw", "caption", "of", "tree")
ENDINGS = ("bin", "idx", "json", "quarantine.jsonl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with rows of several kinds, some bad, as plain and compressed files, and the tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tokenizer(folder / "tokenizer")
    draw = random.Random(7)
    lines = []
    for number in range(6000):
        text = " ".join(draw.choices(WORDS, k=draw.randrange(1, 60)))
        row = {"text": text}
        if number % 3 == 1:
            row = {"caption": text, "codes": draw.choices(range(32), k=4), "data_type": draw.choice(["t2i", None])}
        elif number % 100 == 0:
            row = {"text": ""}
        lines.append(json.dumps(row) + "\n")
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[:4000]).encode(), mtime=0))
    return folder


def start(inputs: Path, output: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, TOOL, "--input", "a.jsonl", "b.jsonl.gz", "--output", str(output)]
    command += [
        "--tokenizer",
        "tokenizer",
        "--codebook",
        "32",
        "--task-mb",
        "0.02",
        "--backend",
        "reference",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=inputs, env=environment, **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def files(output: Path) -> dict[str, bytes]:
    return {ending: Path(f"{output}.{ending}").read_bytes() for ending in ENDINGS}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    code, _, err = finish(start(inputs, output, "--workers", "1"))
    assert code == 0, err
    assert names(output.parent) == sorted(f"out.{ending}" for ending in ENDINGS)
    return files(output)


def test_the_number_of_workers_changes_nothing(inputs, undisturbed, tmp_path):
    code, out, err = finish(start(inputs, tmp_path / "out", "--workers", "3", "--progress-seconds", "0.2"))
    assert code == 0, err
    assert files(tmp_path / "out") == undisturbed
    assert "MB/s" in err and "ETA" in err and "(100 %)" in err, "progress must reach a stderr that is no terminal"
    assert re.split(" {2,}", out.splitlines()[0]) == [
        "source",
        "rows",
        "documents",
        "text tokens",
        "vision tokens",
        "bad",
        "MB",
    ]


def parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished part."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("out.work/*.part")}


def test_ten_kills_change_no_byte(inputs, undisturbed, tmp_path):
    """Kills at random times, each once a run has begun to work; a corpus that gets whole meanwhile begins anew."""
    draw, met, output = random.Random(10), 0, tmp_path / "out"
    while met < 10:
        kept = parts(tmp_path)
        process = start(inputs, output, "--workers", str(draw.choice((1, 2))))
        target = len(kept) + draw.randrange(1, 9)
        while process.poll() is None and len(list(tmp_path.glob("out.work/*.part"))) < target:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            met += 1
        finish(process)
        was_published = Path(f"{output}.idx").exists()  # maybe killed behind its last rename, or behind all it does
        if process.returncode == 0 or (was_published and not (tmp_path / "out.work").exists()):
            assert files(output) == undisturbed
            for ending in ENDINGS:
                Path(f"{output}.{ending}").unlink()
        elif not was_published:
            assert kept.items() <= parts(tmp_path).items(), "a finished part was written again"
    had_parts = bool(parts(tmp_path)) and not Path(f"{output}.idx").exists()
    code, _, err = finish(start(inputs, output, "--workers", "2"))
    assert code == 0 and ("MB kept" in err or not had_parts), err
    assert files(output) == undisturbed
    assert names(tmp_path) == sorted(f"out.{ending}" for ending in ENDINGS)


@pytest.mark.parametrize("full", ["part", "bin", pytest.param("idx", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line(inputs, undisturbed, tmp_path, full):
    """Wherever a file may be refused: within a part, the merged ids, the index."""
    limit = 2000 if full == "part" else len(undisturbed[full]) - 100
    output, workers = tmp_path / "out", "2" if full == "part" else "1"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, _, err = finish(start(inputs, output, "--workers", workers, preexec_fn=limited))
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("unimega: ") and "cannot be written (File too large" in line, err
    assert not any(Path(f"{output}.{ending}").exists() for ending in ("bin", "idx", "json"))
    assert not list(tmp_path.rglob("*.tmp"))
    code, _, err = finish(start(inputs, output, "--workers", "1"))
    assert code == 0 and ("MB kept" in err) == (full != "part"), err
    assert files(output) == undisturbed


def test_workers_do_not_outlive_their_parent(inputs, tmp_path):
    process = start(inputs, tmp_path / "out", "--workers", "2")
    while process.poll() is None and not list(tmp_path.glob("out.work/*.part")):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    finish(process)
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "a worker goes on without its parent"
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_worker_that_dies_is_replaced(inputs, undisturbed, tmp_path):
    process = start(inputs, tmp_path / "out", "--workers", "2")
    while process.poll() is None and not list(tmp_path.glob("out.work/*.part")):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
            break
    code, _, err = finish(process)
    assert code == 0, err
    assert files(tmp_path / "out") == undisturbed


def test_two_processes_do_not_write_one_corpus(inputs, tmp_path):
    process = start(inputs, tmp_path / "out", "--workers", "1")
    while process.poll() is None and not list(tmp_path.glob("out.work/*.part")):
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    code, _, err = finish(start(inputs, tmp_path / "out", "--workers", "1"))
    process.kill()
    finish(process)
    assert code == 2 and "another process writes this corpus" in err, err


JOB = """
[output]
prefix = "out"
[tokenizer]
path = "tokenizer"
[vision]
image_tokenizer = "digits:centres.npz"
[[source]]
name = "web"
paths = ["*.jsonl"]
fields = { text = "content" }
[[source]]
name = "scans"
paths = ["scans.tar"]
direction = "t2i"
[limits]
task_mb = 0.01
"""


def test_a_job_file_with_pictures(tmp_path):
    """Two sources of one corpus; the tokenizer of pictures is joined by its name, here and in the workers."""
    pytest.importorskip("PIL.Image", reason="pip install 'unimega[data]'")
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "web.jsonl").write_text(
        "".join(json.dumps({"content": f"bus {n}", "text": "x"}) + "\n" for n in range(9))
    )
    np.savez(tmp_path / "centres.npz", centres=np.linspace(0, 1, 8, dtype=np.float32)[:, None].repeat(4, axis=1))
    shades = [0, 255, 73] * 20
    with tarfile.open(tmp_path / "scans.tar", "w") as archive:
        for number, shade in enumerate(shades):
            for name, data in ((f"{number:02d}.png", png((shade,) * 3)), (f"{number:02d}.txt", b"a bus")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    command = [sys.executable, TOOL, str(tmp_path / "job.toml"), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    documents = read(str(tmp_path / "out"))
    assert [document[-1] for document in documents[9:]] == [(0x01, [round(shade / 255 * 7)] * 16) for shade in shades]
    sidecar = json.loads((tmp_path / "out.json").read_text())
    web, scans = sidecar["sources"]
    assert (web["name"], web["path"], web["documents"]) == ("web", "web.jsonl", 9)
    assert (scans["name"], scans["direction"], scans["tokens"]["vision"]) == ("scans", "t2i", 60 * 16)
    assert sidecar["vocabulary"]["codebook"] == 8 and sidecar["vocabulary"]["grid"] == [4, 4]
    assert [line.split()[0] for line in done.stdout.splitlines()[1:4]] == ["web", "scans", "total"]
