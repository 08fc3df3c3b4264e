"""Train a model: python examples/pretrain_unix.py --config RUN.toml [--parallel.tp 2 ...]."""

import sys
from collections.abc import Sequence

from unimega.errors import run_cli


def main(argv: Sequence[str]) -> None:
    """python examples/pretrain_unix.py --config RUN.toml [--parallel.tp 2 ...]."""
    from unimega.config.loader import load_run

    config = load_run(argv)
    from unimega.training.loop import train  # torch is imported only after the configuration is sound

    train(config)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
