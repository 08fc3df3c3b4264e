"""What bench_data.py measures of packing, index, reads and loading, each beside what others offer."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixes
import numpy as np
import numpy.typing as npt

from unimega.data import native, packing
from unimega.data.corpus import Source
from unimega.data.loader import Place, step_batches
from unimega.data.plan import DataPlan, Recipe
from unimega.data.reader import IndexedCorpus
from unimega.errors import UnimegaError

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark was asked for."""

    folder: Path
    """Where corpora are written, and found again."""
    quick: bool = False
    megatron: str = ""
    """A checkout of Megatron-LM, for preprocessing."""


ROUNDS = 3
PACK_LENGTH = 10_240


def best(runs: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Least processor seconds of each over the rounds; each round runs all, starting one further on."""
    names = list(runs)
    seconds = dict.fromkeys(names, float("inf"))
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            start = time.process_time()
            runs[name]()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def packing_part(settings: Settings) -> Iterator[Record]:
    """Whole documents into packs of 10,240, those that are longer dropped and counted."""
    count = 100_000 if settings.quick else 1_000_000
    for name in mixes.SHARES:
        lengths = mixes.mix(name, count).assembled()
        fits = lengths[lengths <= PACK_LENGTH]
        made: dict[str, packing.Packs] = {}

        def run(which: str, pack: Callable[..., packing.Packs], fits: Any = fits, made: Any = made) -> None:
            made[which] = pack(fits, PACK_LENGTH)

        runs: dict[str, Callable[[], None]] = {"python": lambda run=run: run("python", packing.best_fit_python)}  # type: ignore[misc]
        if native.helper is not None:
            runs["c++"] = lambda run=run: run("c++", packing.best_fit)  # type: ignore[misc]
        seconds = best(runs)
        for which, packs in made.items():
            used = np.add.reduceat(fits[packs.items], packs.starts[:-1])
            once = np.array_equal(np.sort(packs.items), np.arange(len(fits)))
            dropped = int(lengths.sum() - fits.sum())
            yield {
                "part": "packing",
                "contestant": which,
                "mix": name,
                "documents": count,
                "pack_length": PACK_LENGTH,
                "cpu_seconds": round(seconds[which], 4),
                "filled": round(float(fits.sum() / (packs.num_packs * PACK_LENGTH)), 5),
                "packs": packs.num_packs,
                "tokens_in": int(lengths.sum()),
                "tokens_placed": int(used.sum()),
                "tokens_dropped": dropped,
                "every_document_once_and_whole": bool(once and used.max() <= PACK_LENGTH),
                "equal_to_python": bool(
                    np.array_equal(packs.items, made["python"].items)
                    and np.array_equal(packs.starts, made["python"].starts)
                ),
            }


def index_part(settings: Settings) -> Iterator[Record]:
    """An index of ten million documents: opened, then checked; each in a process of its own."""
    count = 1_000_000 if settings.quick else 10_000_000
    prefix = settings.folder / "many"
    if not Path(f"{prefix}.idx").exists():
        draw = np.random.default_rng(0)
        lengths = draw.integers(1, 200, count).astype(np.int32)
        mixes.write_index_only(prefix, lengths)
    for contestant in ("ours", "IndexedDataset"):
        records = []
        for _ in range(ROUNDS):
            command = [sys.executable, str(Path(__file__).parent / "opening.py"), contestant, str(prefix)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            records.append(json.loads(done.stdout.splitlines()[-1]))
        fastest = {key: min(record[key] for record in records) for key in records[0]}
        yield {"part": "index", "contestant": contestant, "documents": count, **fastest}


def reads_part(settings: Settings) -> Iterator[Record]:
    """One sequence at a time, at random, from a warm cache."""
    prefix = _corpus(settings)
    ours = IndexedCorpus(prefix)
    picks = np.random.default_rng(1).integers(0, ours.sequences, 20_000).tolist()
    theirs = _indexed_dataset(prefix, multimodal=True)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: [ours.sequence(number) for number in picks],
        "IndexedDataset": lambda: [theirs.get(number) for number in picks],
    }
    rows = _arrow(settings.folder, [ours.sequence(number) for number in range(min(ours.sequences, 20_000))])
    if rows is None:
        yield {"part": "reads", "contestant": "datasets", "skipped": "pip install datasets"}
    else:
        some = [number % len(rows) for number in picks]
        runs["datasets"] = lambda: [rows[number]["ids"] for number in some]
    for contestant, seconds in best(runs).items():
        microseconds = round(seconds / len(picks) * 1e6, 2)
        yield {"part": "reads", "contestant": contestant, "reads": len(picks), "us_per_read": microseconds}


def loader_part(settings: Settings) -> Iterator[Record]:
    """Micro-batches of one rank, one pack each, from a warm cache; in one thread, which is the loader's own work."""
    prefix = _corpus(settings)
    tokens = (1 << 21) if settings.quick else 20_480_000
    documents = mixes.mix("A", _documents(settings), seed=3).assembled()
    plain = mixes.write_plain(settings.folder / "plain", documents)
    for length in (2_176, PACK_LENGTH, 20_480):
        count = tokens // length
        runs: dict[str, Callable[[], Any]] = {}
        for name, helper in (("c++", native.helper), ("numpy", None)):
            if helper is None and name == "c++":
                continue
            runs[f"ours, {name}"] = _ours(prefix, length, count, helper)
        for name, resets in (("GPTDataset", False), ("GPTDataset, document resets", True)):
            runs[name] = _gpt_dataset(settings.folder, plain, length, count, resets=resets)
        rows = _arrow(settings.folder, _documents_of(plain, 5_000))
        if rows is None:
            yield {"part": "loader", "contestant": "datasets, rows of ids", "skipped": "pip install datasets"}
        else:
            runs["datasets, rows of ids"] = _reads_of(rows, tokens)
        for contestant, seconds in best(runs).items():
            yield {
                "part": "loader",
                "contestant": contestant,
                "pack_length": length,
                "packs": count,
                "us_per_pack": round(seconds / count * 1e6, 1),
                "tokens_per_cpu_second": round(count * length / seconds),
            }


def plan_part(settings: Settings) -> Iterator[Record]:
    """Opening, planning and packing of one window of 2^28 tokens."""
    prefix = _corpus(settings)
    helper = native.helper
    planned: dict[str, DataPlan] = {}

    def run(name: str) -> None:
        native.helper = helper if name == "c++" else None
        planned[name] = _plan(prefix, PACK_LENGTH)
        native.helper = helper

    names = ["c++", "numpy"] if helper is not None else ["numpy"]
    for name, seconds in best({name: lambda name=name: run(name) for name in names}).items():  # type: ignore[misc]
        window = planned[name].window_of(0)
        assert window is not None
        items = len(window.document)
        yield {
            "part": "plan",
            "contestant": name,
            "items": items,
            "cpu_seconds": round(seconds, 3),
            "cpu_seconds_per_million": round(seconds / items * 1e6, 3),
            "plan": window.hash(),
        }


def preprocess_part(settings: Settings) -> Iterator[Record]:
    """Plain text to ids beside Megatron-LM's tool: bench_preprocess.py, which has more options of its own."""
    command = [sys.executable, str(Path(__file__).parent / "bench_preprocess.py")]
    command += ["--megatron", settings.megatron] if settings.megatron else []
    command += ["--mb", "4", "--slow-mb", "2", "--rounds", "1", "--memory-mb"] if settings.quick else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            yield {"part": "preprocess", **json.loads(line)}
    if running.returncode:
        raise UnimegaError("bench_preprocess.py failed; its own line is above.")


PARTS: dict[str, Callable[[Settings], Iterator[Record]]] = {
    "packing": packing_part,
    "plan": plan_part,
    "index": index_part,
    "reads": reads_part,
    "loader": loader_part,
    "preprocess": preprocess_part,
}


def _documents(settings: Settings) -> int:
    return 6_000 if settings.quick else 60_000


def _corpus(settings: Settings) -> Path:
    """Mix A on disk, written once."""
    prefix = settings.folder / "mix"
    if not Path(f"{prefix}.idx").exists():
        mixes.write(prefix, mixes.mix("A", _documents(settings), seed=3))
    return prefix


def _plan(prefix: Path, length: int) -> DataPlan:
    recipe = Recipe(pack_length=length, templates="none", overlong="split_text")
    return DataPlan([Source(path=str(prefix))], mixes.VOCABULARY, recipe)


def _ours(prefix: Path, length: int, count: int, helper: Any) -> Callable[[], None]:
    plan, place = _plan(prefix, length), Place(global_batch_packs=1, micro_batch_packs=1)

    def run() -> None:
        before, native.helper = native.helper, helper
        try:
            for _ in step_batches(plan, place, [1.0, 1.0], last_step=count):
                pass
        finally:
            native.helper = before

    return run


def _indexed_dataset(prefix: Path, *, multimodal: bool) -> Any:
    importlib.import_module("unimega.parallel")  # before megatron: it redirects what is CUDA's
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix), multimodal=multimodal)


