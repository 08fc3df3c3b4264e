r"""Look into a corpus: PREFIX.bin, PREFIX.idx, PREFIX.json.

    python tools/inspect_data.py stats  corpus/rows --entropy 3     what it holds; entropies of n-grams up to 3
    python tools/inspect_data.py verify corpus/*.idx                whether every byte is what was written
    python tools/inspect_data.py show   corpus/rows 0 17 -1         three documents, decoded, with what carries loss
    python tools/inspect_data.py show   corpus/rows --random 5 --assembled --epoch 2    as the model sees them
    python tools/inspect_data.py plot   corpus/rows --output rows.html      histograms (.png .svg .pdf .html)

A PREFIX is the path of the three files without their endings (an ending is taken off). Several are counted as one
corpus. --json prints for machines. Exit status 2 and one line for each problem if anything is wrong.
docs/data_formats.md explains the files.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from unimega.data import charts, entropy, render, samples, statistics
from unimega.data import format as layout
from unimega.data.reader import IndexedCorpus
from unimega.data.scan import MODALITIES
from unimega.data.tokenize import TextTokenizer
from unimega.data.verify import verify
from unimega.errors import ConfigError, DataError, optional, run_cli

_WIDTH = 30
_SHOWN = 3


class _Bar:
    """Progress on stderr: a bar on a terminal, nothing for a job of seconds, else a line every 10 s."""

    def __init__(self, what: str) -> None:
        self.what, self.start = what, time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.last = self.start

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if now - self.last < (0.2 if self.is_terminal else 10):
            return
        self.last = now
        left = (now - self.start) * (1 - share) / share if share > 0 else 0.0
        filled = int(_WIDTH * share)
        bar = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] " if self.is_terminal else ""
        line = f"{self.what}: {bar}{100 * share:.0f} %, {left:.0f} s left"
        print(line, end="\x1b[K\r" if self.is_terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave a clean line."""
        if self.is_terminal:
            print("\x1b[K", end="\r", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        raise ConfigError(f"{message}. --help shows every option.")


def main(argv: Sequence[str]) -> None:
    """Run one of the commands."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="stats|verify|show|plot")
    for name, add, words in (
        ("stats", _add_stats, "tokens, documents, lengths, sources, entropies"),
        ("verify", _add_verify, "structure, checksums, ids in range"),
        ("show", _add_show, "documents, decoded"),
        ("plot", _add_plot, "histograms as a picture or a page"),
    ):
        command = commands.add_parser(name, help=words, description=add.__doc__, allow_abbrev=False)
        add(command)
        command.add_argument(
            "--megatron", action="store_true", help="Megatron-LM wrote it: no sidecar, mode bytes are all text"
        )
    arguments = _parse(parser, argv)
    run = {"stats": _stats, "verify": _verify, "show": _show, "plot": _plot}[arguments.command]
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `head` has enough; the interpreter must not flush into the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Also take prefixes and numbers of documents behind an option, where argparse looks for no more of them."""
    arguments, rest = parser.parse_known_args(argv)
    is_show = arguments.command == "show"
    pattern = r"-?\d+" if is_show else r"[^-].*"
    if unknown := [one for one in rest if not re.fullmatch(pattern, one)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if is_show:
        arguments.numbers += map(int, rest)
    else:
        arguments.prefix += rest
    return arguments


def _add_stats(parser: argparse.ArgumentParser) -> None:
    """Count documents and tokens per modality, kind, role and source, and lengths: from the index alone, `.bin` is not
    read. With --entropy also H(x_n | x_1 .. x_n-1) of text ids and of image codes, in bits: exact however large the
    corpus is, in the memory of --memory-mb (less memory: more passes over `.bin`, the same numbers)."""
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="corpora, counted as one")
    parser.add_argument("--entropy", type=_order, default=0, metavar="N", help="n-grams of 1 to N ids (0: none)")
    parser.add_argument(
        "--across", action="store_true", help="n-grams may run from one sequence into the next, as in Uni-X's tool"
    )
    parser.add_argument("--memory-mb", type=_positive, default=1024, metavar="MB", help="for counting n-grams")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    """Check every length, offset, border, mode and checksum, that every id lies in its vocabulary, and what the sidecar
    counts. Prints a line for each corpus that is whole, and on stderr a line for each problem; then the status is 2."""
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="corpora")
    parser.add_argument("--tokenizer", metavar="DIR", help="it must have been made with this one; absent: any")
    parser.add_argument("--json", action="store_true", help="a JSON list, one object for each corpus")


