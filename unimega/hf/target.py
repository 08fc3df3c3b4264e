"""Where a conversion writes: refused early if it could not be put there at the end. No torch."""

import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from unimega.errors import CheckpointError

MANIFEST = "unimega.json"
"""What says that a folder is an export of ours."""
GENERATION = "generation_config.json"
TOKENIZER_FOLDER = "tokenizer"
"""In a folder of steps that was imported: the tokenizer's files."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Kind:
    """What a conversion writes, and how its own folders are told from those of others."""

    name: str
    marker: str
    """The first entry that is written, also of what is not whole yet."""
    entries: tuple[str, ...]
    """Patterns of all that there may be below the folder: nothing else is ever removed."""


CHECKPOINT = Kind(
    "a converted checkpoint",
    marker="step-00000000",
    entries=(
        "latest",
        "model.toml",
        "step-00000000",
        *(f"step-00000000/{name}" for name in ("__0_0.distcp", ".metadata*", "common.pt")),
        *(f"step-00000000/{name}.json" for name in ("metadata", "model", "manifest")),
        TOKENIZER_FOLDER,
        *(f"{TOKENIZER_FOLDER}/{name}" for name in (*TOKENIZER_FILES, "config.json")),
    ),
)
EXPORT = Kind(
    "an export",
    marker=MANIFEST,
    entries=(
        MANIFEST,
        "config.json",
        GENERATION,
        "model*.safetensors",
        "model.safetensors.index.json",
        "modeling_unix.py",
        "adapter_config.json",
        "adapter_model.safetensors",
        *TOKENIZER_FILES,
    ),
)


def check_target(target: Path, kind: Kind, *, overwrite: bool) -> Path:
    """Refuse what is no place for a conversion; where to write until it is whole, and ``put`` takes it from there.

    Raises:
        CheckpointError: something else is there, one of the kind that is not to be replaced, or one with files that
            no conversion wrote.
    """
    if not target.name:
        raise CheckpointError(f"{str(target)!r} has no name. Name a new folder.")
    _check_parents(target)
    place = target.resolve()  # of a link the folder is replaced, not the link
    partial = place.with_name(f".{place.name}.partial")
    if not _is_free(partial) and (not _is(partial, kind) or _strange(partial, kind)):
        raise CheckpointError(
            f"{str(partial)!r} is in the way and is not of a conversion that was killed. Move it, or name another."
        )
    if _is_free(target):
        return partial
    if not _is(target, kind):
        raise CheckpointError(f"{str(target)!r} exists and is not {kind.name}. Name a new folder.")
    if not overwrite:
        raise CheckpointError(
            f"{str(target)!r} holds {kind.name} already. Name a new folder, or replace it with --overwrite."
        )
    if strange := _strange(target, kind):
        raise CheckpointError(
            f"{str(target)!r} holds {strange!r}, which is no part of {kind.name} and would be lost. "
            "Move it away, or name a new folder."
        )
    return partial


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer that are there."""
    source = source.parent if source.is_file() else source
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def put(partial: Path, target: Path) -> None:
    """Give the finished folder its name; what was there is away only once the new one is in place."""
    sync(partial)
    target = target.resolve()
    old = partial.with_name(f".{target.name}.old-{os.getpid()}")
    replaced = target.exists()
    if replaced:
        os.replace(target, old)
    os.replace(partial, target)
    sync(target.parent)
    if replaced:
        shutil.rmtree(old)


def sync(path: Path) -> None:
    """Make a file or the names in a folder survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_free(place: Path) -> bool:
    """Nothing is there, or an empty folder."""
    return not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))


def _is(folder: Path, kind: Kind) -> bool:
    return folder.is_dir() and (folder / kind.marker).exists()


def _strange(folder: Path, kind: Kind) -> str:
    """Something below the folder that no conversion writes; empty: there is nothing."""
    found = (one.relative_to(folder).as_posix() for one in folder.rglob("*"))
    return next((name for name in found if not any(fnmatchcase(name, one) for one in kind.entries)), "")


def _check_parents(target: Path) -> None:
    """A folder can be made there."""
    parent = next(one for one in target.absolute().parents if one.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "is not writable" if parent.is_dir() else "is not a folder"
        raise CheckpointError(f"{str(target)!r} cannot be made: {str(parent)!r} {what}. Name another place.")
