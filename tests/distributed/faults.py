"""What can happen to a step on a disk, for tests."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path


def seal_again(step: Path, name: str) -> None:
    """Make a changed file what the manifest says."""
    manifest = json.loads((step / "manifest.json").read_text())
    data = (step / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    (step / "manifest.json").write_text(json.dumps(manifest))


def shard(step: Path) -> Path:
    """The largest file: weights and states."""
    return max(step.glob("*.distcp"), key=lambda file: file.stat().st_size)


def flip(file: Path, *, at: float = 0.5) -> None:
    """Flip one bit, so far into the file."""
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 16
    file.write_bytes(data)


def cut(file: Path) -> None:
    """Lose the second half."""
    os.truncate(file, file.stat().st_size // 2)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in a shard": (lambda step: flip(shard(step)), ".distcp has another checksum"),
    "flipped bit at the end of a shard": (lambda step: flip(shard(step), at=0.999), ".distcp has another checksum"),
    "truncated shard": (lambda step: cut(shard(step)), ".distcp has "),
    "missing shard": (lambda step: shard(step).unlink(), ".distcp is missing"),
    "truncated .metadata": (lambda step: cut(step / ".metadata"), ".metadata has "),
    "missing .metadata": (lambda step: (step / ".metadata").unlink(), ".metadata is missing"),
    "missing metadata.json": (lambda step: (step / "metadata.json").unlink(), "metadata.json is missing"),
    "missing common.pt": (lambda step: (step / "common.pt").unlink(), "common.pt is missing"),
    "truncated manifest": (lambda step: cut(step / "manifest.json"), "manifest.json is cut off"),
    "empty manifest": (lambda step: os.truncate(step / "manifest.json", 0), "manifest.json is cut off"),
    "missing manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json is missing"),
    "flipped bit in model.json": (lambda step: flip(step / "model.json"), "model.json has another checksum"),
    "truncated model.json": (lambda step: cut(step / "model.json"), "model.json has "),
    "missing training.json": (lambda step: (step / "training.json").unlink(), "training.json is missing"),
    "truncated training.json": (lambda step: cut(step / "training.json"), "training.json has "),
}
"""By name: how a step is damaged, and what the line about it says."""
