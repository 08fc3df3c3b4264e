"""Where a measurement was taken: what every line of the benchmarks says of its device, versions and commit."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from unimega import backend

PACKAGES = ("triton", "megatron-core", "liger-kernel", "flash-attn", "transformer-engine", "apex")


@functools.cache
def environment() -> dict[str, Any]:
    """Device, threads, versions of what is installed, commit and date."""
    device = backend.current().device
    return {
        "device": processor() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()} | _installed(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def processor() -> str:
    """The name that the system gives the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, {len(named)} cores" if named else platform.processor() or platform.machine()


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
