"""The JSON files of a Hugging Face folder. No torch, so that mistakes are answered at once."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

from unimega.errors import CheckpointError


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is not a folder. Give one with config.json and safetensors.")
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        CheckpointError: it is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path.parent)!r} has no {path.name}. Give a Hugging Face folder.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(values).__name__}, not an object.")
    return values


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of all tensors, by the headers of the files alone; what cannot be read has none, and is refused later."""
    names = [_header(path) for path in folder.glob("*.safetensors")]
    return frozenset(chain.from_iterable(names)) - {"__metadata__"}


def _header(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return list(json.loads(file.read(min(size, path.stat().st_size))))
    except (OSError, ValueError):
        return []
