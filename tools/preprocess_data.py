r"""Turn jsonl files into a corpus: PREFIX.bin, PREFIX.idx, PREFIX.json.

    python tools/preprocess_data.py --input rows.jsonl --output corpus/rows --tokenizer qwen \
        --codebook 8192 --codes-per-image 1024

docs/data_formats.md says which rows are understood and what is written.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from unimega.data.preprocess import Job, Progress, preprocess
from unimega.errors import run_cli


class _ProgressLine:
    """One line on stderr: rewritten every second on a terminal, a plain one every 10 s elsewhere."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.last < (1 if self.terminal else 10):
            return
        self.last = now
        seconds = now - self.start
        share = progress.done_bytes / max(1, progress.total_bytes)
        left = seconds * (1 - share) / share if share else 0.0
        line = (
            f"{progress.done_bytes / 1e6:.1f} of {progress.total_bytes / 1e6:.1f} MB ({100 * share:.0f} %), "
            f"{progress.documents} documents, {progress.documents / seconds:.0f}/s, {left:.0f} s left"
        )
        print(line, end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    """Parse, preprocess, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="jsonl files, in the order of the corpus"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--codebook", type=int, metavar="K", help="codes are 0 .. K-1; needed for rows with images")
    parser.add_argument(
        "--codes-per-image", type=int, nargs="+", default=[], metavar="N", help="allowed numbers of codes; absent: any"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    arguments = parser.parse_args(argv)
    job = Job(
        inputs=tuple(arguments.input),
        output=arguments.output,
        tokenizer=arguments.tokenizer,
        codebook=arguments.codebook,
        codes_per_image=tuple(arguments.codes_per_image),
        overwrite=arguments.overwrite,
    )
    start = time.monotonic()
    sidecar = preprocess(job, _ProgressLine())
    counts = sidecar["counts"]
    tokens = counts["tokens"]
    print(
        f"{arguments.output}: {counts['documents']} documents, {counts['images']} images, {tokens['text']} text and "
        f"{tokens['vision']} vision tokens, longest document {counts['longest_document']}, "
        f"{sidecar['bin']['bytes'] + sidecar['idx']['bytes']} bytes, {time.monotonic() - start:.1f} s"
    )


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
