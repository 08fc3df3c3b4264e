"""A job made definite: its files, how their rows are read, and a fingerprint of all that its bytes depend on."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unimega.data.preparing import columns
from unimega.data.preparing.files import InputFile, recognise
from unimega.data.preparing.job import Job, SourceSpec, check, expand
from unimega.data.records.row import Rules
from unimega.data.tokenize import TextTokenizer
from unimega.errors import DataError


@dataclass(frozen=True)
class Plan:
    """A job and what follows from it; workers get it whole."""

    job: Job
    files: tuple[InputFile, ...]
    rules: tuple[Rules, ...]
    """Of each file."""
    settings: dict[str, Any]
    """Everything but the inputs' contents that the bytes of the corpus depend on."""
    tokenizer: dict[str, Any]
    """``tokenizer`` of the sidecar."""
    vocabulary: dict[str, Any]
    """``vocabulary`` of the sidecar."""

    @property
    def key(self) -> str:
        """Fingerprint of ``settings``."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def work(self) -> Path:
        """Folder of the parts."""
        return Path(f"{self.job.output}.validate" if self.job.validate else f"{self.job.output}.work")

    @property
    def row_bytes(self) -> int:
        """Longest row."""
        return round(self.job.row_mb * 1e6)

    @property
    def task_bytes(self) -> int:
        """Bytes read between two commits."""
        return max(1, round(self.job.task_mb * 1e6))

    def describe(self, file: int, block: int | None) -> str:
        """A file or a block of it, for messages."""
        found = self.files[file]
        if found.spans is None or block is None:
            return found.shown
        start, stop = found.spans[block]
        return f"{found.shown}, {'bytes' if found.format == 'jsonl' else 'row groups'} {start} to {stop}"

    def part(self, file: int, block: int) -> Path:
        """Where a part lies once it is whole."""
        return self.work / f"{file:05d}-{block:06d}.part"

    def end(self, file: int) -> Path:
        """Where the number of blocks of a file is kept that only reading tells."""
        return self.work / f"{file:05d}.end"


def make(job: Job, tokenizer: TextTokenizer) -> Plan:
    """Find the files, look at each, and ask the image tokenizer for its codes.

    Raises:
        DataError: an option is wrong, a file is missing or of a kind that is not read, or nothing is named.
    """
    check(job)
    files: list[InputFile] = []
    for number, source in enumerate(job.sources):
        files += [_file(job, number, shown) for shown in expand(source, job.folder)]
    if not files:
        raise DataError("--input names no file.")
    codebook, codes_per_image, pictures = _vision(job)
    rules = tuple(
        Rules(
            text_size=tokenizer.size,
            codebook=codebook,
            codes_per_image=codes_per_image,
            encodes_pictures=job.image_tokenizer is not None,
            kind=source.kind,
            fields=source.fields,
            direction=None if source.direction == "auto" else source.direction,
            image_root=_image_root(job, source, file),
        )
        for file in files
        for source in (job.sources[file.source],)
    )
    described = tokenizer.describe(beside=job.output)
    vocabulary: dict[str, Any] = {
        "text": tokenizer.padded_size(),
        "codebook": codebook,
        "codes_per_image": (codes_per_image[0] if len(codes_per_image) == 1 else list(codes_per_image)) or None,
        "grid": pictures["grid"] if pictures else None,
    }
    if pictures:
        vocabulary["image_tokenizer"] = pictures
    settings = {
        "tokenizer": {name: value for name, value in described.items() if name != "path"},
        "vocabulary": vocabulary,
        "sources": [asdict(source) for source in job.sources],
        "inputs": [file.shown for file in files],
        "row_mb": job.row_mb,
        "task_mb": job.task_mb,
        "validate": job.validate,
    }
    plain = json.loads(json.dumps(settings))  # as a later run reads it back
    return Plan(job, tuple(files), rules, plain, described, vocabulary)


def _image_root(job: Job, source: SourceSpec, file: InputFile) -> str:
    if source.image_root:
        return os.path.join(job.folder, source.image_root)
    return os.path.dirname(file.path)


def _vision(job: Job) -> tuple[int | None, tuple[int, ...], dict[str, Any] | None]:
    """(codebook, allowed numbers of codes, what the sidecar says of the image tokenizer)."""
    if job.image_tokenizer is None:
        return job.codebook, job.codes_per_image, None
    tokenizer = job.image_tokenizer()
    codes = tokenizer.grid[0] * tokenizer.grid[1]
    if job.codebook not in (None, tokenizer.codebook):
        raise DataError(f"--codebook={job.codebook} is wrong. The image tokenizer has {tokenizer.codebook} codes.")
    if job.codes_per_image and codes not in job.codes_per_image:
        wanted = " ".join(map(str, job.codes_per_image))
        raise DataError(f"--codes-per-image={wanted} is wrong. The image tokenizer gives {codes} codes.")
    described = {
        "name": job.image_tokenizer_name,
        "codebook": tokenizer.codebook,
        "grid": list(tokenizer.grid),
        "sha256": tokenizer.fingerprint,
    }
    return tokenizer.codebook, job.codes_per_image or (codes,), described


def _file(job: Job, source: int, shown: str) -> InputFile:
    path = os.path.join(job.folder, shown)
    format_, compression = recognise(path, shown)
    found = os.stat(path)
    task_bytes = max(1, round(job.task_mb * 1e6))
    spans: tuple[tuple[int, int], ...] | None = None
    if format_ == "parquet":
        spans = columns.row_groups(path, shown, task_bytes=task_bytes)
    elif format_ == "jsonl" and not compression:
        borders = range(0, found.st_size, task_bytes)
        spans = tuple((start, min(start + task_bytes, found.st_size)) for start in borders)
    return InputFile(
        path=path,
        shown=shown,
        source=source,
        format=format_,
        compression=compression,
        bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
        spans=spans,
    )
