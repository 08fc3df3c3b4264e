"""What to preprocess: a job, from Python or from a TOML file."""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unimega.config import strict
from unimega.config.loader import read_file
from unimega.data.images import ImageTokenizer
from unimega.data.records.row import FIELDS, Kind
from unimega.data.tokenize import Backend
from unimega.errors import ConfigError, DataError

Direction = Literal["auto", "both", "t2i", "i2t"]
ROW_MB, TASK_MB, MAX_BAD_SHARE = 16.0, 16.0, 0.01
MAX_BAD_FEW = 10
"""Bad rows that a small job may have where no share is given: one of 20 rows says little about the rest."""
_MAX_CODEBOOK = 1 << 30


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Files that are read in one way."""

    paths: tuple[str, ...]
    """Files or globs (``**`` too); those of a glob come in the order of their names."""
    name: str = ""
    """Shown in summaries; absent: the path of each file."""
    kind: Kind = "auto"
    """What the rows are; auto recognises each by its fields."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names in the rows of the fields that are read, e.g. {text = "content"}; others are then not looked at."""
    direction: Direction = "auto"
    """What a run may do with pairs; auto follows each row's data_type."""
    image_root: str = ""
    """Folder of pictures that rows name; absent: that of their file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to write."""

    sources: tuple[SourceSpec, ...]
    output: str
    """Prefix of the corpus."""
    tokenizer: str
    backend: Backend = "auto"
    codebook: int | None = None
    """Codes are 0 .. codebook - 1; absent: that of the image tokenizer, or no images."""
    codes_per_image: tuple[int, ...] = ()
    image_tokenizer: Callable[[], ImageTokenizer] | None = None
    """Makes the tokenizer of raw pictures; workers call it too, so it must pickle."""
    image_tokenizer_name: str = ""
    """NAME:PATH, for the sidecar."""
    folder: str = ""
    """Where relative paths start from; absent: the working directory."""
    max_bad_share: float | None = None
    """Share of rows that may be bad before the job stops; absent: MAX_BAD_SHARE, or MAX_BAD_FEW rows but not most."""
    row_mb: float = ROW_MB
    """Longest row, in 10^6 bytes; a longer one is bad."""
    task_mb: float = TASK_MB
    """Bytes, in 10^6, that are read between two commits: what a kill costs at most per worker."""
    workers: int = 1
    validate: bool = False
    """Read and check all rows, and write nothing but the quarantine."""
    overwrite: bool = False

    def may_be_bad(self, rows: int) -> float:
        """How many of so many rows may be bad."""
        if self.max_bad_share is not None:
            return self.max_bad_share * rows
        return max(MAX_BAD_SHARE * rows, min(MAX_BAD_FEW, rows / 2))


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """``[output]``."""

    prefix: str = ""
    max_bad_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """``[tokenizer]``."""

    path: str = ""
    backend: Backend = "auto"


@dataclass(frozen=True, kw_only=True)
class VisionSection:
    """``[vision]``."""

    codebook: int | None = None
    codes_per_image: tuple[int, ...] = ()
    image_tokenizer: str = ""


@dataclass(frozen=True, kw_only=True)
class LimitsSection:
    """``[limits]``."""

    row_mb: float = ROW_MB
    task_mb: float = TASK_MB


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A job as its TOML file has it; relative paths start from the file's folder."""

    output: OutputSection = OutputSection()
    tokenizer: TokenizerSection = TokenizerSection()
    vision: VisionSection = VisionSection()
    limits: LimitsSection = LimitsSection()
    source: tuple[SourceSpec, ...] = ()


def read_job(path: str) -> JobFile:
    """The job that a TOML file describes, as strict as the configuration of a run.

    Raises:
        ConfigError: one line that names the file, the key and what to do.
    """
    job = strict.construct(JobFile, strict.partial(JobFile, read_file(path, key="the job"), where=path), where=path)
    for key, value in (("output.prefix", job.output.prefix), ("tokenizer.path", job.tokenizer.path)):
        if not value:
            raise ConfigError(f"{path}: {key!r} is missing. Set it in [{key.partition('.')[0]}].")
    if not job.source:
        raise ConfigError(f"{path}: no source. Add a table [[source]] with paths = ['rows/*.jsonl'].")
    return job


def check(job: Job) -> None:
    """Refuse what no job can mean.

    Raises:
        DataError: names the option and what to do.
    """
    if not Path(job.output).name or job.output.endswith("/"):
        raise DataError(f"--output='{job.output}' is a folder. Name a prefix in it, e.g. {job.output}rows.")
    for option, values in (("--codebook", (job.codebook,)), ("--codes-per-image", job.codes_per_image)):
        for value in values:
            if value is not None and value < 1:
                raise DataError(f"{option}={value} is too small. It is at least 1; leave it out for text alone.")
            if value is not None and value > _MAX_CODEBOOK:
                raise DataError(f"{option}={value} is too large. It is at most {_MAX_CODEBOOK}: ids are of 32 bits.")
    for option, size in (("--max-row-mb", job.row_mb), ("--task-mb", job.task_mb)):
        if not 1e-6 <= size <= 1e6:
            raise DataError(f"{option}={size} is wrong. It is a number of 10^6 bytes above 0, at most 10^6.")
    if job.max_bad_share is not None and not 0 <= job.max_bad_share <= 1:
        raise DataError(f"--max-bad-share={job.max_bad_share} is wrong. It is a share: 0 (none) to 1 (all).")
    if job.workers < 1:
        raise DataError(f"--workers={job.workers} is too small. It is at least 1.")
    for source in job.sources:
        for name in source.fields:
            if name not in FIELDS:
                raise DataError(f"fields: unknown field {name!r}. Known: {', '.join(FIELDS)}; e.g. text = 'content'.")


def expand(source: SourceSpec, folder: str) -> list[str]:
    """The files of a source in order, relative to ``folder``.

    Raises:
        DataError: a file is missing or named twice, or a glob finds none.
    """
    found: list[str] = []
    for pattern in source.paths:
        if os.path.isfile(os.path.join(folder, pattern)):
            found.append(pattern)
            continue
        if os.path.isdir(os.path.join(folder, pattern)):
            raise DataError(f"input='{pattern}' is a folder. Name its files: '{pattern.rstrip('/')}/*.jsonl'.")
        if os.path.exists(os.path.join(folder, pattern)):
            raise DataError(f"input='{pattern}' is no file that can be read twice. Write its content to a file.")
        if not glob.has_magic(pattern):
            raise DataError(f"input='{pattern}' is wrong. There is no such file.")
        names = sorted(
            name
            for name in glob.glob(pattern, root_dir=folder or None, recursive=True)
            if os.path.isfile(os.path.join(folder, name))
        )
        if not names:
            raise DataError(f"input='{pattern}' is wrong. No file has such a name.")
        found += names
    seen: set[str] = set()
    twice = next((name for name in found if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise DataError(f"input='{twice}' is named twice. Name each file once; weights are set when training.")
    return found
