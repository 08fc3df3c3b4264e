"""Tiny models and micro-batches that tests share: all presets, one to three modalities, every make-up of a batch."""

import hashlib
from dataclasses import replace

import numpy as np
import torch

from unimega.batch import Microbatch, make_microbatch
from unimega.config import layer
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.vocabulary import Vocabulary

TOKENS = 64

TWO = Vocabulary(names=("text", "vision"), starts=(0, 24), codes=(24, 16), rows=43, ids=((), (5,)))
"""24 text ids of which 5 is vision, 16 codes, 3 rows that are never sampled: 43 does not divide by 2."""
ONE = Vocabulary(names=("text",), starts=(0,), codes=(43,), rows=43, ids=((),))
THREE = Vocabulary(
    names=("text", "vision", "audio"), starts=(0, 24, 34), codes=(24, 10, 9), rows=43, ids=((), (5,), (6, 7))
)


def spec(layers: tuple[LayerSpec, ...], vocabulary: Vocabulary = TWO, **changes: object) -> ModelSpec:
    """A model of width 32 with 4 heads of 12 (heads x head width is not the width) and 2 KV heads."""
    base = ModelSpec(
        vocabulary=vocabulary,
        layers=layers,
        width=32,
        heads=4,
        kv_heads=2,
        head_width=12,
        qk_norm=True,
        qkv_bias=False,
        output_bias=False,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied=False,
    )
    return replace(base, **changes)


ALL_SPLIT = LayerSpec(attention="split", output_projection="split", scope="document", ffn=(24, 8, 16), norms="split")
PRESETS: dict[str, ModelSpec] = {
    "dense": spec(layer.dense(4, ffn=24), qkv_bias=True, qk_norm=False, tied=True),
    "unix": spec(layer.unix(4, ffn=(24, 24), encode=1, decode=1), qkv_bias=True, output_bias=True),
    "unix tied": spec(layer.unix(4, ffn=(24, 24), encode=2, decode=1), tied=True),
    "share": spec(layer.share(4, ffn=(24, 24), middle=(24, 10), shared=8, encode=1, decode=1)),
    "share, no vision FFN": spec(layer.share(4, ffn=(24, 24), middle=(24, 0), shared=8, encode=1, decode=1)),
    "moe_hard": spec(layer.moe_hard(4, ffn=(24, 24), every=2)),
    "mot": spec(layer.mot(4, ffn=(24, 16), output_projection="split"), qkv_bias=True, output_bias=True),
    "mot, original output": spec(layer.mot(4, ffn=(24, 24), output_projection="shared", unused_output=True)),
    "three modalities": spec(
        (*layer.unix(3, ffn=(24, 16, 8), encode=1, decode=1), ALL_SPLIT), THREE, qkv_bias=True, output_bias=True
    ),
    "one modality": spec(layer.unix(4, ffn=(24,), encode=1, decode=1), ONE),
}
SKIP = spec(layer.unix(5, ffn=(24, 24), encode=2, decode=2), skip=(1, 4))


def microbatch(
    model: ModelSpec, kind: str, seed: int, *, scale: float = 1.0, tp_rank: int = 0, tp: int = 1, sp: bool = False
) -> Microbatch:
    """64 tokens, a step alone: three documents and pads. ``kind``: mixed, text, image (all but pads), or mostly one."""
    rng = np.random.default_rng(seed)
    vocabulary = model.vocabulary
    lengths = [27, 1, 29, 7]
    document = np.repeat([1, 2, 3, 0], lengths)
    chance = {"mixed": 0.5, "text": 0.0, "image": 1.0, "mostly text": 0.03, "mostly image": 0.97}[kind]
    others = len(vocabulary.names) - 1
    drawn = (rng.random(TOKENS) < chance) * rng.integers(1, others + 1, TOKENS) if others else np.zeros(TOKENS, int)
    modality = np.where(document == 0, 0, drawn)
    starts, sizes = np.asarray(vocabulary.starts), np.asarray(vocabulary.codes)
    tokens = starts[modality] + (rng.random(TOKENS) * np.where(modality == 0, 5, sizes[modality])).astype(int)
    assert (vocabulary.modality_of(tokens) == modality).all()
    last = np.append(document[1:] != document[:-1], True)
    weights = np.where(last | (document == 0), 0.0, np.where(modality == 0, 2.0, 0.5)) * (rng.random(TOKENS) < 0.8)
    return make_microbatch(
        tokens,
        modality=modality,
        document=document,
        labels=np.roll(tokens, -1),
        loss_weights=weights * scale,
        modalities=others + 1,
        step_tokens=TOKENS - lengths[-1],
        cross_document=model.cross_document,
        tp_rank=tp_rank,
        tp=tp,
        sequence_parallel=sp,
    )


def random_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """Random values that depend on the name alone; norms and biases too, so that a swapped or dropped one shows."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.1 * values if "norm" in key else 0.15 * values
