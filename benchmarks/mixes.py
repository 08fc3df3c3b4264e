"""The documents of the data benchmarks: lengths as of web texts, captioned images and pages of both."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.config.vocabulary import Vocabulary
from unimega.data import format as layout
from unimega.data.writer import CorpusWriter

IMAGE_CODES, CODEBOOK, TEXT_IDS, OFFSET = 1024, 8192, 151_643, 151_936
EOS, PAD, BEGIN, END = 151_643, 151_645, 151_652, 151_653
UNCONDITIONAL = [27, 359, 44322, 29]
SHARES = {"A": (0.5, 0.4, 0.1), "B": (0.1, 0.8, 0.1), "C": (1.0, 0.0, 0.0)}
"""Of texts, pairs and interleaved pages in each mix."""
VOCABULARY = Vocabulary(
    names=("text", "vision"),
    starts=(0, OFFSET),
    codes=(OFFSET, CODEBOOK),
    rows=OFFSET + CODEBOOK,
    ids=((), (BEGIN,)),
)


@dataclass(frozen=True)
class Mix:
    """n documents without their ids."""

    documents: npt.NDArray[np.int64]
    """[n + 1] first sequence of each."""
    lengths: npt.NDArray[np.int64]
    """[S] ids of each sequence, as they are stored."""
    modes: npt.NDArray[np.int8]

    def assembled(self) -> npt.NDArray[np.int64]:
        """[n] tokens of each document in a pack: prompts of 10 tokens, 5 % of captions unconditional, borders, eos."""
        image = (self.modes & layout.MODALITY_BITS) == layout.VISION
        caption = self.modes == layout.MODE_CAPTION
        dropped = np.random.default_rng(1).random(len(self.modes)) < 0.05
        text = np.where(caption, np.where(dropped, 4, self.lengths + 10), self.lengths)
        return np.add.reduceat(np.where(image, self.lengths + 2, text), self.documents[:-1]) + 1


def mix(name: str, count: int, *, seed: int = 0) -> Mix:
    """``count`` documents of mix A, B or C."""
    draw = np.random.default_rng(seed)
    kind = draw.choice(3, size=count, p=SHARES[name])
    text = np.clip(draw.lognormal(np.log(420), 1.15, count), 16, 200_000).astype(np.int64)
    caption = np.clip(draw.lognormal(np.log(45), 0.75, count), 4, 400).astype(np.int64)
    images = np.clip(draw.geometric(0.38, count) + 1, 2, 12)
    parts = np.where(kind == 0, 1, np.where(kind == 1, 2, 2 * images + 1))
    documents = np.concatenate(([0], np.cumsum(parts)))
    owner = np.repeat(np.arange(count), parts)
    place = np.arange(documents[-1]) - documents[owner]
    between = np.clip(draw.lognormal(np.log(60), 0.9, len(owner)), 2, 1500).astype(np.int64)
    is_image = (kind[owner] > 0) & (place % 2 == 1)
    lengths = np.choose(kind[owner], (text[owner], caption[owner], between))
    modes = np.where(kind[owner] == 1, layout.MODE_CAPTION, layout.MODE_TEXT)
    lengths[is_image], modes[is_image] = IMAGE_CODES, layout.MODE_IMAGE
    return Mix(documents, lengths, modes.astype(np.int8))


def write(prefix: Path, made: Mix, *, seed: int = 5) -> int:
    """A corpus of random ids with these documents; returns how many tokens it stores."""
    draw = np.random.default_rng(seed)
    image = (made.modes & layout.MODALITY_BITS) == layout.VISION
    count = len(made.documents) - 1
    with CorpusWriter(prefix, overwrite=True) as writer:
        for first in range(0, count, 1 << 14):
            stop = min(count, first + (1 << 14))
            a, b = made.documents[first], made.documents[stop]
            lengths = made.lengths[a:b].astype(np.int32)
            total = int(lengths.sum())
            ids = draw.integers(100, TEXT_IDS, total, dtype=np.int32)
            codes = np.repeat(image[a:b], lengths)
            ids[codes] %= CODEBOOK
            writer.add_ids(ids.tobytes())
            sequences = np.diff(made.documents[first : stop + 1]).astype(np.int32)
            longest = int(np.add.reduceat(lengths, made.documents[first:stop] - a).max())
            writer.add_tables(lengths, made.modes[a:b], sequences, longest=longest)
        writer.finish(_facts())
    return int(made.lengths.sum())


def _facts() -> dict[str, Any]:
    special = {"eos": EOS, "pad": PAD, "vision_start": BEGIN, "vision_end": END, "unconditional": UNCONDITIONAL}
    return {
        "tokenizer": {"kind": "none", "name": "", "size": OFFSET, "eos": EOS, "sha256": "0" * 64, "special": special},
        "vocabulary": {"text": OFFSET, "codebook": CODEBOOK, "codes_per_image": IMAGE_CODES, "grid": [32, 32]},
        "sources": [{"path": "made", "first_document": 0, "direction": "both"}],
        "counts": {"text_documents_with_eos": 0},
        "made_by": {"version": "benchmark"},
    }


def write_index_only(prefix: Path, lengths: npt.NDArray[np.int32]) -> None:
    """A corpus of texts whose `.bin` is a hole of the right size: an index costs the same whatever is in it."""
    count = len(lengths)
    parts = layout.index_parts(lengths, np.arange(count + 1, dtype=np.int64), np.zeros(count, dtype=np.int8))
    content = b"".join(parts)
    size = 4 * int(lengths.sum(dtype=np.int64))
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(size)
    blocks = -(-size // layout.BLOCK_BYTES)
    sidecar = _facts() | {
        "format": layout.SIDECAR_FORMAT,
        "version": layout.SIDECAR_VERSION,
        "counts": {"documents": count, "sequences": count, "images": 0, "text_documents_with_eos": 0},
        "bin": {"bytes": size, "block_bytes": layout.BLOCK_BYTES, "crc32": ["00000000"] * blocks},
        "idx": {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"},
    }
    Path(f"{prefix}.json").write_text(json.dumps(sidecar), encoding="utf-8")
    Path(f"{prefix}.idx").write_bytes(content)


def write_plain(prefix: Path, lengths: npt.NDArray[np.int64]) -> Path:
    """Random ids in documents of these lengths, each one sequence that ends in eos, as Megatron-LM writes them."""
    if not Path(f"{prefix}.idx").exists():
        ids = np.random.default_rng(7).integers(100, TEXT_IDS, int(lengths.sum()), dtype=np.int32)
        ids[np.cumsum(lengths) - 1] = EOS
        ids.tofile(f"{prefix}.bin")
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        parts = layout.index_parts(lengths.astype(np.int32), documents, np.zeros(len(lengths), dtype=np.int8))
        Path(f"{prefix}.idx").write_bytes(b"".join(parts[:-1]))
    return prefix
