"""Open and check an index in a fresh process; bench_data.py reads the line: python opening.py CONTESTANT PREFIX."""

import importlib
import json
import sys
import time
from pathlib import Path


def resident_kb() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def main(contestant: str, prefix: str) -> None:
    """Print seconds and memory of opening, and of checking where the contestant checks anything."""
    importlib.import_module("unimega.parallel")  # before megatron, and for both: it redirects what is CUDA's
    reader = importlib.import_module("unimega.data.reader")
    theirs = importlib.import_module("megatron.core.datasets.indexed_dataset")
    memory, start = resident_kb(), time.process_time()
    is_ours = contestant == "ours"
    corpus = reader.IndexedCorpus(prefix) if is_ours else theirs.IndexedDataset(prefix, multimodal=True)
    record = {"open_cpu_ms": round((time.process_time() - start) * 1e3, 3), "open_mb": (resident_kb() - memory) / 1e3}
    if is_ours:
        start = time.process_time()
        corpus.check()
        record["check_all_cpu_seconds"] = round(time.process_time() - start, 3)
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
