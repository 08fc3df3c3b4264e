"""Where a conversion writes: refused early if it could not be put there at the end. No torch."""

import os
import shutil
from pathlib import Path

from unimega.errors import CheckpointError

MANIFEST = "unimega.json"
"""What says that a folder is an export of ours."""
_LATEST = "latest"
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


def check_checkpoint(target: Path, *, overwrite: bool) -> None:
    """Refuse what is no place for an imported checkpoint.

    Raises:
        CheckpointError: something else is there, or a checkpoint that is not to be replaced.
    """
    if not target.name:
        raise CheckpointError(f"checkpoint {str(target)!r} has no name. Name a new folder.")
    _check_parents(target)
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target.is_dir() and (target / _LATEST).exists()):
        raise CheckpointError(f"{str(target)!r} exists and is not a checkpoint. Name a new folder.")
    if not overwrite:
        raise CheckpointError(
            f"{str(target)!r} holds a checkpoint already. Name a new folder, or replace it with --overwrite."
        )


def check_export(target: Path, *, overwrite: bool) -> Path:
    """Refuse what is no place for an export; where to write until it is whole.

    Raises:
        CheckpointError: something else is there, or an export that is not to be replaced.
    """
    if not target.name:
        raise CheckpointError(f"OUT={str(target)!r} has no name. Name a new folder.")
    _check_parents(target)
    partial = target.absolute().with_name(f"{target.name}.tmp")
    if os.path.lexists(partial) and not (partial / MANIFEST).is_file():
        raise CheckpointError(
            f"{str(partial)!r} is in the way and is not of a killed export. Move it, or name another."
        )
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return partial
    if not (target / MANIFEST).is_file():
        raise CheckpointError(f"{str(target)!r} exists and is not an export. Name a new folder.")
    if not overwrite:
        raise CheckpointError(f"{str(target)!r} holds an export already. Name a new folder, or give --overwrite.")
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
    old = partial.with_name(f"{target.name}.old-{os.getpid()}")
    replaced = target.exists() and any(target.iterdir())
    if replaced:
        os.replace(target, old)
    os.replace(partial, target)
    sync(target.absolute().parent)
    if replaced:
        shutil.rmtree(old)


def sync(path: Path) -> None:
    """Make a file or the names in a folder survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_parents(target: Path) -> None:
    """A folder can be made there."""
    parent = next(one for one in target.absolute().parents if one.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "is not writable" if parent.is_dir() else "is not a folder"
        raise CheckpointError(f"{str(target)!r} cannot be made: {str(parent)!r} {what}. Name another place.")