def _add_show(parser: argparse.ArgumentParser) -> None:
    """Print documents run by run: where a run is from, its modality, whether it carries loss, how many tokens, and what
    they say. Control characters are spelled out. Colours appear on a terminal; NO_COLOR turns them off."""
    recipe = samples.Recipe()
    parser.add_argument("prefix", metavar="PREFIX")
    parser.add_argument(
        "numbers", nargs="*", type=int, metavar="N", help="documents; -1 is the last. None: the first 3"
    )
    parser.add_argument("--random", type=_positive, default=0, metavar="K", help="K documents drawn by --seed")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="of --random, and of the run's draws (data.seed)")
    parser.add_argument("--tokenizer", metavar="DIR", help="absent: the one recorded beside the corpus, if it is there")
    parser.add_argument("--full", action="store_true", help="all of every run, however long")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--mask-instructions",
        choices=("true", "false"),
        default="true",
        help="false: all but the first token carries loss (data.mask_instructions)",
    )
    parser.add_argument(
        "--draw",
        nargs=2,
        metavar=("NAME:PATH", "DIR"),
        help="also write each image as DIR/DOCUMENT-N.png, drawn from its codes by chameleon:FOLDER or digits:FILE",
    )
    group = parser.add_argument_group("as the model sees it", "The options are the keys of [data] of a run.")
    group.add_argument("--assembled", action="store_true", help="with prompts, image borders, eos, drawn direction")
    group.add_argument("--epoch", type=_count, default=recipe.epoch, help="draws differ from epoch to epoch")
    group.add_argument("--templates", default=recipe.templates, metavar="NAME|FILE")
    group.add_argument("--direction", choices=("both", "t2i", "i2t"), default=recipe.direction)
    group.add_argument("--t2i-ratio", type=_ratio, default=recipe.t2i_ratio, metavar="R")
    group.add_argument("--unconditional-ratio", type=_ratio, default=recipe.unconditional_ratio, metavar="R")
    group.add_argument("--row-separator", type=_count, default=recipe.row_separator, metavar="N")
    group.add_argument("--name", default="", help="of the corpus in the run; absent: the last part of its path")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    """Draw lengths of documents and sequences, and tokens by kind and source. Needs matplotlib (unimega[data])."""
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="corpora, drawn as one")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=f"ends in {', '.join(charts.FORMATS)}"
    )
    parser.add_argument("--title", help="absent: the prefixes")


def _stats(arguments: argparse.Namespace) -> None:
    corpora = _opened(arguments)
    summary = {"corpora": [corpus.prefix for corpus in corpora], **_counted(corpora).summary()}
    if arguments.entropy:
        summary["entropy"] = _entropies(corpora, arguments)
    if arguments.json:
        print(json.dumps(summary))
        return
    print("\n".join(("; ".join(summary["corpora"]), "", *render.statistics_lines(summary))))


