"""Layers of routed experts from one step to the next: the biases that balance loads, and what routers did."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from unimega.models.stage import Stage
from unimega.moe.layer import MoE
from unimega.moe.router import balanced_bias
from unimega.moe.statistics import Statistics
from unimega.parallel.groups import Groups


class RoutedLayers:
    """The layers of routed experts on this rank.

    Args:
        own_rows: ranks of a tp group see rows of their own (sequence parallelism); else all of them see the same.
    """

    def __init__(self, stages: Sequence[Stage], groups: Groups, *, own_rows: bool) -> None:
        blocks = [block for stage in stages for block in stage.layers.values()]
        self.layers = {int(block.index): block.ffn for block in blocks if isinstance(block.ffn, MoE)}  # type: ignore[arg-type]
        self.seen_apart = groups.collection.tp_dp_cp if own_rows else groups.dp
        self.pp = groups.pp
        self._sums: dict[int, Statistics] = {}

    def forget(self) -> None:
        """Drop what routers did since the last step: no update came of it."""
        for layer in self.layers.values():
            layer.take_statistics()

    def end_step(self, *, applied: bool) -> None:
        """Move the biases by the loads of the step's global batch, and add its statistics to those not taken yet.

        Args:
            applied: the step changed the parameters; else biases stay as well.

        Collectives, only if a layer of this stage has a bias: one all-reduce of 8 bytes per expert of those layers,
        over the ranks that see other tokens. Nothing is read by the host.
        """
        biased: list[tuple[MoE, torch.Tensor]] = []
        for index, layer in self.layers.items():
            seen = layer.take_statistics()
            if seen is None:
                continue
            self._sums[index] = self._sums[index] + seen if index in self._sums else seen
            if layer.router.bias is not None:
                biased.append((layer, seen.slots.sum(dim=0)))
        if not biased or not applied:
            return
        slots = torch.cat([slots for _, slots in biased])
        dist.all_reduce(slots, group=self.seen_apart)
        for (layer, _), load in zip(biased, slots.split([len(own) for _, own in biased]), strict=True):
            bias = layer.router.bias
            assert bias is not None
            bias.copy_(balanced_bias(bias, load, layer.spec.bias_rate))

    def take(self) -> dict[int, Statistics]:
        """Statistics of all layers by number, summed over ranks and over the steps since the last call, on the host.

        Collective over the world: two all-reduces of some bytes per layer, expert and modality, one gather over pp.
        """
        taken, self._sums = self._sums, {}
        found: dict[int, Statistics] = {}
        if taken:
            counts = [[torch.tensor(s.tokens, device=s.slots.device), s.slots, s.dropped] for s in taken.values()]
            sums = [[s.entropy, s.balance, s.z_loss] for s in taken.values()]
            counts, sums = (self._reduced(values) for values in (counts, sums))
            for index, (tokens, slots, dropped), rest in zip(taken, counts, sums, strict=True):
                found[index] = Statistics(tuple(tokens.tolist()), slots, dropped, *rest)
        everyone: list[Any] = [None] * self.pp.size()
        dist.all_gather_object(everyone, found, group=self.pp)
        return {index: seen for stage in everyone for index, seen in sorted(stage.items())}

    def _reduced(self, rows: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Sums over ranks, on the host: all in one tensor on the way."""
        flat = torch.cat([values.flatten() for row in rows for values in row])
        dist.all_reduce(flat, group=self.seen_apart)
        pieces = iter(flat.cpu().split([values.numel() for row in rows for values in row]))
        return [[next(pieces).view(values.shape) for values in row] for row in rows]
