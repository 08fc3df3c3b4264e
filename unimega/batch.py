"""Token order, worked out once on the host: the only thing that data, layers and training share.

A micro-batch is one flat run of T tokens: packs of whole documents, pads at their ends. Its rows occur in three orders:

- input order: as the collator laid the tokens down, pack after pack;
- modality order: text (its last rows are the pads), then vision, then the next, by documents in each. Tokens live in
  it from the embedding to the loss, so a linear split by modality is M plain GEMMs on contiguous slices;
- document order: documents whole and one after another (input order, if no document is interrupted). Only attention
  over documents sees it, and gathers it in a pass it makes anyway.

Everything here is numpy. ``backend.to_device`` returns the same classes with the arrays as device tensors; tuples and
ints stay host values, so no layer ever has to ask the device for a size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
"""A numpy array on the host, a torch tensor after ``backend.to_device``."""


@dataclass(frozen=True)
class Intervals:
    """Which keys a query sees: row i of the attention's order sees keys ``lo[i] <= j < hi[i]``, both non-decreasing."""

    cu_seqlens: Array
    """int32 [runs + 1]: borders of the runs of rows that never see each other (documents, or modalities of them)."""
    lengths: tuple[int, ...]
    """Rows of each run, host ints; they sum to T."""
    longest: int
    lo: Array
    """int32 [T]: first key of each row."""
    hi: Array
    """int32 [T]: one past the last key of each row."""
    causal: bool
    """True: ``lo`` is the start of the run and ``hi`` is ``i + 1`` everywhere, the case that varlen kernels know."""

    @staticmethod
    def of_runs(lengths: Sequence[int] | np.ndarray, *, both_ways: Sequence[tuple[int, int]] = ()) -> "Intervals":
        """Causal runs of these lengths; rows [start, stop) of each ``both_ways`` block see the whole block as well."""
        sizes = np.asarray(lengths, dtype=np.int64)
        cu = np.zeros(len(sizes) + 1, dtype=np.int32)
        np.cumsum(sizes, out=cu[1:])
        total = int(cu[-1])
        hi = np.arange(1, total + 1, dtype=np.int32)
        for start, stop in both_ways:
            hi[start:stop] = stop
        return Intervals(
            cu_seqlens=cu,
            lengths=tuple(sizes.tolist()),
            longest=int(sizes.max(initial=0)),
            lo=np.repeat(cu[:-1], sizes),
            hi=hi,
            causal=not len(both_ways),
        )


@dataclass(frozen=True)
class TokenOrder:
    """Where each of the T tokens of a micro-batch lies, and whom it may see. Shared by all layers and stages."""

    permutation: Array
    """int32 [T]: ``x_modality = x_input[permutation]``."""
    inverse: Array
    """int32 [T]: ``x_input = x_modality[inverse]``."""
    counts: tuple[int, ...]
    """Tokens of each modality, M host ints that sum to T; pads are the last rows of the first."""
    counts_array: Array
    """int32 [M], the same."""
    local_counts: tuple[int, ...]
    """The part of ``counts`` in this tp rank's range of rows under sequence parallelism; ``counts`` without it."""
    pads: int
    to_documents: Array
    """int32 [T]: ``x_document = x_modality[to_documents]``, the gather before attention over documents."""
    from_documents: Array
    """int32 [T], its inverse: ``x_modality = x_document[from_documents]``."""
    documents: Intervals
    """Who sees whom in document order (scope ``document``)."""
    own: Intervals
    """Who sees whom in modality order, each (modality, document) a run (scope ``own``)."""
    positions: Array
    """int32 [T] in modality order: place in the document (in the pack with ``cross_document``), for RoPE."""
    document: Array
    """int32 [T] in modality order: number of the token's document in the micro-batch; the pads come last."""


@dataclass(frozen=True)
class Microbatch:
    """One forward and backward: T tokens in modality order with their targets."""

    order: TokenOrder
    tokens: Array
    """int32 [T] ids."""
    labels: Array
    """int32 [T] ids; any valid id where the weight is 0."""
    loss_weights: Array
    """float32 [T]: weight of each token's cross-entropy in the loss of the step; 0 for pads and last tokens."""
    loss_rows: Array
    """int32 [n]: the rows whose weight is not 0, ascending: the head computes only these."""
    loss_counts: tuple[int, ...]
    """How many of ``loss_rows`` lie in each modality's slice, M host ints."""
    step_tokens: int
    """Tokens of the global batch without pads, which losses of routers are divided by."""


