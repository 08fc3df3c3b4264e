"""Train a model, or go on with one.

    python examples/pretrain_unix.py --config RUN.toml [--section.key value ...]
    torchrun --nproc-per-node 8 examples/pretrain_unix.py --config RUN.toml --parallel.tp 2

``--help`` lists every key. docs/training.md: resuming, signals, metrics, profiles, time limits.
"""

import sys
from collections.abc import Sequence

from unimega.errors import run_cli


def main(argv: Sequence[str]) -> None:
    """Read the run, check it, train."""
    from unimega.config.loader import load_run

    config = load_run(argv)
    from unimega.training.loop import train  # torch is imported only after the configuration is sound

    train(config)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
