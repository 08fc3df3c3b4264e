"""Rows of parquet files, a few at a time, with only the columns that a row of any kind may have."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unimega.data.preparing.files import Raw, too_long
from unimega.data.records.kinds import OTHER_CAPTION
from unimega.data.records.row import FIELDS
from unimega.errors import DataError, optional

_KNOWN = frozenset(
    (
        *FIELDS,
        OTHER_CAPTION,
        "messages",
        "image_path",
        "image_bytes",
        "image_base64",
        "video",
        "videos",
        "audio",
        "voice",
    )
)
_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1024


def row_groups(path: str, shown: str, *, task_bytes: int) -> tuple[tuple[int, int], ...]:
    """Runs [first, stop) of row groups of about ``task_bytes`` each.

    Raises:
        DataError: not a parquet file, or damaged.
    """
    metadata = _open(path, shown).metadata
    spans, first, size = [], 0, 0
    for number in range(metadata.num_row_groups):
        size += metadata.row_group(number).total_byte_size
        if size >= task_bytes or number == metadata.num_row_groups - 1:
            spans.append((first, number + 1))
            first, size = number + 1, 0
    return tuple(spans)


def rows(path: str, shown: str, span: tuple[int, int], *, fields: Mapping[str, str], limit: int) -> Iterator[Raw]:
    """The rows of a run of row groups, numbered within the file.

    Raises:
        DataError: the file is damaged, or has no column that is known.
    """
    file = _open(path, shown)
    library = optional("pyarrow", extra="data")
    names = file.schema_arrow.names
    wanted = _wanted(names, fields, shown)
    number = sum(file.metadata.row_group(group).num_rows for group in range(span[0]))
    for group in range(*span):
        metadata = file.metadata.row_group(group)
        mean = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // mean))
        try:
            for batch in file.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
                bytes_of_row = max(1, batch.nbytes // max(1, batch.num_rows))
                columns = [_values(batch.column(place), library) for place in range(batch.num_columns)]
                for values in zip(*columns, strict=True):
                    number += 1
                    fields_of_row = dict(zip(batch.schema.names, values, strict=True))
                    held = sum(len(value) for value in values if isinstance(value, str | bytes | np.ndarray))
                    content: Any = fields_of_row if held <= limit else too_long(held, limit)
                    yield Raw(number, -1, bytes_of_row, content)
        except (library.ArrowException, OSError) as error:
            raise _damaged(shown, error) from error


def _wanted(names: list[str], fields: Mapping[str, str], shown: str) -> list[str]:
    known = set(fields.values()) | {"data_type"} if fields else _KNOWN
    wanted = [name for name in names if name in known or (not fields and name.startswith("vqcode_"))]
    if not wanted:
        raise DataError(
            f"{shown}: no column is known; found: {', '.join(names)}. Name them: fields = {{text = '{names[0]}'}}."
            if names
            else f"{shown}: no columns."
        )
    return wanted


def _values(column: Any, library: Any) -> Any:
    """A column as Python values; lists of integers as views, which is what codes and ids are."""
    kind = column.type
    is_list = library.types.is_list(kind) or library.types.is_large_list(kind)
    if is_list and library.types.is_integer(kind.value_type) and not column.values.null_count:
        flat = column.values.to_numpy(zero_copy_only=False)
        offsets = column.offsets.to_pylist()
        valid = column.is_valid().to_pylist()
        return [flat[offsets[place] : offsets[place + 1]] if there else None for place, there in enumerate(valid)]
    return column.to_pylist()


def _open(path: str, shown: str) -> Any:
    library = optional("pyarrow", extra="data")
    try:
        return optional("pyarrow.parquet", extra="data").ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (library.ArrowException, OSError) as error:
        raise _damaged(shown, error) from error


def _damaged(shown: str, error: Exception) -> DataError:
    return DataError(f"{shown}: not parquet, damaged or cut ({' '.join(str(error).split())}). Copy the file again.")