def make_microbatch(
    tokens: np.ndarray,
    *,
    modality: np.ndarray,
    document: np.ndarray,
    labels: np.ndarray,
    loss_weights: np.ndarray,
    modalities: int,
    step_tokens: int,
    pack_length: int | None = None,
    cross_document: bool = False,
    tp_rank: int = 0,
    tp: int = 1,
    sequence_parallel: bool = False,
) -> Microbatch:
    """Bring T tokens from input order to modality order.

    Args:
        tokens, labels: ids, [T] in input order.
        modality: [T], 0 is text. Pads must be 0.
        document: [T] number of each token's document, 0 for pads; a number in another pack is another document.
        loss_weights: [T] float.
        modalities: M.
        step_tokens: tokens of the global batch without pads.
        pack_length: T is that many packs of this length; absent: one pack.
        cross_document: attention and positions run over whole packs (old Uni-X checkpoints); pads still stand apart.
        tp_rank, tp, sequence_parallel: which rows are this rank's between the linears.

    Raises:
        ValueError: T is not a multiple of the pack length, or of tp under sequence parallelism.
    """
    total = len(tokens)
    pack_length = pack_length or total
    if total % pack_length:
        raise ValueError(f"{total} tokens are not a multiple of the pack length {pack_length}")
    is_pad = document == 0
    pack = np.arange(total) // pack_length
    group = _groups(np.where(is_pad, 0, 1 if cross_document else document), pack)

    by_document = np.argsort(group, kind="stable").astype(np.int32)
    key = np.where(is_pad, 1, modality * 2).astype(np.uint8)  # a stable sort of bytes is a radix sort
    permutation = by_document[np.argsort(key[by_document], kind="stable")]
    inverse = _inverse(permutation)
    counts = np.bincount(modality, minlength=modalities)
    edges = np.concatenate(([0], np.cumsum(counts)))

    positions = np.empty(total, dtype=np.int32)
    lengths = np.bincount(group)
    starts = np.cumsum(lengths) - lengths
    positions[by_document] = np.arange(total) - np.repeat(starts, lengths)
    if cross_document:
        positions = (np.arange(total) % pack_length).astype(np.int32)

    to_documents = inverse[by_document]
    own_group = group[permutation] + key[permutation].astype(np.int64) * (int(group.max(initial=0)) + 1)
    weights = loss_weights[permutation].astype(np.float32)
    rows = np.flatnonzero(weights)
    order = TokenOrder(
        permutation=permutation,
        inverse=inverse,
        counts=tuple(counts.tolist()),
        counts_array=counts.astype(np.int32),
        local_counts=rows_of_rank(counts.tolist(), tp_rank=tp_rank, tp=tp, sequence_parallel=sequence_parallel),
        pads=int(is_pad.sum()),
        to_documents=to_documents,
        from_documents=_inverse(to_documents),
        documents=Intervals.of_runs(lengths[lengths > 0]),
        own=Intervals.of_runs(_run_lengths(own_group)),
        positions=positions[permutation],
        document=group[permutation].astype(np.int32),
    )
    return Microbatch(
        order=order,
        tokens=tokens[permutation].astype(np.int32),
        labels=labels[permutation].astype(np.int32),
        loss_weights=weights,
        loss_rows=rows.astype(np.int32),
        loss_counts=tuple(np.diff(np.searchsorted(rows, edges)).tolist()),
        step_tokens=step_tokens,
    )


def rows_of_rank(counts: Sequence[int], *, tp_rank: int, tp: int, sequence_parallel: bool) -> tuple[int, ...]:
    """How many rows of each modality lie in a tp rank's range; ``counts`` without sequence parallelism.

    Raises:
        ValueError: the rows cannot be cut into tp equal parts.
    """
    if not sequence_parallel:
        return tuple(counts)
    total = sum(counts)
    if total % tp:
        raise ValueError(f"{total} tokens cannot be cut into tp={tp} equal parts")
    low, high = tp_rank * (total // tp), (tp_rank + 1) * (total // tp)
    stops = list(itertools.accumulate(counts))
    return tuple(max(0, min(stop, high) - max(stop - count, low)) for stop, count in zip(stops, counts, strict=True))


def _groups(document: np.ndarray, pack: np.ndarray) -> np.ndarray:
    """Number the (pack, document) pairs 0, 1, ... in the order of packs, every pack's pads behind all documents."""
    wide = int(document.max(initial=0)) + 1
    key = np.where(document == 0, (int(pack[-1]) + 1) * wide + pack, pack * wide + document)
    return np.unique(key, return_inverse=True)[1]


def _inverse(permutation: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    return inverse


def _run_lengths(values: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal values."""
    borders = np.flatnonzero(np.diff(values)) + 1
    return np.diff(np.concatenate(([0], borders, [len(values)])))
