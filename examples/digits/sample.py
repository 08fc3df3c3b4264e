"""Draw digits from captions and caption scans, with an export and transformers alone.

    python examples/digits/sample.py demo/export "a drawing of a seven" "the digit two"

prints each drawing as text. ``draw`` and ``describe`` are what `make demo` judges: one left-padded batch each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from corpus import CODES, UNCONDITIONAL, VISION_END, VISION_START, Numbers, Tick, read_scans
from transformers import AutoModelForCausalLM, AutoTokenizer

from unimega.errors import UnimegaError, run_cli

GUIDANCE, TEMPERATURE = 2.0, 0.8
CAPTION_TOKENS = 10


class Sampler:
    """An export with its tokenizer, loaded as anyone would load it. ``tick`` is called for each token of a batch."""

    def __init__(self, export: Path) -> None:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        options: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        self.tokenizer = AutoTokenizer.from_pretrained(export, **options)
        self.model = AutoModelForCausalLM.from_pretrained(export, **options).eval()
        self.first_code = self.model.config.real_text_vocab_size

    def draw(self, captions: Sequence[str], *, seed: int, tick: Tick = lambda: None) -> Numbers:
        """Codes [N, 16] for N captions: guidance 2 against ``<unconditional>``, temperature 0.8, code ids only."""
        prompts = self.tokenizer([f"{caption} {VISION_START}" for caption in captions], padding=True)
        nothing = self.tokenizer([UNCONDITIONAL + VISION_START] * len(captions))
        torch.manual_seed(seed)
        ids = self.model.generate(
            torch.tensor(prompts.input_ids),
            attention_mask=torch.tensor(prompts.attention_mask),
            modality="vision",
            guidance_scale=GUIDANCE,
            negative_prompt_ids=torch.tensor(nothing.input_ids),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=CODES,
            streamer=_Ticker(tick),
        )
        return (ids[:, -CODES:] - self.first_code).numpy()

    def describe(self, codes: Numbers, *, tick: Tick = lambda: None) -> list[str]:
        """The likeliest caption, word by word, of each of the images ``codes`` [N, 16]."""
        start, end = self.tokenizer.convert_tokens_to_ids([VISION_START, VISION_END])
        prompts = torch.from_numpy(np.pad(codes + self.first_code, ((0, 0), (1, 1)), constant_values=start))
        prompts[:, -1] = end
        ids = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            modality="text",
            do_sample=False,
            max_new_tokens=CAPTION_TOKENS,
            streamer=_Ticker(tick),
        )
        said: list[str] = self.tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
        return said


class _Ticker:
    """What ``generate`` calls a streamer: it hands over the prompt first, then each token of the whole batch."""

    def __init__(self, tick: Tick) -> None:
        self.tick, self.is_prompt = tick, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.tick()
        self.is_prompt = False

    def end(self) -> None:
        pass


def as_text(scan: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """A scan [8, 8] in 0..1 as eight lines of characters, two for each pixel."""
    shades = " .:-=+*#%@"
    return "\n".join("".join(2 * shades[round(float(grey) * 9)] for grey in row) for row in scan)


def main(argv: Sequence[str]) -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", metavar="EXPORT", type=Path, help="e.g. demo/export; scans.npz lies beside it")
    parser.add_argument("captions", metavar="CAPTION", nargs="+")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args(argv)
    scans = arguments.export.absolute().parent / "scans.npz"
    for path in (arguments.export / "config.json", scans):
        if not path.is_file():
            raise UnimegaError(f"{str(path)!r} is missing. `make demo` makes it: give its folder demo/export.")
    _, book = read_scans(scans.parent)
    codes = Sampler(arguments.export).draw(arguments.captions, seed=arguments.seed)
    for caption, scan in zip(arguments.captions, book.decode(codes), strict=True):
        print(f"{caption}\n{as_text(scan)}\n")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
