"""What ``bench_step.py`` steps: sizes, a pack of documents, the models with their optimizers, and their GEMMs alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from masked import IGNORED, MaskedUniX, Trainer
from masked_mot import MaskedMoT

from unimega import backend
from unimega.batch import Microbatch, make_microbatch
from unimega.config import layer
from unimega.config.model import ModelSpec
from unimega.config.schema import OptimizerConfig, ParallelConfig
from unimega.config.vocabulary import Vocabulary
from unimega.parallel import groups
from unimega.training.engine import DTYPES, Engine
from unimega.training.flops import step_flops

LR = 1e-4
VISION_START = 5
MODELS, BASE = ("unix", "mot"), "dense"
"""Ours, one of which is compared with the others; and what time is compared with."""


@dataclass(frozen=True)
class Shape:
    """Sizes of model and batch; the defaults keep a CPU busy with GEMMs."""

    tokens: int = 2048
    shortest: int = 256
    longest: int = 1024
    width: int = 512
    layers: int = 4
    encode: int = 1
    decode: int = 1
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 1408
    text_rows: int = 4096
    codes: int = 4096


QUICK = Shape(tokens=512, shortest=64, longest=256, width=256, layers=4, ffn=704, text_rows=1024, codes=1024)


@dataclass(frozen=True)
class Pack:
    """Documents of text and one image each, in input order, without pads."""

    tokens: np.ndarray
    modality: np.ndarray
    document: np.ndarray
    labels: np.ndarray

    def microbatch(self) -> Microbatch:
        """For the engine; every target has the same weight."""
        scored = self.labels != IGNORED
        return make_microbatch(
            self.tokens,
            modality=self.modality,
            document=self.document,
            labels=np.where(scored, self.labels, 0),
            loss_weights=scored / scored.sum(),
            modalities=2,
            step_tokens=len(self.tokens),
        )

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """For ``MaskedUniX``: ids, labels, documents, positions."""
        starts = np.searchsorted(self.document, self.document)
        arrays = (self.tokens, self.labels, self.document, np.arange(len(starts)) - starts)
        return tuple(torch.from_numpy(a.astype(np.int64)).to(device) for a in arrays)


def make_pack(shape: Shape, seed: int = 1) -> Pack:
    """Documents of ``shortest`` to ``longest`` tokens, half of each an image, before its text or behind it."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := shape.tokens - sum(lengths)) > shape.longest:
        lengths.append(int(rng.integers(shape.shortest, min(shape.longest, left - shape.shortest) + 1)))
    lengths.append(left)
    tokens, modality = [], []
    for number, length in enumerate(lengths):
        image = length // 2
        codes = shape.text_rows + rng.integers(0, shape.codes, image)
        codes[0] = VISION_START
        text = rng.integers(VISION_START + 1, shape.text_rows, length - image)
        parts = [(codes, 1), (text, 0)][:: 1 if number % 2 else -1]
        tokens += [ids for ids, _ in parts]
        modality += [np.full(len(ids), value) for ids, value in parts]
    document = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    flat = np.concatenate(tokens)
    last = np.append(document[1:] != document[:-1], True)
    return Pack(flat, np.concatenate(modality), document, np.where(last, IGNORED, np.roll(flat, -1)))


def make_specs(shape: Shape, model: str) -> dict[str, ModelSpec]:
    """The models that the engine runs, ``model`` (of ``MODELS``) first."""
    rows = shape.text_rows + shape.codes
    ffn = (shape.ffn,) * 2
    if model == "mot":
        layers = layer.mot(shape.layers, ffn=ffn, output_projection="split")
        layers = tuple(replace(each, norms="split") for each in layers)
    else:
        layers = layer.unix(shape.layers, ffn=ffn, encode=shape.encode, decode=shape.decode)
    spec = ModelSpec(
        vocabulary=Vocabulary(
            names=("text", "vision"),
            starts=(0, shape.text_rows),
            codes=(shape.text_rows, shape.codes),
            rows=rows,
            ids=((), (VISION_START,)),
        ),
        layers=layers,
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.width // shape.heads,
        qk_norm=True,
        qkv_bias=False,
        output_bias=False,
        norm_eps=1e-6,
        rope_theta=1e6,
        tied=False,
    )
    document = layer.dense(shape.layers, ffn=shape.ffn)
    same = tuple(replace(d, scope=u.scope) for d, u in zip(document, layers, strict=True))
    made = {model: spec, BASE: replace(spec, layers=same)}
    return made if same == document else made | {"dense_document": replace(spec, layers=document)}