def _gpt_dataset(folder: Path, prefix: Path, length: int, count: int, *, resets: bool) -> Callable[[], None]:
    """megatron-core's dataset as a run of one corpus builds it, without its dense mask of T x T."""
    data = _indexed_dataset(prefix, multimodal=False)
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(
        vocab_size=mixes.VOCABULARY.rows,
        eod=mixes.EOS,
        pad=mixes.PAD,
        unique_identifiers={"class": "made"},
        special_tokens_dict={},
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=resets,
        reset_attention_mask=resets,
        eod_mask_loss=resets,
        create_attention_mask=False,
    )
    numbers = np.arange(len(data), dtype=np.int32)
    dataset = GPTDataset(data, str(prefix), numbers, None, Split.train, config)

    def run() -> None:
        for number in range(count):
            dataset[number % len(dataset)]

    return run


def _documents_of(prefix: Path, count: int) -> list[npt.NDArray[np.int32]]:
    data = IndexedCorpus(prefix, megatron=True)
    return [data.sequence(number) for number in range(min(count, data.sequences))]


def _arrow(folder: Path, rows: list[npt.NDArray[np.int32]]) -> Any:
    """Rows of ids as a memory-mapped `datasets` table, or None without the package."""
    try:
        datasets, arrow = importlib.import_module("datasets"), importlib.import_module("pyarrow")
    except ImportError:
        return None
    file = str(folder / "rows.arrow")
    table = arrow.table({"ids": arrow.array(rows, type=arrow.list_(arrow.int32()))})
    with arrow.OSFile(file, "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)  # as `datasets` itself writes
    mapped = datasets.table.MemoryMappedTable.from_file(file)
    return datasets.Dataset(mapped, fingerprint="rows").with_format("numpy")


def _reads_of(rows: Any, tokens: int) -> Callable[[], None]:
    """Rows at random until so many tokens are read: no packing, labels or order."""
    order = np.random.default_rng(2).permutation(len(rows)).tolist()

    def run() -> None:
        found = at = 0
        while found < tokens:
            found += len(rows[order[at % len(order)]]["ids"])
            at += 1

    return run
