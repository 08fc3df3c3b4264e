"""Turn a Hugging Face folder into a checkpoint that loads under any topology.

    python tools/import_hf.py FOLDER CHECKPOINT [--separator-ids 89,90] [--overwrite]

FOLDER holds config.json and safetensors of Qwen2, Qwen3 or the original Uni-X (x, hard MoE, MoT). Prints what becomes
of every tensor.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unimega.errors import CheckpointError, run_cli


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a new folder")
    parser.add_argument("--separator-ids", help="separators that count as vision, instead of the tokenizer's: 89,90")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    arguments = parser.parse_args(argv)
    separators = _ids(arguments.separator_ids)

    from unimega.hf.convert import import_folder  # torch and megatron-core, once the arguments are sound

    counts = {"copied": 0, "carried": 0, "dropped": 0}

    def report(names: tuple[str, ...], key: str, fate: str) -> None:
        counts[fate] += len(names)
        why = {"copied": "", "carried": " (frozen: the original never uses it)", "dropped": "(the head is tied)"}[fate]
        print(f"{fate:<8} {' '.join(names)} -> {key}{why}" if key else f"{fate:<8} {' '.join(names)} {why}", flush=True)

    source = import_folder(
        arguments.folder, arguments.checkpoint, separator_ids=separators, overwrite=arguments.overwrite, report=report
    )
    vocabulary = source.spec.vocabulary
    print(
        f"{source.architecture}: preset {source.model.preset}, {len(source.spec.layers)} layers, {vocabulary.rows} rows"
    )
    if len(vocabulary.names) > 1:
        print(
            f"vision: ids from {vocabulary.starts[1]} up, and {', '.join(map(str, vocabulary.ids[1])) or 'none below'}"
        )
    print(f"{', '.join(f'{number} {fate}' for fate, number in counts.items())} -> {arguments.checkpoint}")


def _ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise CheckpointError(f"--separator-ids={text!r} is not a list of ids. Write it as 89,90.") from None


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