@dataclass(frozen=True)
class Contestant:
    """A model that can be stepped."""

    flops: float
    parameters: int
    step: Callable[[], float]
    """One update; the loss before it."""
    forward_backward: Callable[[], Any]


def make_contestants(shape: Shape, model: str, precision: str, pack: Pack) -> dict[str, Contestant]:
    """All models with their optimizers, from the same weights where they have them."""
    device, dtype, optimizer = backend.current().device, DTYPES[precision], OptimizerConfig()
    host = pack.microbatch()
    batches = [backend.to_device(host)]
    made: dict[str, Contestant] = {}
    specs = make_specs(shape, model)
    for name, spec in specs.items():
        groups.destroy()  # megatron-core's globals: the next engine fills them again with the same world of one
        engine = Engine(spec, ParallelConfig(), optimizer_config=optimizer, precision=precision)
        if name == model:
            masked = MaskedMoT(spec) if model == "mot" else MaskedUniX(spec, encode=shape.encode, decode=shape.decode)
            weights = engine.gather_parameters()
            assert weights is not None
            masked.load(weights)
        made[name] = _engine_contestant(engine, step_flops(spec, [host]), batches)
    tensors = pack.tensors(device)
    trainer = Trainer(masked, optimizer, device=device, dtype=dtype)
    made["masked"] = Contestant(
        flops=made[model].flops,
        parameters=sum(p.numel() for p in masked.parameters()),
        step=lambda: float(trainer.step(tensors, lr=LR)),
        forward_backward=lambda: trainer.forward_backward(tensors),
    )
    return made


def _engine_contestant(engine: Engine, flops: float, batches: list[Microbatch]) -> Contestant:
    return Contestant(
        flops=flops,
        parameters=sum(p.numel() for stage in engine.stages for p in stage.parameters()),
        step=lambda: engine.step(batches, lr=LR).loss,
        forward_backward=lambda: engine.forward_backward(batches),
    )


def model_gemms(spec: ModelSpec, batch: Microbatch, dtype: torch.dtype) -> tuple[float, Callable[[], None]]:
    """(FLOPs, a function that runs) one forward and both backward products of every linear, on buffers of their own."""
    device = backend.current().device
    heads = (spec.heads + 2 * spec.kv_heads) * spec.head_width
    jobs: list[tuple[int, int, int]] = [(len(batch.loss_rows), spec.width, spec.vocabulary.rows)]
    for each in spec.layers:
        for part, rows in enumerate(batch.order.counts if each.ffn else (sum(batch.order.counts),)):
            ffn = each.ffn[part] if each.ffn else each.shared_ffn
            jobs += [(rows, spec.width, heads), (rows, spec.heads * spec.head_width, spec.width)]
            jobs += [(rows, spec.width, 2 * ffn), (rows, ffn, spec.width)]

    @functools.cache
    def buffers(rows: int, d_in: int, d_out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = ((rows, d_in), (d_out, d_in), (rows, d_out))
        x, w, dy = (torch.randn(size, device=device).to(dtype) for size in sizes)
        return x, w, dy

    def run() -> None:
        with torch.no_grad():
            for job in jobs:
                x, w, dy = buffers(*job)
                _ = x @ w.t(), dy @ w, dy.t() @ x

    return 6.0 * sum(rows * d_in * d_out for rows, d_in, d_out in jobs), run
