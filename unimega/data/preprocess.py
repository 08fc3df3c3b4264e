"""jsonl files to one corpus: rows, ids, `.bin/.idx/.json`; all or nothing."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import unimega
from unimega.data import format as layout
from unimega.data.records.kinds import row_of_json
from unimega.data.records.row import BadRow, Row, Rules, Segment
from unimega.data.tokenize import TextTokenizer
from unimega.data.writer import CorpusWriter
from unimega.errors import DataError

_BLOCK_ROWS = 1000
"""Rows tokenised together: enough for the tokenizer's own parallelism, little memory."""
_MAX_ROW_BYTES = 64 << 20
_MAX_SOURCES = 10_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to write."""

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    codebook: int | None = None
    codes_per_image: tuple[int, ...] = ()
    overwrite: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done_bytes: int
    total_bytes: int
    documents: int


@dataclass
class _Source:
    """Documents of one file and one direction, in a row."""

    path: str
    direction: str
    first_document: int
    bytes: int
    lines: int = 0
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"text": 0, "vision": 0})
    quarantined: dict[str, int] = field(default_factory=dict)


def preprocess(job: Job, progress: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
    """Write the corpus and return its sidecar; ``progress`` is called after every block of rows.

    Raises:
        DataError: a file is missing, a row is bad (``file:line: why``), or the output cannot be written; nothing
            half-written is left.
    """
    if not job.inputs:
        raise DataError("--input names no file.")
    if not Path(job.output).name or job.output.endswith("/"):
        raise DataError(f"--output='{job.output}' is a folder. Name a prefix in it, e.g. {job.output}rows.")
    for option, values in (("--codebook", (job.codebook,)), ("--codes-per-image", job.codes_per_image)):
        for value in values:
            if value is not None and value < 1:
                raise DataError(f"{option}={value} is too small. It is at least 1; leave it out for text alone.")
    for path in job.inputs:
        if not Path(path).is_file():
            raise DataError(f"input='{path}' is wrong. There is no such file.")
    tokenizer = TextTokenizer(job.tokenizer)
    limits = Rules(text_size=tokenizer.size, codebook=job.codebook, codes_per_image=job.codes_per_image)
    sources: list[_Source] = []
    done, total = 0, sum(Path(path).stat().st_size for path in job.inputs)
    already_ended = 0
    with CorpusWriter(job.output, overwrite=job.overwrite) as writer:
        for path in job.inputs:
            sources.append(_Source(path, "both", writer.num_documents, Path(path).stat().st_size))
            first = len(sources) - 1
            for lines, block, read in _blocks(path, limits):
                already_ended += _write(writer, sources, tokenizer, block, path)
                sources[first].lines += lines
                done += read
                progress(Progress(done, total, writer.num_documents))
        if writer.num_documents == 0:
            raise DataError(f"{', '.join(job.inputs)}: no rows. A corpus needs at least one document.")
        if tokenizer.special.vision_start is None or tokenizer.special.vision_end is None:
            _refuse_images(sources, job.tokenizer)
        return writer.finish(_facts(job, tokenizer, sources, already_ended))


def _facts(job: Job, tokenizer: TextTokenizer, sources: list[_Source], already_ended: int) -> dict[str, Any]:
    codes: int | list[int] | None = None
    if job.codes_per_image:
        codes = job.codes_per_image[0] if len(job.codes_per_image) == 1 else list(job.codes_per_image)
    described = tokenizer.describe(beside=job.output)
    resolved = {"codebook": job.codebook, "codes_per_image": codes, "inputs": list(job.inputs), "tokenizer": described}
    return {
        "tokenizer": described,
        "vocabulary": {
            "text": tokenizer.padded_size(),
            "codebook": job.codebook,
            "codes_per_image": codes,
            "grid": None,
        },
        "counts": {"text_documents_with_eos": already_ended},
        "sources": [asdict(source) for source in sources],
        "made_by": {
            "version": unimega.__version__,
            "config_sha256": hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest(),
        },
    }


def _refuse_images(sources: Sequence[_Source], tokenizer: str) -> None:
    if any(source.tokens["vision"] for source in sources):
        raise DataError(
            f"tokenizer='{tokenizer}' is wrong. It has no <|vision_start|> or no <|vision_end|>, and the rows hold "
            "images. Add both as special tokens."
        )


def _blocks(path: str, limits: Rules) -> Iterator[tuple[int, list[tuple[int, Row]], int]]:
    """(lines, rows with their line numbers, bytes read), up to ``_BLOCK_ROWS`` lines at a time."""
    with Path(path).open("rb") as file:
        block: list[tuple[int, Row]] = []
        lines = before = 0
        for number, line in _lines(file, path):
            lines += 1
            if line.strip():
                try:
                    block.append((number, row_of_json(line, limits)))
                except BadRow as error:
                    raise DataError(f"{path}:{number}: {error}.") from error
            if lines == _BLOCK_ROWS:
                here = file.tell()
                yield lines, block, here - before
                block, lines, before = [], 0, here
        yield lines, block, file.tell() - before


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(_MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > _MAX_ROW_BYTES:
            raise DataError(f"{path}:{number}: a row of more than {_MAX_ROW_BYTES} bytes. Split it.")
        yield number, line


def _write(
    writer: CorpusWriter, sources: list[_Source], tokenizer: TextTokenizer, block: list[tuple[int, Row]], path: str
) -> int:
    """Tokenise and append a block of rows; returns how many text documents hold their own eos at the end."""
    texts = [segment.text for _, row in block for segment in row.segments if segment.text is not None]
    encoded = iter(tokenizer.encode(texts))
    ended = 0
    for line, row in block:
        source = sources[-1]
        if row.direction not in (None, source.direction) and source.documents == 0:
            source.direction = row.direction or "both"
        elif row.direction not in (None, source.direction) and _is_pair(row):
            if len(sources) == _MAX_SOURCES:
                raise DataError(
                    f"{path}:{line}: data_type has changed {_MAX_SOURCES} times. Sort the rows by data_type."
                )
            source = _Source(path, row.direction or "both", writer.num_documents, 0)
            sources.append(source)
        segments = [(segment.mode, _ids(segment, encoded)) for segment in row.segments]
        for mode, ids in segments:
            source.tokens["vision" if mode & layout.MODALITY_BITS == layout.VISION else "text"] += len(ids)
        source.documents += 1
        writer.add_document(segments)
        mode, ids = segments[-1]
        ended += mode == layout.MODE_TEXT and len(ids) > 0 and int(ids[-1]) == tokenizer.special.eos
    return ended


def _is_pair(row: Row) -> bool:
    return any(segment.mode == layout.MODE_CAPTION for segment in row.segments)


def _ids(segment: Segment, encoded: Iterator[layout.Ids]) -> layout.Ids:
    if segment.ids is not None:
        return segment.ids
    return next(encoded).astype(np.int32, copy=False)
