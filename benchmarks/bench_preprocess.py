r"""Preprocessing of plain text beside Megatron-LM's tool, and the memory it takes: JSON lines.

    python benchmarks/bench_preprocess.py [--megatron PATH] [--mb 86] [--slow-mb 24] [--memory-mb 80 800] \
        [--rounds 3] [--output FILE]

Whole commands are timed, one process each, in CPU seconds of the process and its children; the best of the rounds
counts. Start-up is subtracted from Megatron's (a run over one line) and not from ours. The same ids are asserted.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import texts

from unimega.data import format as layout
from unimega.errors import DataError, run_cli

ROOT = Path(__file__).resolve().parents[1]
_MB = 1_000_000
_TRAIN_MB = 30
_EXTRAS = ("gigatoken", "orjson", "regex", "transformers", "pyarrow", "zstandard", "sentencepiece")
_BARE = (
    "import runpy, sys; sys.modules.update(dict.fromkeys({extras}, None)); "
    "runpy.run_path({tool!r}, run_name='__main__')"
)
"""The tool as an install without extras has it: none of their packages can be imported."""
_LAUNCH = (
    "import json, os, subprocess, sys; process = subprocess.Popen(sys.argv[2:]); "
    "_, status, used = os.wait4(process.pid, 0); process.returncode = os.waitstatus_to_exitcode(status); "
    "facts = [process.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]; "
    "open(sys.argv[1], 'w').write(json.dumps(facts))"
)
"""A small process between this one and a command: Linux counts a parent's size at the fork as the child's peak."""
_VARIABLES = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Cost:
    """Of one command and its children."""

    cpu_seconds: float
    seconds: float
    peak_bytes: int
    """The largest resident size of the command's first process."""


@dataclass(frozen=True)
class Contestant:
    """One way to turn jsonl into a corpus."""

    name: str
    command: Callable[[Path, Path], Sequence[str]]
    """Of input and output prefix."""
    suffix: str = ""
    """What it adds to the prefix."""
    first_on_path: str = ""
    """Folder whose packages come before those that are installed."""


def contestants(tokenizer: Path, megatron: Path | None) -> tuple[Contestant, ...]:
    """Megatron-LM's tool, or the loop that stands in for it, first; then ours: with extras, without, without any."""
    script = megatron / "tools" / "preprocess_data.py" if megatron else ROOT / "benchmarks" / "megatron_loop.py"
    tool = ROOT / "tools" / "preprocess_data.py"

    def theirs(source: Path, prefix: Path) -> Sequence[str]:
        kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer))
        return (sys.executable, str(script), "--input", str(source), "--output-prefix", str(prefix), *kind, *_ONE)

    def ours(backend: str, *, bare: bool) -> Callable[[Path, Path], Sequence[str]]:
        start = ("-c", _BARE.format(extras=_EXTRAS, tool=str(tool))) if bare else (str(tool),)

        def command(source: Path, prefix: Path) -> Sequence[str]:
            paths = ("--input", str(source), "--output", str(prefix), "--tokenizer", str(tokenizer))
            return (sys.executable, *start, *paths, "--backend", backend, "--overwrite", *_ONE)

        return command

    return (
        Contestant(
            "megatron" if megatron else "megatron_loop",
            theirs,
            "_text_document",
            str(megatron.resolve()) if megatron else "",  # else megatron-core as installed shadows the checkout's own
        ),
        Contestant("gigatoken", ours("gigatoken", bare=False)),
        Contestant("word-cache", ours("word-cache", bare=True)),
        Contestant("reference", ours("reference", bare=True)),
    )


_ONE = ("--workers", "1")


