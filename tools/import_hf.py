"""Turn a Hugging Face folder into a checkpoint that loads under any layout.

    python tools/import_hf.py FOLDER CHECKPOINT
    python tools/import_hf.py QWEN CHECKPOINT --preset unix --encode-layers 12 --decode-layers 6
        --codebook 8192 --init-vision text

The first takes a model as it is: Qwen2, Qwen3, Llama, Qwen3-MoE, Mixtral, the language model of Uni-MoE with its LoRA,
the original Uni-X (x, hard MoE, MoT), an export of ours. Experts may lie one by one or fused, as transformers holds
them; tools/upcycle.py makes experts of a dense checkpoint.

The second makes a stock model the start of one with images: text keeps its weights and logits, vision gets copies of
them or weights that are drawn, new rows are the mean of the rows that the tokenizer uses. Other presets: dense, share,
moe_hard, mot, with the keys of [model] that they have, and moe for a model that has routed experts.

Prints what becomes of every tensor; layers that fare alike share a line. The checkpoint starts a run:

    torchrun --nproc-per-node 8 examples/pretrain_unix.py --config CHECKPOINT/model.toml RUN.toml
        --checkpoint.initial CHECKPOINT
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimega.errors import CheckpointError, run_cli
from unimega.hf import fate
from unimega.hf.command import Parser, bar, ids
from unimega.hf.folder import read_config
from unimega.hf.read import Source, describe
from unimega.hf.start import Start, describe_start, find_tokenizer
from unimega.hf.target import CHECKPOINT, check_target


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    given = vars(_parser().parse_args(argv))
    folder, target = given.pop("folder"), given.pop("checkpoint")
    seed, overwrite, verbose = given.pop("seed"), given.pop("overwrite"), given.pop("verbose")
    tokenizer, separators = given.pop("tokenizer"), ids("--separator-ids", given.pop("separator_ids"))
    given["vision_ids"] = ids("--vision-ids", given["vision_ids"])
    check_target(target, CHECKPOINT, overwrite=overwrite)
    config = read_config(folder)
    tokenizer = find_tokenizer(folder, tokenizer)
    what = _describe(config, folder, given, tokenizer, separators)

    from unimega.hf.convert import MODEL_TABLE, import_folder  # torch, once the arguments are sound

    with bar("import") as progress:
        fates = import_folder(
            folder, target, what=what, tokenizer=tokenizer, seed=seed, overwrite=overwrite, progress=progress
        )
    print("\n".join(fate.each(fates) if verbose else fate.grouped(fates)))
    source = what.source if isinstance(what, Start) else what
    _summary(source, what, tokenizer)
    print(f"{', '.join(f'{number} {kind}' for kind, number in fate.count(fates).items())} -> {target}")
    print(f"[model] of a run: {target / MODEL_TABLE}")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a new folder")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; absent: FOLDER, if it has one")
    parser.add_argument("--separator-ids", help="separators that count as vision, as in 89,90; absent: the original's")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an imported or upcycled checkpoint, if nothing else is there"
    )
    parser.add_argument("--verbose", action="store_true", help="a line per tensor, not per kind of tensor")
    parser.add_argument("--seed", type=int, default=1, help="of the weights that are drawn (default: 1)")
    start = parser.add_argument_group("start of a model with images: keys of [model]")
    start.add_argument("--preset", help="unix, share, moe_hard, mot or dense; moe if FOLDER has routed experts")
    start.add_argument("--codebook", type=int, help="number of VQ codes")
    start.add_argument("--init-vision", help="text: copies of text's weights; random: drawn (default: random)")
    start.add_argument("--encode-layers", type=int, help="unix, share: split layers at the bottom")
    start.add_argument("--decode-layers", type=int, help="unix, share: split layers at the top")
    start.add_argument("--skip-from", type=int, help="unix, share: encode layer with a skip connection; absent: none")
    start.add_argument("--vision-ffn-width", type=int, help="share, mot; absent: as wide as text's")
    start.add_argument("--shared-ffn-width", type=int, help="share; what it adds starts at 0")
    start.add_argument("--split-every", type=int, help="moe_hard: every k-th layer has an FFN per modality")
    start.add_argument("--output-projection", help="mot: split or shared; absent: split")
    start.add_argument("--vision-offset", type=int, help="id of code 0; absent: the folder's vocab_size")
    start.add_argument("--vocabulary-rows", type=int, help="absent: vision offset + codes")
    start.add_argument(
        "--vision-ids", help="ids below the codes that are vision; absent: the tokenizer's <|vision_start|>"
    )
    return parser


def _describe(
    config: dict[str, Any], folder: Path, keys: dict[str, Any], tokenizer: Path | None, separators: Any
) -> Source | Start:
    """The folder's model, or the one that it starts."""
    if keys["preset"] is not None:
        return describe_start(config, folder=folder, keys=keys, tokenizer=tokenizer, separator_ids=separators)
    extra = next((name for name, value in keys.items() if value is not None), None)
    if extra:
        option = extra.replace("_", "-")
        raise CheckpointError(f"--{option} is for the start of a model with images. Give --preset too.")
    return describe(config, folder=folder, separator_ids=separators)


def _summary(source: Source, what: Source | Start, tokenizer: Path | None) -> None:
    vocabulary = source.spec.vocabulary
    becomes = f" starts {source.model.preset}" if isinstance(what, Start) else f": preset {source.model.preset}"
    print(f"{source.architecture}{becomes}, {len(source.spec.layers)} layers, {vocabulary.rows} rows")
    if len(vocabulary.names) > 1:
        below = ", ".join(map(str, vocabulary.ids[1])) or "none below"
        first = vocabulary.starts[1]
        print(f"vision: ids from {first} up (codes {first} to {first + vocabulary.codes[1] - 1}), and {below}")
    if tokenizer is None and isinstance(what, Start):
        print("no tokenizer.json: all old rows count as used, and the run's tokenizer tells the start of an image")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
