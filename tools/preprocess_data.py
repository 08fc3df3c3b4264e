r"""Turn files of rows into a corpus: PREFIX.bin, PREFIX.idx, PREFIX.json.

    python tools/preprocess_data.py corpus.toml
    python tools/preprocess_data.py --input 'rows/*.jsonl.zst' --output corpus/rows --tokenizer qwen \
        --codebook 8192 --codes-per-image 1024 --workers 8

Inputs are jsonl (plain, .gz, .zst), parquet and webdataset tar; rows are texts, captions with codes or pictures,
conversations, instructions, ids, interleaved items. docs/preprocessing.md says which rows are understood, and
docs/data_formats.md what is written. Run it again after a kill: finished parts are kept in PREFIX.work, and the bytes
are the same.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, get_args

from unimega import log
from unimega.data.images import ImageTokenizer
from unimega.data.preparing.job import (
    MAX_BAD_FEW,
    MAX_BAD_SHARE,
    ROW_MB,
    TASK_MB,
    Direction,
    Job,
    JobFile,
    LimitsSection,
    OutputSection,
    SourceSpec,
    TokenizerSection,
    VisionSection,
    read_job,
)
from unimega.data.preparing.report import ProgressLine, table
from unimega.data.preprocess import preprocess
from unimega.data.records.row import FIELDS, Kind
from unimega.data.tokenize import Backend
from unimega.errors import ConfigError, run_cli

EXAMPLE = """
a job of many sources, corpus.toml (paths start from its folder):

    [output]
    prefix = "corpus/mix"
    max_bad_share = 0.01            # more bad rows than this stop the job; left out: 10 of a few rows may be

    [tokenizer]
    path = "qwen"                   # folder with tokenizer.json
    backend = "auto"

    [vision]
    codebook = 8192                 # codes are 0 .. 8191
    codes_per_image = [1024]
    image_tokenizer = "chameleon:vqgan"   # encodes raw pictures

    [[source]]
    name = "web"
    paths = ["web/*.jsonl.zst", "more.parquet"]
    kind = "text"
    fields = { text = "content" }   # names in these rows

    [[source]]
    name = "pairs"
    paths = ["cc12m/*.tar"]         # 000.jpg with 000.txt or 000.json
    direction = "both"              # what a run may do with pairs: both, t2i, i2t; auto follows data_type

    [limits]
    row_mb = 16                     # a longer row is bad
    task_mb = 16                    # what a kill costs at most per worker

