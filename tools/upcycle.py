"""Turn a dense checkpoint into one of routed experts, each a copy of the FFN.

    python tools/upcycle.py DENSE OUT --experts 8 --top-k 2 [--noise 0.01] [--drop 0.5] [--model.KEY VALUE ...]
    python tools/upcycle.py DENSE OUT --preset unimoe --experts 8 --from A B C D

DENSE is a folder of steps (its latest is taken) or one step's folder: a run's, or what tools/import_hf.py wrote.
Routers are drawn, small; as the weights of a token's experts sum to 1, the model computes at first what the dense one
did. --noise adds normal noise to each expert, in deviations of its weights; --drop draws that share of each expert's
hidden units anew. With --from expert e is the FFN of the e-th checkpoint named (from the first again after the last),
as Uni-MoE starts from specialists; all other weights are DENSE's. --model.KEY sets any key of routed experts in
[model] (docs/configuration.md), e.g. --model.sparse_every 2.

Prints what becomes of every tensor; layers that fare alike share a line. Weights are read, made and written one after
another: memory is that of one weight of all experts of a layer, and of the FFN weight that it is made of.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimega.config import expert_keys, loader
from unimega.config.schema import RunConfig
from unimega.errors import ConfigError, run_cli
from unimega.hf import fate
from unimega.hf.command import Parser, bar
from unimega.hf.target import CHECKPOINT, check_target


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    parser = Parser(__doc__)
    parser.add_argument("dense", metavar="DENSE", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--preset", default="moe", help="moe, or unimoe for its numbers and losses (default: moe)")
    parser.add_argument("--experts", type=int, help="experts of a layer; absent: --from's, or the preset's")
    parser.add_argument("--top-k", type=int, help="experts of a token; absent in unimoe: 2")
    parser.add_argument("--from", dest="specialists", metavar="CHECKPOINT", type=Path, nargs="+", default=[])
    parser.add_argument("--noise", type=float, default=0.0, help="in deviations of a weight (default: 0)")
    parser.add_argument("--drop", type=float, default=0.0, help="share of hidden units, 0 to 1 (default: 0)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (default: 1)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an imported or upcycled checkpoint, if nothing else is there"
    )
    parser.add_argument("--verbose", action="store_true", help="a line per tensor, not per kind of tensor")
    given, rest = parser.parse_known_args(argv)
    keys = _keys(given.preset, given.experts, given.top_k, len(given.specialists), rest)
    if not 0 <= given.noise < math.inf:
        raise ConfigError(f"--noise={given.noise} is no deviation. It is 0 or more, and finite.")
    if not 0 <= given.drop <= 1:
        raise ConfigError(f"--drop={given.drop} is no share. It is at least 0, at most 1.")
    check_target(given.out, CHECKPOINT, overwrite=given.overwrite)

    from unimega.hf.upcycle import Recipe, upcycle  # torch, once the arguments are sound

    recipe = Recipe(keys=keys, noise=given.noise, drop=given.drop, seed=given.seed)
    with bar("upcycle") as progress:
        done = upcycle(
            given.dense,
            given.out,
            recipe,
            specialists=given.specialists,
            overwrite=given.overwrite,
            progress=progress,
        )
    print("\n".join(fate.each(done.fates) if given.verbose else fate.grouped(done.fates)))
    counted = ", ".join(f"{number} {kind}" for kind, number in fate.count(done.fates).items() if kind != "carried")
    print(f"{counted} -> {given.out}")
    same = f"not what the dense one did: {done.changes}" if done.changes else "what the dense one did"
    print(f"at first the model computes {same}")
    print(f"[model] of a run: {given.out / 'model.toml'}")


def _keys(preset: str, experts: int | None, top_k: int | None, specialists: int, rest: Sequence[str]) -> dict[str, Any]:
    """``[model]`` keys of routed experts from the options."""
    if preset not in expert_keys.PRESETS:
        raise ConfigError(f"--preset={preset!r} has no routed experts. Presets: {', '.join(expert_keys.PRESETS)}.")
    files, options = loader.split_arguments(rest)
    unknown = [name for name in options if name.removeprefix("model.") not in expert_keys.OWN_KEYS or "." not in name]
    if files or unknown:
        raise ConfigError(
            f"command line: unknown option --{'config' if files else unknown[0]}. Beside those of --help it may be "
            f"--model.KEY with KEY one of {', '.join(expert_keys.OWN_KEYS)}."
        )
    keys: dict[str, Any] = {"preset": preset, **loader.override(RunConfig, options).get("model", {})}
    if experts is None and preset == "moe":
        experts = specialists or None
    for name, value in (("experts", experts), ("top_k", top_k)):
        if value is not None:
            keys[name] = value
    for name, how in (("experts", "or one checkpoint per expert with --from"), ("top_k", "e.g. 2")):
        if preset == "moe" and name not in keys:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is missing. Give a number, {how}.")
    return keys


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
