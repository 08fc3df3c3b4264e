"""Packs in pieces to micro-batches.

``unimega.batch.make_microbatch`` says what a micro-batch is, token by token. Here the same comes out of pieces, runs of
tokens of one modality.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.batch import Microbatch, TokenOrder, rows_of_rank
from unimega.data.draft import Draft, Filling
from unimega.data.pieces import VISION
from unimega.data.rows import rows


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What of a micro-batch depends on the rank or the model."""

    tp_rank: int = 0
    tp: int = 1
    sequence_parallel: bool = False
    cross_document: bool = False


def collate(
    draft: Draft, filling: Filling, *, pack_length: int, scale: npt.NDArray[np.float32], step_tokens: int, rank: Rank
) -> Microbatch:
    """One micro-batch of all packs of a draft.

    Args:
        draft: T tokens in all, a multiple of ``pack_length``.
        scale: [M] weight of a target by the modality of its input token.
        step_tokens: tokens of the global batch without pads.

    Raises:
        OutOfPlace: a stored id is not of its modality.
    """
    made = rows(draft, filling, pack_length=pack_length, scale=scale, cross_document=rank.cross_document)
    counts, loss_counts = [0] * len(filling.vocabulary.names), [0] * len(filling.vocabulary.names)
    counts[0], loss_counts[0] = made.words + made.pads, made.loss_words
    if len(counts) > VISION:
        counts[VISION] = len(made.tokens) - counts[0]
        loss_counts[VISION] = len(made.loss_rows) - made.loss_words
    order = TokenOrder(
        permutation=made.permutation,
        inverse=made.inverse,
        counts=tuple(counts),
        counts_array=np.asarray(counts, dtype=np.int32),
        local_counts=rows_of_rank(counts, tp_rank=rank.tp_rank, tp=rank.tp, sequence_parallel=rank.sequence_parallel),
        pads=made.pads,
        to_documents=made.to_documents,
        from_documents=made.from_documents,
        documents=made.documents,
        own=made.own,
        positions=made.positions,
        document=made.document,
    )
    return Microbatch(
        order=order,
        tokens=made.tokens,
        labels=made.labels,
        loss_weights=made.loss_weights,
        loss_rows=made.loss_rows,
        loss_counts=tuple(loss_counts),
        step_tokens=step_tokens,
    )