def _entropies(corpora: Sequence[IndexedCorpus], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    result = []
    for modality, name in enumerate(MODALITIES):
        for n in range(1, arguments.entropy + 1):
            bar = _Bar(f"{name}, n = {n}")
            tally = entropy.conditional_entropy(
                corpora, modality, n, memory_bytes=arguments.memory_mb << 20, across=arguments.across, progress=bar
            )
            bar.close()
            if tally.number:
                entry = {"modality": name, "n": n, "bits": tally.entropy, "ngrams": tally.number}
                result.append(entry | {"different": tally.different, "largest": tally.largest})
    return result


def _verify(arguments: argparse.Namespace) -> None:
    verdicts = []
    tokenizer = TextTokenizer(arguments.tokenizer) if arguments.tokenizer else None
    for prefix in map(_without_ending, arguments.prefix):
        bar = _Bar(prefix)
        verdict = verify(
            prefix,
            megatron=arguments.megatron,
            text_size=tokenizer.size if tokenizer is not None else None,
            tokenizer_sha256=tokenizer.sha256 if tokenizer is not None else None,
            progress=lambda done, total, bar=bar: bar(done / max(1, total)),  # type: ignore[misc]
        )
        bar.close()
        verdicts.append(verdict)
        if arguments.json:
            continue
        for problem in verdict.problems:
            print(f"unimega: {problem}", file=sys.stderr)
        if not verdict.problems:
            sums = (
                "structure, checksums and ids checked"
                if verdict.has_sums
                else "structure and ids checked, no checksums"
            )
            print(f"{prefix}: whole. {verdict.documents:,} documents, {verdict.bytes:,} bytes of ids; {sums}.")
    if arguments.json:
        fields = ("prefix", "problems", "documents", "bytes", "has_sums")
        print(json.dumps([{name: getattr(verdict, name) for name in fields} for verdict in verdicts]))
    if any(verdict.problems for verdict in verdicts):
        sys.stdout.flush()
        raise SystemExit(2)


def _show(arguments: argparse.Namespace) -> None:
    prefix = _without_ending(arguments.prefix)
    corpus = IndexedCorpus(prefix, megatron=arguments.megatron)
    corpus.check()
    tokenizer = samples.tokenizer_of(corpus, arguments.tokenizer)
    numbers = arguments.numbers
    if not numbers and not arguments.random:
        numbers = range(min(_SHOWN, corpus.num_documents))
    chosen = samples.choose(corpus, numbers, random=arguments.random, seed=arguments.seed)
    mask = arguments.mask_instructions == "true"
    seen = None
    if arguments.assembled:
        names = ("seed", "epoch", "templates", "t2i_ratio", "unconditional_ratio", "row_separator", "direction", "name")
        recipe = samples.Recipe(mask_instructions=mask, **{name: getattr(arguments, name) for name in names})
        seen = samples.AsSeen(prefix, tokenizer, recipe, megatron=arguments.megatron)
    draw = _drawer(corpus, *arguments.draw) if arguments.draw else None
    is_coloured = _is_coloured(arguments.color)
    if is_coloured and not arguments.json:
        print(f"({', '.join(render.LEGEND)})")
    for number in chosen:
        if seen is not None:
            sample = seen.sample(number)
        else:
            sample = samples.stored(corpus, number, tokenizer, mask_instructions=mask)
        if arguments.json:
            print(json.dumps(sample.summary()))
        else:
            width = None if arguments.full else render.DEFAULT_WIDTH
            print("\n".join(render.sample_lines(sample, colour=is_coloured, width=width)))
        if draw is not None:
            draw(number)


def _drawer(corpus: IndexedCorpus, kind: str, folder: str) -> Callable[[int], None]:
    """What writes the images of a document.

    Raises:
        UnimegaError: no such tokenizer of pictures, or not the one that made the codes.
    """
    from unimega.models import vision  # imports torch

    name, _, path = kind.partition(":")
    tokenizer = vision.load(name, path)
    vocabulary = corpus.sidecar["vocabulary"] if corpus.sidecar is not None else {}
    made_by = (vocabulary.get("image_tokenizer") or {}).get("sha256", tokenizer.fingerprint)
    if vocabulary.get("codebook") != tokenizer.codebook or made_by != tokenizer.fingerprint:
        raise DataError(
            f"--draw {kind} is wrong. {corpus.prefix} has codes of codebook {vocabulary.get('codebook')} made by "
            f"{made_by[:12]}; this is one of {tokenizer.codebook}, {tokenizer.fingerprint[:12]}."
        )
    picture = optional("PIL.Image", extra="data")

    def draw(document: int) -> None:
        first, stop = int(corpus.documents[document]), int(corpus.documents[document + 1])
        images = first + np.flatnonzero(layout.modality_of(corpus.modes[first:stop]) == layout.VISION)
        for number, sequence in enumerate(images.tolist()):
            codes = corpus.sequence(sequence)
            if len(codes) != math.prod(tokenizer.grid):
                raise DataError(
                    f"document {document}: an image of {len(codes)} codes, {kind} draws {math.prod(tokenizer.grid)}."
                )
            out = Path(folder) / f"{document}-{number}.png"
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                picture.fromarray(tokenizer.decode(codes[None])[0]).save(out)
            except OSError as error:
                raise DataError(f"{out}: cannot be written ({error.strerror or error}).") from error

    return draw


def _plot(arguments: argparse.Namespace) -> None:
    corpora = _opened(arguments)
    title = arguments.title or "; ".join(corpus.prefix for corpus in corpora)
    charts.write_charts(arguments.output, _counted(corpora), title=title)
    print(arguments.output)


def _opened(arguments: argparse.Namespace) -> list[IndexedCorpus]:
    corpora = [IndexedCorpus(_without_ending(prefix), megatron=arguments.megatron) for prefix in arguments.prefix]
    for corpus in corpora:
        corpus.check()
        if not corpus.num_documents:
            raise DataError(f"{corpus.index_path}: 0 documents. There is nothing to count.")
    return corpora


def _counted(corpora: Sequence[IndexedCorpus]) -> statistics.Statistics:
    bar, done, total = _Bar("documents"), 0, sum(corpus.num_documents for corpus in corpora)

    def progress(count: int) -> None:
        nonlocal done
        done += count
        bar(done / total)

    result = statistics.Statistics()
    for corpus in corpora:
        result = result + statistics.collect(corpus, progress=progress)
    bar.close()
    return result


def _without_ending(prefix: str) -> str:
    """So that a shell's ``corpus/*.idx`` names corpora."""
    for ending in (".idx", ".bin", ".json"):
        if prefix.endswith(ending) and not Path(f"{prefix}.idx").exists():
            return prefix.removesuffix(ending)
    return prefix


def _is_coloured(choice: str) -> bool:
    """NO_COLOR (any value but none) and a terminal that knows no colours turn them off; --color wins."""
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _positive(text: str) -> int:
    return _whole(text, low=1, high=1 << 40)


def _order(text: str) -> int:
    return _whole(text, low=0, high=entropy.MAX_N)


def _count(text: str) -> int:
    return _whole(text, low=0, high=1 << 40)


def _ratio(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def _whole(text: str, *, low: int, high: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return number


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