used to Megatron-LM? --output-prefix and --tokenizer-model are taken for --output and --tokenizer; a corpus is one
document per row and is called PREFIX, not PREFIX_text_document; eos is added when it is loaded.
"""

_OTHERS = {
    "--tokenizer-type": "the folder given as --tokenizer says what it is",
    "--append-eod": "the loader ends every document with eos, so none is stored",
    "--append-bos": "no begin of text is stored or added",
    "--split-sentences": "documents are stored whole",
    "--partitions": "tasks and --workers take their place",
    "--log-interval": "progress comes by time",
    "--keep-sequential-samples": "the order of the rows is always kept",
    "--dataset-impl": "it is always mmap",
}
"""Flags of Megatron-LM's tool that change nothing here, and why."""
_REFUSED = ("--vocab-file", "--merge-file", "--vocab-size")
"""Flags of Megatron-LM's tool that would change the ids."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        raise ConfigError(f"{message}. --help shows every option.")


def main(argv: Sequence[str]) -> None:
    """Parse, preprocess, print the summary."""
    log.setup()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # parallelism is workers
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    arguments = _parser().parse_args(argv)
    _tell_others(arguments)
    job = _job(arguments)
    progress = ProgressLine(sys.stderr, seconds=arguments.progress_seconds)
    try:
        sidecar = preprocess(job, progress)
    except KeyboardInterrupt:
        progress.close()
        print(f"unimega: interrupted. Run again to go on: finished parts are in {job.output}.work.", file=sys.stderr)
        raise SystemExit(130) from None
    except BaseException:
        progress.close()
        raise
    progress.close()
    print(table(job, sidecar, seconds=progress.seconds))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("job", nargs="?", metavar="JOB.toml", help="a job of many sources, instead of --input")
    one = parser.add_argument_group("one source")
    one.add_argument("--input", nargs="+", metavar="FILE", help="files or globs, in the order of the corpus")
    one.add_argument("--output", "--output-prefix", metavar="PREFIX")
    one.add_argument("--tokenizer", "--tokenizer-model", metavar="DIR", help="folder with tokenizer.json, or a .model")
    one.add_argument("--backend", choices=get_args(Backend), help="what tokenises; all give the same ids")
    one.add_argument("--kind", choices=get_args(Kind), help="what the rows are; auto: recognised row by row")
    one.add_argument(
        "--fields", nargs="+", metavar="FIELD=NAME", help=f"names in the rows of {', '.join(FIELDS)}; only these count"
    )
    one.add_argument("--json-keys", nargs="+", metavar="NAME", help="as in Megatron-LM: --fields text=NAME")
    one.add_argument("--direction", choices=get_args(Direction), help="what a run may do with pairs")
    one.add_argument(
        "--image-root", metavar="DIR", help="where paths of pictures start from; absent: the file's folder"
    )
    one.add_argument("--codebook", type=int, metavar="K", help="codes are 0 .. K-1; needed for rows with codes")
    one.add_argument(
        "--codes-per-image", type=int, nargs="+", metavar="N", help="allowed numbers of codes; absent: any"
    )
    one.add_argument("--image-tokenizer", metavar="NAME:PATH", help="encodes raw pictures, e.g. chameleon:vqgan")
    one.add_argument("--max-row-mb", type=float, metavar="MB", help=f"a longer row is bad (default {ROW_MB:g})")
    one.add_argument("--task-mb", type=float, metavar="MB", help=f"MB between two commits (default {TASK_MB:g})")
    both = parser.add_argument_group("any job")
    both.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    both.add_argument(
        "--max-bad-share",
        type=float,
        metavar="SHARE",
        help=f"more bad rows stop the job (default {MAX_BAD_SHARE:g}; {MAX_BAD_FEW} of few rows, at most half of them)",
    )
    both.add_argument("--validate", action="store_true", help="check all rows, write nothing but the quarantine")
    both.add_argument("--overwrite", action="store_true", help="replace a corpus, and parts of another job")
    both.add_argument("--progress-seconds", type=float, metavar="S", help="between two lines (default 10; terminal 1)")
    for flag in (*_OTHERS, *_REFUSED):
        parser.add_argument(flag, nargs="*", help=argparse.SUPPRESS)
    return parser


def _tell_others(arguments: argparse.Namespace) -> None:
    for flag in _REFUSED:
        if getattr(arguments, flag[2:].replace("-", "_")) is not None:
            raise ConfigError(f"{flag} is not read. Name a folder with tokenizer.json, or a .model, as --tokenizer.")
    for flag, why in _OTHERS.items():
        if getattr(arguments, flag[2:].replace("-", "_")) is not None:
            print(f"unimega: {flag} changes nothing: {why}.", file=sys.stderr)


def _job(arguments: argparse.Namespace) -> Job:
    if arguments.job is not None:
        for name in ("input", "output", "tokenizer", "backend", "kind", "fields", "json_keys", "direction"):
            _refuse_beside_job(arguments, name)
        for name in ("image_root", "codebook", "codes_per_image", "image_tokenizer", "max_row_mb", "task_mb"):
            _refuse_beside_job(arguments, name)
        file = read_job(arguments.job)
        return _make(file, arguments, os.path.dirname(arguments.job))
    for name in ("input", "output", "tokenizer"):
        if getattr(arguments, name) is None:
            raise ConfigError(f"--{name} is missing. Give a JOB.toml, or --input, --output and --tokenizer (--help).")
    return _make(_one_source(arguments), arguments, "")


def _refuse_beside_job(arguments: argparse.Namespace, name: str) -> None:
    if getattr(arguments, name) is not None:
        raise ConfigError(f"--{name.replace('_', '-')} does not go with {arguments.job}. Set it in the file.")


def _one_source(arguments: argparse.Namespace) -> JobFile:
    """The job file that the flags stand for."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    source = SourceSpec(
        paths=tuple(given["input"]),
        kind=given.get("kind", "auto"),
        fields=_fields(arguments),
        direction=given.get("direction", "auto"),
        image_root=given.get("image_root", ""),
    )
    return JobFile(
        output=OutputSection(prefix=given["output"]),
        tokenizer=TokenizerSection(path=given["tokenizer"], backend=given.get("backend", "auto")),
        vision=VisionSection(
            codebook=given.get("codebook"),
            codes_per_image=tuple(given.get("codes_per_image", ())),
            image_tokenizer=given.get("image_tokenizer", ""),
        ),
        limits=LimitsSection(row_mb=given.get("max_row_mb", ROW_MB), task_mb=given.get("task_mb", TASK_MB)),
        source=(source,),
    )


def _fields(arguments: argparse.Namespace) -> dict[str, str]:
    keys = arguments.json_keys or []
    if len(keys) > 1:
        raise ConfigError(
            f"--json-keys={' '.join(keys)}: Megatron-LM writes one corpus per key, this tool one corpus. "
            "Run it once per key, or name what each field is: --fields caption=NAME codes=NAME."
        )
    fields = {"text": keys[0]} if keys and keys != ["text"] else {}
    for pair in arguments.fields or []:
        field, equals, name = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--fields={pair} is wrong. Write FIELD=NAME, e.g. text=content.")
        fields[field] = name
    return fields


def _make(file: JobFile, arguments: argparse.Namespace, folder: str) -> Job:
    share = arguments.max_bad_share
    return Job(
        sources=file.source,
        output=os.path.join(folder, file.output.prefix),
        tokenizer=os.path.join(folder, file.tokenizer.path),
        backend=file.tokenizer.backend,
        codebook=file.vision.codebook,
        codes_per_image=file.vision.codes_per_image,
        image_tokenizer=_image_tokenizer(file.vision.image_tokenizer, folder),
        image_tokenizer_name=file.vision.image_tokenizer,
        folder=folder,
        max_bad_share=file.output.max_bad_share if share is None else share,
        row_mb=file.limits.row_mb,
        task_mb=file.limits.task_mb,
        workers=_cores() if arguments.workers is None else arguments.workers,
        validate=arguments.validate,
        overwrite=arguments.overwrite,
    )


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _image_tokenizer(given: str, folder: str) -> Callable[[], ImageTokenizer] | None:
    """What makes the image tokenizer, in this process and in workers."""
    if not given:
        return None
    name, colon, path = given.partition(":")
    if not colon or not path:
        raise ConfigError(f"--image-tokenizer={given} is wrong. Write NAME:PATH, e.g. chameleon:vqgan.")
    return partial(load_image_tokenizer, name, os.path.join(folder, path))


def load_image_tokenizer(name: str, path: str) -> ImageTokenizer:
    """A VQ tokenizer by its name; one thread each, so that codes do not depend on the number of cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from unimega.models import vision

    tokenizer: ImageTokenizer = vision.load(name, path)
    return tokenizer


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
