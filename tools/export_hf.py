"""Turn a checkpoint into a Hugging Face folder.

    python tools/export_hf.py CHECKPOINT OUT [--dtype bf16|fp16|fp32]
        [--format auto|uni_x|unimoe|qwen2|qwen3|llama|qwen3_moe|mixtral]
        [--tokenizer FOLDER] [--max-shard-size 5GB] [--overwrite] [--merge-lora | --adapter]

CHECKPOINT is a folder of steps (its latest is taken) or one step's folder. A dense model becomes a stock Qwen2, Qwen3
or Llama, one of routed experts a stock Qwen3-MoE or Mixtral, where these compute the same. Any other becomes uni_x,
which loads with trust_remote_code=True: modalities with weights or experts of their own, sigmoid scores, groups, a bias
of the router, shared experts. Exports drop no token: capacity is of training. --format unimoe writes Uni-MoE's names,
with the factors of LoRA where the checkpoint has them.

The factors of LoRA are added to the weights (--merge-lora), or written alone as a PEFT adapter (--adapter).
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from unimega.errors import CheckpointError, run_cli
from unimega.hf.command import Parser, bar
from unimega.hf.export_config import FORMATS, UNIMOE
from unimega.hf.target import EXPORT, check_target

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32; absent: as stored")
    parser.add_argument("--format", default="auto", help="absent: stock where it computes the same, else uni_x")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; absent: the run's")
    parser.add_argument("--max-shard-size", default="5GB", help="a larger model has several files")
    parser.add_argument("--merge-lora", action="store_true", help="add LoRA's factors to the weights")
    parser.add_argument("--adapter", action="store_true", help="LoRA's factors alone, as PEFT reads them")
    parser.add_argument("--overwrite", action="store_true", help="replace an export, if nothing else is there")
    arguments = parser.parse_args(argv)
    limit = _bytes(arguments.max_shard_size)
    if arguments.dtype not in (None, "bf16", "fp16", "fp32"):
        raise CheckpointError(f"--dtype={arguments.dtype!r} is unknown. Types: bf16, fp16, fp32.")
    if arguments.format not in FORMATS:
        raise CheckpointError(f"--format={arguments.format!r} is unknown. Formats: {', '.join(FORMATS)}.")
    if not arguments.checkpoint.is_dir():
        raise CheckpointError(f"{arguments.checkpoint}: not there. Name a folder of steps or one step's folder.")
    if arguments.adapter and (arguments.merge_lora or arguments.tokenizer):
        other = "--merge-lora" if arguments.merge_lora else "--tokenizer"
        raise CheckpointError(f"--adapter writes LoRA's factors alone, so that {other} has no place. Leave one out.")
    check_target(arguments.out, EXPORT, overwrite=arguments.overwrite)
    if arguments.adapter:
        _export_adapter(arguments)
        return

    from unimega.hf.export import export_checkpoint  # torch, once the arguments are sound

    with bar("export") as progress:
        done = export_checkpoint(
            arguments.checkpoint,
            arguments.out,
            format=arguments.format,
            dtype=arguments.dtype,
            max_shard_bytes=limit,
            tokenizer=arguments.tokenizer,
            merge_lora=arguments.merge_lora,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    how = "with trust_remote_code=True" if done.needs_code else "as it is"
    how = "in Uni-MoE's code" if arguments.format == UNIMOE else how
    tokens = f"tokenizer of {done.tokenizer}" if done.tokenizer else "no tokenizer (--tokenizer FOLDER adds one)"
    print(
        f"{done.model_type}: {done.tensors} tensors, {done.bytes / 1e6:.1f} MB in {len(done.files)} file(s); {tokens}"
    )
    print(f"{arguments.out} loads {how}: AutoModelForCausalLM.from_pretrained")


def _export_adapter(arguments: Namespace) -> None:
    from unimega.hf.export_adapter import export_adapter  # torch, once the arguments are sound

    done = export_adapter(
        arguments.checkpoint,
        arguments.out,
        format=arguments.format,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    print(f"adapter of a {done.model_type}: {done.tensors} tensors, {done.bytes / 1e6:.1f} MB")
    print(f"{arguments.out} loads beside its model: peft.PeftModel.from_pretrained")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise CheckpointError(f"--max-shard-size={text!r} is not a size. Write it as 5GB or 800MB.")
    return size


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
