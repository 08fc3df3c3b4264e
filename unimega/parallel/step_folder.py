"""Steps on disk: a folder that is whole once it has its name, a manifest to prove it, and the way to the newest.

A folder of steps holds ``step-00000004``, ``step-00000008``, ... and ``latest``, the name of the newest. A step is
written as ``step-00000008.<token>.tmp``, made durable, and renamed; a step that is removed gets such a name first. So
what a killed run leaves behind ends in ``.tmp``, and ``clean`` takes it away.
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unimega.errors import CheckpointError

MODEL_FILE = "model.json"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
TEMPORARY = ".tmp"
_STEP = re.compile(r"step-(\d{8,})")
_BLOCK_BYTES = 1 << 20
_VERSION = 1

Seal = tuple[int, int]
"""Bytes of a file and their CRC-32."""


def step_folder(directory: Path, step: int) -> Path:
    """Where a step lies in a folder of steps."""
    return directory / f"step-{step:08d}"


def steps(directory: Path) -> list[int]:
    """The steps of a folder, oldest first."""
    if not directory.is_dir():
        return []
    found = (_STEP.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def read_latest(directory: Path) -> str:
    """The name in ``latest``; empty if there is none or it is no name of a step."""
    try:
        name = (directory / LATEST_FILE).read_text(errors="replace").strip()
    except OSError:
        return ""
    return name if _STEP.fullmatch(name) else ""


def resolve_step(path: str | os.PathLike[str]) -> Path:
    """The folder of one step: ``path`` itself, or what its ``latest`` names.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not there. Name a checkpoint: a folder of steps or one step's folder.")
    if any((path / name).exists() for name in (MANIFEST_FILE, "metadata.json")):
        return path
    there = steps(path)
    named = read_latest(path)
    if not there:
        raise CheckpointError(f"{path}: holds no checkpoint (no step folder, no {MANIFEST_FILE}).")
    newest = step_folder(path, there[-1])
    if not named:
        what = "names no step" if (path / LATEST_FILE).exists() else "is missing"
        raise CheckpointError(f"{path / LATEST_FILE}: {what}. Name a step's folder, e.g. {newest}.")
    if not (path / named).is_dir():
        raise CheckpointError(f"{path / LATEST_FILE}: names {named}, which is not there. Name a step, e.g. {newest}.")
    return path / named


def read_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description stored with the weights.

    Raises:
        CheckpointError: it is missing, or not what was written.
    """
    step = resolve_step(path)
    if fault := find_fault(step, [MODEL_FILE]):
        raise damaged(step, fault)
    try:
        return _read_json(step / MODEL_FILE)
    except _Fault as fault:
        raise damaged(step, str(fault)) from None


def damaged(step: Path, fault: str) -> CheckpointError:
    """The line for a step that is not what was written."""
    return CheckpointError(f"{step}: damaged or not whole ({fault}). Take another step.")


def seal(file: Path) -> Seal:
    """Size and checksum of a file; reads it at about 4 GB/s where zlib has the instructions."""
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return size, checksum


def write_manifest(step: Path, seals: Mapping[str, Seal]) -> None:
    """Write down what every file of the step must be, and make the folder durable."""
    files = {name: {"bytes": size, "crc32": f"{checksum:08x}"} for name, (size, checksum) in sorted(seals.items())}
    write_durably(step / MANIFEST_FILE, json.dumps({"version": _VERSION, "files": files}, indent=1))
    sync(step)


def find_fault(step: Path, names: Iterable[str] | None = None) -> str | None:
    """The first file that is not as the manifest says, and how; None if all are.

    Args:
        step: a step's folder.
        names: only these files; None: all of them.
    """
    try:
        manifest = _read_manifest(step)
    except _Fault as fault:
        return str(fault)
    for name in manifest if names is None else names:
        if name not in manifest:
            return f"{name} is not in {MANIFEST_FILE}"
        size, checksum = manifest[name]
        try:
            there = (step / name).stat().st_size
            if there != size:
                return f"{name} has {there} bytes, {size} were written"
            if seal(step / name)[1] != checksum:
                return f"{name} has another checksum than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def shares(step: Path, ranks: int) -> list[list[str]]:
    """The files of a step in equal parts by size, a part for each rank to check; empty ones without a manifest."""
    try:
        manifest = _read_manifest(step)
    except _Fault:
        manifest = {}
    parts: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(manifest, key=lambda name: (-manifest[name][0], name)):
        rank = loads.index(min(loads))
        parts[rank].append(name)
        loads[rank] += manifest[name][0]
    return parts


def publish(temporary: Path, final: Path) -> None:
    """Give a finished step its name and point ``latest`` at it; a step of that name gives way."""
    directory = final.parent
    if final.exists():
        _set_aside(final)
    os.replace(temporary, final)
    sync(directory)
    name = directory / f"{LATEST_FILE}{TEMPORARY}"
    write_durably(name, final.name)
    os.replace(name, directory / LATEST_FILE)
    sync(directory)
    clean(directory)


def keep_newest(directory: Path, step: int, keep: int) -> list[Path]:
    """Remove steps older than ``step`` so that ``keep`` remain with it; ``step`` is whole and stays.

    A newer step than the one just written is left alone: it is of before a restart, and will be written again.

    Returns:
        What was removed.
    """
    older = [number for number in steps(directory) if number < step]
    removed = [step_folder(directory, number) for number in older[: max(0, len(older) - (keep - 1))]]
    for folder in removed:
        _set_aside(folder)
    sync(directory)
    clean(directory)
    return removed


def clean(directory: Path, *, but: Path | None = None) -> None:
    """Remove what killed saves and removals left behind.

    Args:
        directory: a folder of steps.
        but: a temporary folder that is being written.
    """
    if not directory.is_dir():
        return
    for entry in directory.iterdir():
        if not entry.name.endswith(TEMPORARY) or entry == but:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()


def write_durably(file: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(folder: Path) -> None:
    """A name under which nobody takes it for a step: removing takes time, and may be cut off half-way."""
    aside = folder.with_name(f"{folder.name}.old{TEMPORARY}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)


class _Fault(Exception):
    """A file is not as it was written; the text says which and how."""


def _read_manifest(step: Path) -> dict[str, Seal]:
    """Size and checksum by file name."""
    files: Any = _read_json(step / MANIFEST_FILE).get("files")
    try:
        seals = {name: (int(said["bytes"]), int(said["crc32"], 16)) for name, said in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        seals = {}
    if MODEL_FILE not in seals:
        raise _Fault(f"{MANIFEST_FILE} is not as it was written")
    return seals


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(errors="replace"))
    except json.JSONDecodeError as error:
        raise _Fault(f"{file.name} is cut off or changed at line {error.lineno}") from None
    except FileNotFoundError:
        raise _Fault(f"{file.name} is missing") from None
    except OSError as error:
        raise _Fault(f"{file.name} cannot be read: {error.strerror}") from None
    if not isinstance(found, dict):
        raise _Fault(f"{file.name} is not as it was written")
    return found
