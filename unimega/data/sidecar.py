"""Read `PREFIX.json`: every entry that a reader relies on is there and of its type."""

import json
from pathlib import Path
from typing import Any

from unimega.data import format as layout
from unimega.data.files import read_bytes
from unimega.errors import DataError

_COUNT, _NAME, _SUM = "a whole number", "a string", "8 hexadecimal digits"
_ENTRIES = {
    "tokenizer.size": _COUNT,
    "tokenizer.sha256": _NAME,
    "tokenizer.special": "a table",
    "vocabulary.text": _COUNT,
    "vocabulary.codebook": "a whole number or null",
    "counts.documents": _COUNT,
    "counts.sequences": _COUNT,
    "counts.images": _COUNT,
    "bin.bytes": _COUNT,
    "bin.block_bytes": _COUNT,
    "bin.crc32": "a list",
    "idx.bytes": _COUNT,
    "idx.crc32": _SUM,
    "sources": "a list",
}
_OPTIONAL = {
    "tokenizer.path": _NAME,
    "counts.tokens": "a table of whole numbers",
    "counts.text_documents_with_eos": _COUNT,
}
_DIRECTIONS = ("both", "t2i", "i2t")


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The content of a sidecar; None if there is none.

    Raises:
        DataError: it cannot be read, is of another version, or an entry is missing or of another type.
    """
    data = read_bytes(path)
    if data is None:
        return None
    try:
        sidecar = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"not JSON: {error}") from error
    if not isinstance(sidecar, dict):
        raise _refusal(path, f"a JSON {type(sidecar).__name__}")
    for key in ("format", "version"):
        if key not in sidecar:
            raise _refusal(path, f"{key} is missing")
    if (sidecar["format"], sidecar["version"]) != (layout.SIDECAR_FORMAT, layout.SIDECAR_VERSION):
        raise DataError(
            f"{path}: format {sidecar['format']!r} version {sidecar['version']!r}, this reader knows "
            f"{layout.SIDECAR_FORMAT!r} version {layout.SIDECAR_VERSION}."
        )
    for key, kind in _ENTRIES.items():
        _check_entry(path, sidecar, key, kind)
    for key, kind in _OPTIONAL.items():
        table, name = key.split(".")
        if name in sidecar[table]:
            _check_entry(path, sidecar, key, kind)
    _check_special(path, sidecar["tokenizer"]["special"])
    _check_sums(path, sidecar["bin"])
    _check_sources(path, sidecar["sources"])
    return sidecar


def _check_entry(path: Path, sidecar: dict[str, Any], key: str, kind: str) -> None:
    value: Any = sidecar
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _refusal(path, f"{key} is missing")
        value = value[part]
    if not _is(value, kind):
        raise _refusal(path, f"{key}={value!r:.60} is not {kind}")


def _is(value: Any, kind: str) -> bool:
    whole = _is_count(value)
    return {
        _COUNT: whole,
        _NAME: isinstance(value, str),
        _SUM: isinstance(value, str) and len(value) == 8,
        "a table": isinstance(value, dict),
        "a table of whole numbers": isinstance(value, dict) and all(map(_is_count, value.values())),
        "a list": isinstance(value, list),
        "a whole number or null": whole or value is None,
    }[kind]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_special(path: Path, special: dict[str, Any]) -> None:
    """Each is an id, a list of ids, or null."""
    for name, value in special.items():
        for one in value if isinstance(value, list) else [value]:
            if value is not None and not _is_count(one):
                raise _refusal(path, f"tokenizer.special.{name}={value!r:.60} is no id")


def _check_sums(path: Path, entry: dict[str, Any]) -> None:
    """As many sums as blocks: a list that is too short would leave the end of `.bin` unchecked."""
    blocks = -(-entry["bytes"] // max(1, entry["block_bytes"]))
    if entry["block_bytes"] == 0 or len(entry["crc32"]) != blocks or not all(_is(s, _SUM) for s in entry["crc32"]):
        raise _refusal(path, f"bin.crc32 does not hold {blocks} sums of blocks of {entry['block_bytes']} bytes")


def _check_sources(path: Path, sources: list[Any]) -> None:
    before = 0
    for number, source in enumerate(sources):
        name = f"sources[{number}]"
        if not isinstance(source, dict) or not {"path", "first_document"} <= source.keys():
            raise _refusal(path, f"{name}.path or .first_document is missing")
        first, direction = source["first_document"], source.get("direction", "both")
        if not _is(source.get("documents", 0), _COUNT):
            raise _refusal(path, f"{name}.documents={source['documents']!r:.60} is not {_COUNT}")
        if not _is(source["path"], _NAME) or not _is(first, _COUNT) or first < before or direction not in _DIRECTIONS:
            raise _refusal(path, f"{name} has path={source['path']!r:.60}, {first=!r:.20}, {direction=!r:.20}")
        before = first


def _refusal(path: Path, why: str) -> DataError:
    return DataError(f"{path}: not a sidecar of {layout.SIDECAR_FORMAT} ({why}). {layout.DAMAGED}")
