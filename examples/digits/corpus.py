"""Real handwritten digits as a corpus of captions and codes: everything that the digits demo trains on.

    python examples/digits/corpus.py --output demo --split 10

Writes into OUTPUT: ``scans.npz`` (scans, labels, split, codebook), ``tokenizer/``, one ``.jsonl`` and one
``.bin/.idx/.json`` for each of ``digits`` (text to image), ``digits_warped`` (image to text) and the two held-out sets,
and last ``corpus.json``. The same split gives the same bytes. Held-out scans are in no training row.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

from unimega.errors import DataError, run_cli

ROOT = Path(__file__).resolve().parents[2]
VERSION = 1  # raise it when the same split would give another corpus

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "the digit {}", "a drawing of a {}")
UNKNOWN, PAD, EOS, UNCONDITIONAL = "<unk>", "<pad>", "<eos>", "<unconditional>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
SPECIALS = (UNKNOWN, PAD, EOS, VISION_END, UNCONDITIONAL, VISION_START)  # the last one counts as vision

HELD_OUT = 360
CODEBOOK = 32
SIDE, PATCH = 8, 2  # pixels
GRID = SIDE // PATCH
CODES = GRID * GRID
COPIES = 16  # warped copies of each training scan
SETS = ("digits", "digits_warped", "held_out_t2i", "held_out_i2t")
TICKS = 1 + COPIES + len(SETS)
ROTATION, SCALE, SHIFT, SHEAR = 0.1, 0.05, 0.5, 0.08  # +- radians, factor, pixels, factor

Scans = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Tick = Callable[[], None]
"""Called now and then by what takes a while, for a progress bar."""


@dataclass(frozen=True)
class Split:
    """The 1797 scans of scikit-learn, [N, 8, 8] in 0..1, and which of them are held out."""

    scans: Scans
    labels: Numbers
    train: Numbers
    held_out: Numbers


def split_scans(split: int) -> Split:
    """Cut the scans at random into 1437 for training and 360 held out, each digit in the same share."""
    digits = load_digits()
    scans, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=split)
    return Split(scans, labels, train, held_out)


@dataclass(frozen=True)
class Codebook:
    """A vector quantiser: a code names the centre nearest to a patch of 2 x 2 pixels; 16 a scan, in raster order."""

    centres: Scans
    """float32 [K, 4]."""

    @staticmethod
    def fit(scans: Scans, size: int = CODEBOOK) -> "Codebook":
        """k-means over the patches of ``scans`` [N, 8, 8]; one thread, so that sums are added in one order."""
        with threadpool_limits(1):
            fitted = KMeans(size, n_init=1, max_iter=50, random_state=0).fit(_patches(scans))
        return Codebook(fitted.cluster_centers_.astype(np.float32))

    def encode(self, scans: Scans) -> Numbers:
        """[N, 8, 8] to codes [N, 16]; the lower code wins a tie."""
        patches = _patches(scans).astype(np.float64)
        centres = self.centres.astype(np.float64)
        distances = (centres**2).sum(1) - 2 * patches @ centres.T
        return distances.argmin(1).reshape(len(scans), CODES)

    def decode(self, codes: Numbers) -> Scans:
        """[N, 16] to scans [N, 8, 8] in 0..1."""
        patches = self.centres[codes].reshape(len(codes), GRID, GRID, PATCH, PATCH)
        return patches.swapaxes(2, 3).reshape(len(codes), SIDE, SIDE).clip(0, 1)


def _patches(scans: Scans) -> Scans:
    cut = scans.reshape(len(scans), GRID, PATCH, GRID, PATCH).swapaxes(2, 3)
    return cut.reshape(-1, PATCH * PATCH)


def warp(scans: Scans, random: np.random.Generator) -> Scans:
    """A copy of each scan [N, 8, 8] under its own small random affine map: drawn at 4 times the size, then averaged."""

    def uniform(bound: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        return random.uniform(-bound, bound, len(scans))

    angle, scale, shear = uniform(ROTATION), 1 + uniform(SCALE), uniform(SHEAR)
    unit = SIDE / 2  # the grid's coordinates run from -1 to 1
    right, down = uniform(SHIFT) / unit, uniform(SHIFT) / unit
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    rows = np.stack((cos, shear - sin, right, sin, cos, down), 1)
    maps = torch.from_numpy(rows.reshape(-1, 2, 3).astype(np.float32))
    large = torch.nn.functional.interpolate(
        torch.from_numpy(scans)[:, None], scale_factor=4, mode="bicubic", align_corners=False
    )
    grid = torch.nn.functional.affine_grid(maps, list(large.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(large, grid, mode="bilinear", align_corners=False)
    return torch.nn.functional.avg_pool2d(moved, 4)[:, 0].clamp(0, 1).numpy()


def captions_of(label: int) -> list[str]:
    """The three captions of a digit."""
    return [caption.format(DIGITS[label]) for caption in CAPTIONS]


def vocabulary() -> dict[str, int]:
    """The 22 text ids: the words of all captions in alphabetical order, then the specials."""
    words = sorted({word for label in range(10) for caption in captions_of(label) for word in caption.split()})
    return {token: number for number, token in enumerate((*words, *SPECIALS))}


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer folder: one id per word."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"unk_token": UNKNOWN, "pad_token": PAD, "eos_token": EOS}
    others = [token for token in SPECIALS if token not in named.values()]
    _write_json(folder / "special_tokens_map.json", named | {"additional_special_tokens": others})
    _write_json(
        folder / "tokenizer_config.json",
        named
        | {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": others}
        | {"model_input_names": ["input_ids", "attention_mask"]}
        | {"clean_up_tokenization_spaces": False, "padding_side": "left", "model_max_length": 1 << 20},
    )


def warped(data: Split, split: int, copy: int) -> Scans:
    """Copy 1 to 16 of all training scans [1437, 8, 8], as the corpus of this split holds it."""
    return warp(data.scans[data.train], np.random.default_rng((split, copy)))


def training_rows(
    data: Split, book: Codebook, split: int, *, tick: Tick = lambda: None
) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
    """The rows of ``digits``, a scan under all its captions, and of ``digits_warped``, scans and copies under one."""
    labels = data.labels[data.train]
    copies = [book.encode(data.scans[data.train])]
    for copy in range(1, COPIES + 1):
        copies.append(book.encode(warped(data, split, copy)))
        tick()
    draws = np.random.default_rng((split, 0)).integers(len(CAPTIONS), size=(len(copies), len(labels)))

    def row(place: int, copy: int, caption: int, kind: str) -> dict[str, Any]:
        return {
            "data_type": kind,
            "caption": captions_of(labels[place])[caption],
            "codes": copies[copy][place].tolist(),
            "scan": int(data.train[place]),
            "copy": copy,
        }

    places = range(len(labels))
    to_image = (row(place, 0, caption, "t2i") for place in places for caption in range(len(CAPTIONS)))
    to_text = (row(place, copy, draws[copy, place], "i2t") for copy in range(len(copies)) for place in places)
    return to_image, to_text


def held_out_rows(data: Split, book: Codebook, split: int, kind: str) -> Iterator[dict[str, Any]]:
    """One row for each held-out scan, under one of its captions."""
    draws = np.random.default_rng((split, COPIES + 1)).integers(len(CAPTIONS), size=len(data.held_out))
    for scan, caption, codes in zip(data.held_out, draws, book.encode(data.scans[data.held_out]), strict=True):
        words = captions_of(data.labels[scan])[caption]
        yield {"data_type": kind, "caption": words, "codes": codes.tolist(), "scan": int(scan), "copy": 0}


def files(output: Path) -> list[Path]:
    """What ``build`` writes."""
    sets = [output / f"{name}{suffix}" for name in SETS for suffix in (".jsonl", ".bin", ".idx", ".json")]
    return [*sets, *sorted((output / "tokenizer").iterdir()), output / "scans.npz", output / "corpus.json"]


def read_scans(output: Path) -> tuple[Split, Codebook]:
    """The scans, their split and the codebook that ``build`` wrote."""
    with np.load(output / "scans.npz") as stored:
        return Split(*(stored[name] for name in ("scans", "labels", "train", "held_out"))), Codebook(stored["centres"])


def build(output: Path, *, split: int = 10, tick: Tick = lambda: None) -> dict[str, Any]:
    """Write the corpus below ``output`` and return what ``corpus.json`` holds; a whole one of this split is kept.

    ``tick`` is called ``TICKS`` times on the way.
    """
    done = output / "corpus.json"
    if done.is_file():
        found = json.loads(done.read_text())
        if (found["version"], found["split"]) == (VERSION, split):
            return dict(found)
        done.unlink()
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    data = split_scans(split)
    book = Codebook.fit(data.scans[data.train])
    shutil.rmtree(output / "tokenizer", ignore_errors=True)
    write_tokenizer(output / "tokenizer")
    np.savez(output / "scans.npz", centres=book.centres, **vars(data))
    tick()
    to_image, to_text = training_rows(data, book, split, tick=tick)
    rows = {
        "digits": to_image,
        "digits_warped": to_text,
        "held_out_t2i": held_out_rows(data, book, split, "t2i"),
        "held_out_i2t": held_out_rows(data, book, split, "i2t"),
    }
    counts = {}
    for name, lines in rows.items():
        counts[name] = _write_set(output / name, lines)
        tick()
    summary = {"version": VERSION, "split": split, "rows": counts, "seconds": round(time.monotonic() - start, 2)}
    _write_json(done, summary)
    return summary


def _write_set(prefix: Path, rows: Iterator[dict[str, Any]]) -> int:
    """PREFIX.jsonl, then PREFIX.bin, .idx and .json by the tool that anyone would use; returns the number of rows."""
    source = prefix.with_suffix(".jsonl")
    lines = [json.dumps(row) + "\n" for row in rows]
    source.write_text("".join(lines))
    tool = str(ROOT / "tools" / "preprocess_data.py")
    command = [sys.executable, tool, "--input", source.name, "--output", prefix.name, "--tokenizer", "tokenizer"]
    command += ["--codebook", str(CODEBOOK), "--codes-per-image", str(CODES), "--overwrite"]
    # From inside the folder: the names that the sidecar keeps do not depend on where the corpus lies.
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=prefix.parent)
    if done.returncode:
        raise DataError(f"{prefix.name}: preprocess_data.py ended with status {done.returncode}: {done.stderr.strip()}")
    return len(lines)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str]) -> None:
    """Build the corpus from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", metavar="DIR")
    parser.add_argument(
        "--split", type=int, default=10, metavar="N", help="seed of the cut into training and held-out scans"
    )
    arguments = parser.parse_args(argv)
    print(json.dumps(build(arguments.output, split=arguments.split)))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
