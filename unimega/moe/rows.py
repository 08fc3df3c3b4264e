"""Which rows of a rank are tokens of which modality: host integers, so that nothing is masked or compacted."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from unimega.batch import TokenOrder


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [first, first + total) of a micro-batch in modality order, numbered from 0."""

    first: int
    total: int
    spans: tuple[slice, ...]
    """Of each modality; pads, which are the last rows of the first in the whole order, are in none."""
    pads: slice
    document: torch.Tensor
    """[total]: number of each row's document in the micro-batch; pads come last."""
    documents: int
    """Documents of the whole micro-batch, pads too."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many there are of each modality."""
        return tuple(span.stop - span.start for span in self.spans)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """[total, ...] -> [M, ...]: sums over the rows of each modality."""
        return torch.stack([values[span].sum(dim=0) for span in self.spans])

    def blank_pads(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """[total, k] with ``fill`` in the rows of pads."""
        pads = self.pads
        if pads.start == pads.stop:
            return values
        blank = values.new_full((pads.stop - pads.start, values.shape[1]), fill)
        return torch.cat((values[: pads.start], blank, values[pads.stop :]))


def of_rank(order: TokenOrder, rank: int = 0, ranks: int = 1) -> Rows:
    """The rows of one of ``ranks`` equal parts; of a single one all."""
    total = sum(order.counts) // ranks
    first = rank * total

    def cut(start: int, stop: int) -> slice:
        low = min(max(start - first, 0), total)
        return slice(low, max(low, min(stop - first, total)))

    stops = list(accumulate(order.counts))
    starts = [0, *stops[:-1]]
    real = [stops[0] - order.pads, *stops[1:]]
    return Rows(
        first=first,
        total=total,
        spans=tuple(cut(start, stop) for start, stop in zip(starts, real, strict=True)),
        pads=cut(real[0], stops[0]),
        document=order.document[first : first + total],
        documents=len(order.documents.lengths),
    )
