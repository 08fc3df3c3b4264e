"""Rows of the tokens of each modality, pads left out: host integers, so that nothing is masked or compacted."""

from itertools import accumulate

import torch

from unimega.batch import TokenOrder


def of_modalities(order: TokenOrder) -> tuple[slice, ...]:
    """Rows of each modality; the pads, which are the last rows of the first, are in none."""
    stops = list(accumulate(order.counts))
    starts = [0, *stops[:-1]]
    return tuple(
        slice(start, stop - (order.pads if not number else 0))
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )


def sum_of_modalities(values: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """[t, ...] -> [M, ...]: sums over the rows of each modality."""
    return torch.stack([values[rows].sum(dim=0) for rows in of_modalities(order)])


def without_pads(
    weights: torch.Tensor, experts: torch.Tensor, order: TokenOrder, none: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts [t, k] with 0 and ``none`` in the rows of pads."""
    if not order.pads:
        return weights, experts
    return _fill_pads(weights, order, 0.0), _fill_pads(experts, order, none)


def _fill_pads(values: torch.Tensor, order: TokenOrder, fill: float) -> torch.Tensor:
    stop = order.counts[0]
    pads = values.new_full((order.pads, values.shape[1]), fill)
    return torch.cat((values[: stop - order.pads], pads, values[stop:]))
