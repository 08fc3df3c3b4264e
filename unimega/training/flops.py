"""How many floating-point operations a step needs, from the model and the make-up of its tokens."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from unimega.batch import Intervals, Microbatch
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec


def step_flops(spec: ModelSpec, microbatches: Sequence[Microbatch]) -> float:
    """FLOPs of forward and backward, a multiply-add as two, nothing counted twice under recompute.

    Linears: 2 x weights passed, per token of each modality; attention: 4 x keys seen x heads x head width per query;
    head: rows that carry loss only. The backward is twice the forward.

    Args:
        microbatches: on the host.
    """
    total = 0.0
    attention_width = spec.heads * spec.head_width
    projections = spec.width * (2 * attention_width + 2 * spec.kv_heads * spec.head_width)
    for batch in microbatches:
        order = batch.order
        pairs = {"document": _pairs(order.documents), "own": _pairs(order.own)}
        tokens = np.asarray(order.counts, dtype=np.float64)
        for layer in spec.layers:
            total += 2 * (float(tokens.sum()) * projections + spec.width * _ffn(layer, tokens, order.pads))
            total += 4 * pairs[layer.scope] * attention_width
        total += 2 * len(batch.loss_rows) * spec.width * spec.vocabulary.rows
    return 3 * total


def _ffn(layer: LayerSpec, tokens: npt.NDArray[np.float64], pads: int) -> float:
    """Weights passed, per unit of model width, by all tokens [M]; routed experts are passed by all but pads."""
    experts = layer.experts
    if experts is None:
        return 3 * float(tokens @ (np.asarray(layer.ffn or (0,) * len(tokens)) + layer.shared_ffn))
    routed = (float(tokens.sum()) - pads) * (experts.number + 3 * experts.top_k * experts.width)
    return routed + float(tokens.sum()) * (3 * experts.shared_width + experts.shared_gate)


def _pairs(intervals: Intervals) -> float:
    """Number of (query, key) pairs that attention computes."""
    return float((intervals.hi.astype(np.int64) - intervals.lo).sum())