def run(command: Sequence[str], *, first_on_path: str = "") -> Cost:
    """Run to the end, with the packages of a folder before those that are installed.

    Raises:
        DataError: it fails; with the end of what it said.
    """
    variables = os.environ | _VARIABLES
    if first_on_path:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (first_on_path, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        facts, said = Path(folder) / "facts", Path(folder) / "said"
        launch = (sys.executable, "-c", _LAUNCH, str(facts), *command)
        with said.open("wb") as output:
            before = time.monotonic()
            subprocess.run(launch, stdout=output, stderr=output, env=variables, cwd=ROOT, check=True)
            seconds = time.monotonic() - before
        status, cpu_seconds, peak = json.loads(facts.read_text())
        if status:
            raise DataError(f"{' '.join(command[:2])}: {said.read_bytes()[-500:].decode(errors='replace')}")
    return Cost(cpu_seconds, seconds, peak)


def ids_of(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and [documents] lengths of a corpus of one sequence per document, ours or Megatron's."""
    raw = Path(f"{prefix}.idx").read_bytes()
    _, code, sequences, _ = layout.HEADER.unpack_from(raw, len(layout.MAGIC))
    lengths = np.frombuffer(raw, "<i4", sequences, layout.HEADER_BYTES)
    return np.fromfile(f"{prefix}.bin", layout.DTYPES[code]).astype(np.int32, copy=False), lengths


def compare(first: str, second: str) -> int:
    """How many ids both corpora have.

    Raises:
        DataError: they differ.
    """
    for ours, theirs in zip(ids_of(first), ids_of(second), strict=True):
        if not np.array_equal(ours, theirs):
            raise DataError(f"{first} and {second} differ.")
    return len(ids_of(first)[0])


@dataclass(frozen=True)
class Source:
    """A corpus to be."""

    path: Path
    text_bytes: int
    documents: int


def _run(way: Contestant, source: Source, folder: Path) -> Cost:
    prefix = folder / f"{way.name}_{source.path.stem}"
    return run(way.command(source.path, prefix), first_on_path=way.first_on_path)


def measure_speed(
    folder: Path, ways: Sequence[Contestant], long: Source, short: Source, line: Source, rounds: int
) -> Iterator[dict[str, Any]]:
    """Every way over the short corpus, the fast one over the long one too; rounds go through all in turn."""
    base, fast = ways[0], ways[1]
    runs = [(base, line), *((way, short) for way in ways), (fast, long)]
    best: dict[tuple[str, Path], Cost] = {}
    for _ in range(rounds):
        for way, source in runs:
            cost = _run(way, source, folder)
            key = way.name, source.path
            best[key] = min(cost, best.get(key, cost), key=lambda cost: cost.cpu_seconds)
    _run(base, long, folder)  # once, for its ids alone
    start_up = best[base.name, line.path].cpu_seconds
    base_rate = short.text_bytes / _MB / (best[base.name, short.path].cpu_seconds - start_up)
    for way, source in runs[1:]:
        cost = best[way.name, source.path]
        tokens = compare(
            f"{folder}/{way.name}_{source.path.stem}{way.suffix}",
            f"{folder}/{base.name}_{source.path.stem}{base.suffix}",
        )
        subtracted = start_up if way is base else 0.0
        rate = source.text_bytes / _MB / (cost.cpu_seconds - subtracted)
        yield {
            "what": "speed",
            "way": way.name,
            "text_mb": round(source.text_bytes / _MB, 1),
            "documents": source.documents,
            "tokens": tokens,
            "mb_per_cpu_second": round(rate, 2),
            f"ratio_to_{base.name}": round(rate / base_rate, 2),
            "start_up_subtracted": round(subtracted, 2),
            "rounds": rounds,
            **{key: round(value, 2) for key, value in asdict(cost).items()},
        }


def measure_memory(folder: Path, way: Contestant, sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """Peak resident size over a short and a long corpus."""
    peaks = []
    for source in sources:
        cost = run(way.command(source.path, folder / "memory"))
        peaks.append(cost.peak_bytes / _MB)
        yield {
            "what": "memory",
            "way": way.name,
            "text_mb": round(source.text_bytes / _MB, 1),
            "documents": source.documents,
            "peak_mb": round(peaks[-1], 1),
            "growth_mb": round(peaks[-1] - peaks[0], 1),
            "mb_per_cpu_second": round(source.text_bytes / _MB / cost.cpu_seconds, 2),
            "cpu_seconds": round(cost.cpu_seconds, 2),
        }


def environment() -> dict[str, Any]:
    """What every line says about the machine."""
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    named = ("tokenizers", "gigatoken", "orjson", "numpy", "megatron-core")
    return {
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in named},
        "load_average": round(os.getloadavg()[0], 1),
        "commit": sha.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM that can run; absent: its loop, alone")
    parser.add_argument("--mb", type=float, default=86, help="plain text for the fast way; 0: speed is not measured")
    parser.add_argument("--slow-mb", type=float, default=24, help="for the ways that take ten seconds per 24 MB")
    parser.add_argument("--memory-mb", type=float, nargs="*", default=(80, 800), help="none: memory is not measured")
    parser.add_argument("--vocabulary", type=int, default=48_000, help="merges and bytes of the tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the lines to this file as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Make texts and tokenizer, measure, print."""
    arguments = parse(argv)
    if arguments.megatron and not (arguments.megatron / "tools" / "preprocess_data.py").is_file():
        raise DataError(f"--megatron '{arguments.megatron}' is wrong. It has no tools/preprocess_data.py.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts.train(folder / "tokenizer", arguments.vocabulary, int(min(_TRAIN_MB, arguments.mb or _TRAIN_MB) * _MB))
        ways = contestants(folder / "tokenizer", arguments.megatron)

        def source(stem: str, megabytes: float) -> Source:
            path = folder / f"{stem}.jsonl"
            return Source(path, *texts.write(path, texts.documents(), int(megabytes * _MB)))

        lines: list[dict[str, Any]] = []
        if arguments.mb:
            long, short, line = source("long", arguments.mb), source("short", arguments.slow_mb), source("line", 1e-4)
            say(lines, measure_speed(folder, ways, long, short, line, arguments.rounds))
        memory = (source(f"memory{megabytes:g}", megabytes) for megabytes in arguments.memory_mb)
        say(lines, measure_memory(folder, ways[1], list(memory)))
    if arguments.output:
        arguments.output.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def say(lines: list[dict[str, Any]], found: Iterator[dict[str, Any]]) -> None:
    """Print each line as it comes, and keep it."""
    for line in found:
        lines.append({"benchmark": "preprocess", **line, **environment()})
        print(json.dumps(lines[-1]), flush=True)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
