"""The pair of factors that LoRA puts beside a weight: what they are, and what they add to it. Any process can ask."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fused:
    """Projections whose outputs lie in one weight: ``repeats`` runs, each with ``sizes`` parts of the projections."""

    sizes: tuple[int, ...] = (1,)
    repeats: int = 1

    @property
    def number(self) -> int:
        """How many they are, P."""
        return len(self.sizes)

    def owners(self, outputs: int) -> torch.Tensor:
        """[outputs, P], 1 where an output is the projection's."""
        unit = torch.tensor(self.sizes) * (outputs // (self.repeats * sum(self.sizes)))
        return torch.eye(self.number).repeat_interleave(unit, 0).repeat(self.repeats, 1)


ONE = Fused()
"""A weight of one projection."""


@dataclass(frozen=True)
class Pair:
    """The factors of one weight. Those of grouped experts have one more dim before the others."""

    a: torch.Tensor
    """[R, D]."""
    b: torch.Tensor
    """[O, rank]."""
    owners: torch.Tensor | None
    """[O, P] of 0 and 1; None: one projection."""
    scale: float

    def wide(self) -> torch.Tensor:
        """scale * B as one matrix for all projections, [O, R]: zero where an output is another one's."""
        b = self.b * self.scale
        return b if self.owners is None else (b.unsqueeze(-2) * self.owners.unsqueeze(-1)).flatten(-2)

    def delta(self) -> torch.Tensor:
        """What they add to the weight, [O, D] fp32."""
        wide = Pair(self.a, self.b.float(), self.owners, self.scale).wide()
        return wide @ self.a.float()
