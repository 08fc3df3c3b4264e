"""Layers of routed experts and token orders that the tests of ``unimega.moe`` share."""

import numpy as np
import torch

from tests import models
from unimega import backend
from unimega.batch import TokenOrder, make_microbatch
from unimega.config import layer
from unimega.config.experts import ExpertSpec
from unimega.config.vocabulary import Vocabulary
from unimega.layers.context import Build, Call
from unimega.moe.layer import MoE
from unimega.parallel.experts import ExpertLayout
from unimega.parallel.linear import Layout

WIDTH = 32


class Alone:
    """A tp group of one rank, without a world."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def build(
    vocabulary: Vocabulary = models.TWO,
    *,
    layout: Layout | None = None,
    experts: ExpertLayout | None = None,
    kernels: dict[str, str] | None = None,
) -> Build:
    """A model of width 32, on this process alone if no ranks are given."""
    spec = models.spec(layer.dense(1, ffn=8), vocabulary)
    layout = layout or Layout(tp=Alone(), sequence_parallel=False)
    return Build(spec=spec, layout=layout, device=torch.device("cpu"), kernels=kernels or {}, experts=experts)


def make(experts: ExpertSpec, *, seed: int = 0, vocabulary: Vocabulary = models.TWO, **rest: object) -> MoE:
    """The layer with random weights."""
    made = MoE(build(vocabulary), experts, **rest)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in made.parameters():
            values.copy_(torch.randn(values.shape, generator=generator) * values.shape[-1] ** -0.5)
    return made


def call(
    *counts: int, pads: int = 0, documents: int = 1, sp: tuple[int, int] | None = None, step_tokens: int | None = None
) -> Call:
    """A forward over so many tokens of each modality, and pads; documents of about equal length in input order.

    ``sp``: (rank, ranks) of sequence parallelism. ``step_tokens``: of the step; absent: it is this forward alone.
    """
    tp_rank, tp = sp or (0, 1)
    real = sum(counts)
    modality = np.random.default_rng(real).permutation(np.repeat(np.arange(len(counts)), counts))
    document = np.arange(real) * documents // max(1, real) + 1
    total = real + pads
    batch = make_microbatch(
        np.zeros(total, dtype=np.int32),
        modality=np.concatenate([modality, np.zeros(pads, dtype=int)]),
        document=np.concatenate([document, np.zeros(pads, dtype=int)]),
        labels=np.zeros(total, dtype=np.int32),
        loss_weights=np.ones(total),
        modalities=len(counts),
        step_tokens=real if step_tokens is None else step_tokens,
        tp_rank=tp_rank,
        tp=tp,
        sequence_parallel=sp is not None,
    )
    order = backend.current().to_device(batch).order
    return Call(order=order, cos=torch.empty(0), sin=torch.empty(0), step_tokens=batch.step_tokens)


def tokens(order: TokenOrder, seed: int = 1) -> torch.Tensor:
    """[T, 32] that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(order.counts), WIDTH, generator=generator).requires_grad_()


def gradients(made: MoE, x: torch.Tensor, call: Call, *, seed: int = 2) -> dict[str, torch.Tensor]:
    """Output and gradients of x and of all parameters, by name, of a random linear function of the output."""
    made.zero_grad()
    x.grad = None
    y = made(x, call)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)))
    named = {name: values.grad for name, values in made.named_parameters()}
    return {"output": y.detach(), "x": x.grad, **named}
