"""Logits, loss and gradients of a checkpoint: the tool with which a port is checked.

    python tools/logits.py --checkpoint CHECKPOINT --inputs in.npz --output out.npz [--gradients]
        [--model.cross_document true] [--parallel.tp 2 --parallel.sequence_parallel true ...]

alone, or on several ranks under torchrun. in.npz: input_ids [B, T], each row a pack; where given segment_ids [B, T]
(document of each token, 0: pad; absent: one document a row) and labels [B, T] (Hugging Face's: position t is scored on
labels[t + 1], -100 is not scored). out.npz: logits fp32 [B, T, rows of the file] in input order, 0 on pads; loss, the
mean over all scored positions; with --gradients its gradient by every parameter under its original name. A model with
routed experts also gives router_logits fp32 [sparse layers, B*T, experts] in input order, 0 on pads, and router_loss,
transformers' balance loss over all these layers together; it is no part of loss.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimega.config import loader, strict
from unimega.config.schema import ParallelConfig
from unimega.errors import UnimegaError, run_cli
from unimega.hf.command import Parser
from unimega.hf.inputs import read_inputs


@dataclass(frozen=True, kw_only=True)
class Model:
    """What may be asked of the model beside its checkpoint."""

    cross_document: bool | None = None
    """Attention and positions run over whole packs. Absent: as the checkpoint says."""


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The options with a dot."""

    model: Model
    parallel: ParallelConfig


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="a folder of steps, or one step's folder")
    parser.add_argument("--inputs", required=True, type=Path, metavar="in.npz")
    parser.add_argument("--output", required=True, type=Path, metavar="out.npz")
    parser.add_argument("--gradients", action="store_true")
    arguments, rest = parser.parse_known_args(argv)
    _, options = loader.split_arguments(rest)
    where = loader.COMMAND_LINE
    sections = strict.construct(Sections, loader.override(Sections, options), where=where)
    if arguments.output.is_dir() or not arguments.output.parent.is_dir():
        raise UnimegaError(f"--output {arguments.output}: not a file in a folder that exists. Name one.")
    inputs = read_inputs(arguments.inputs)  # before torch is imported: a bad file is answered at once

    from unimega.hf.evaluate import Request, evaluate

    out = evaluate(
        Request(
            checkpoint=arguments.checkpoint,
            inputs=inputs,
            where=arguments.inputs,
            gradients=arguments.gradients,
            cross_document=sections.model.cross_document,
            parallel=sections.parallel,
        )
    )
    if out is not None:
        _write(arguments.output, out)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All of it or nothing."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # names of arrays, not its own options
        os.replace(partial, path)
    except OSError as error:
        raise UnimegaError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
