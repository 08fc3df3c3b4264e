"""python benchmarks/bench_data.py [--only PART ...] [--folder DIR] [--megatron PATH] [--output FILE] [--quick]

Measure the data path beside megatron-core's and Hugging Face's, in one run: a JSON line for each part and contestant.
Seconds are processor seconds, the least of three; contestants take turns, so that what else a machine does falls on
all alike. Parts: see ``data_parts.py``.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from data_parts import PARTS, Settings

from unimega.data import native
from unimega.errors import run_cli

PACKAGES = ("numpy", "megatron-core", "datasets", "pyarrow")


def environment() -> dict[str, Any]:
    """Where and with what the run was made."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).parent
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
        "helper": native.helper is not None,
        "commit": sha.stdout.strip() or None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The name of the processor, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: Sequence[str]) -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument(
        "--folder", help="where the corpora are written, 1 GB, and found again; absent: a temporary folder"
    )
    parser.add_argument("--megatron", default="", help="a checkout of Megatron-LM, to preprocess beside its tool")
    parser.add_argument("--output", help="append the lines to this file as well")
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents: to see that it runs")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(folder, options.quick, options.megatron)
        for part in options.only:
            for record in PARTS[part](settings):
                line = json.dumps(environment() | record)
                print(line, flush=True)
                if options.output:
                    with Path(options.output).open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
