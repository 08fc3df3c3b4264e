"""The digits demo: real scans, a small Uni-X trained on them, its export, and digits drawn and read through that.

    python examples/digits/demo.py                              what `make demo` runs, into demo/
    python examples/digits/demo.py --split 3 --output runs/d3   other scans held out, another folder
    python examples/digits/demo.py --training.steps 1000        a shorter training (any --section.key value goes to it)

Stages: corpus (scans, 16 codes each, captions, .bin/.idx), train (torchrun), export (tools/export_hf.py), draw (text to
image), caption (image to text), history (both with earlier checkpoints), report. A finished stage is kept while its
settings, its code and all before it stay the same; one that was stopped, by Ctrl-C or kill -9, goes on with the same
command, the training from its last checkpoint. Delete the folder to start anew.

Look at OUTPUT/report.html; every figure is in OUTPUT/report.json. The exit status is 1 if less than 90 % of drawings or
of captions are right. Then: python examples/digits/sample.py demo/export "a drawing of a seven"
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimega.errors import ConfigError, run_cli

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED = 130  # what a shell calls a program that was stopped by Ctrl-C


def main(argv: Sequence[str]) -> None:
    """Run the stages in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=ROOT / "demo", metavar="DIR", help="all that is made (demo)")
    parser.add_argument(
        "--split", type=int, default=10, metavar="N", help="seed of the cut into 1437 scans and 360 held out (10)"
    )
    parser.add_argument(
        "--training.steps", "--steps", dest="steps", type=int, default=1500, metavar="N", help="optimizer steps (1500)"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that train (2)")
    arguments, overrides = parser.parse_known_args(argv)
    for key, least in (("split", 0), ("steps", 1), ("ranks", 1)):
        if (value := getattr(arguments, key)) < least:
            raise ConfigError(f"--{key}={value} is too small. Give {least} or more.")
    output = arguments.output.resolve()
    _refuse_other_folders(output)

    from pipeline import Demo  # seconds of imports, once the command line is sound
    from stages import alone_in
    from training import Run

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with alone_in(output):
            run = Run(output, arguments.steps, arguments.ranks, tuple(overrides))
            figures = Demo(run, arguments.split).all()
    except KeyboardInterrupt:
        print("unimega: stopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    conclude(figures, output)


def conclude(figures: dict[str, Any], output: Path) -> None:
    """Print what came out; exit status 1 below the gate."""
    from curve import Point, table

    print(table([Point(**point) for point in figures["curve"]]))
    shares = [f"{100 * figures[key]:.1f} %" for key in ("t2i_accuracy", "i2t_accuracy")]
    text = f"text to image {shares[0]}, image to text {shares[1]}"
    print(f"{text} right, {100 * figures['exact_copy_share']:.1f} % copies, {figures['wall_s_total']:.0f} s in all")
    print(f"look at {output / 'report.html'}")
    if not figures["passed"]:
        print(f"unimega: {text}: below {100 * figures['gate']:.0f} %. See report.html.", file=sys.stderr)
        raise SystemExit(1)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _refuse_other_folders(output: Path) -> None:
    """The demo removes logs/, checkpoints/ and export/ of its folder: it must be its own."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output={str(output)!r} is a file. Name a folder.")
    if output.is_dir() and not any((output / name).exists() for name in ("stages", "corpus.json")):
        others = [path.name for path in output.iterdir() if path.name not in (".gitkeep", ".lock")]
        if others:
            raise ConfigError(f"--output={str(output)!r} holds {others[0]!r} and is no demo's. Name an empty folder.")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
