"""The definition of the optimizer's step, and its cases."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.kernels.case import Case, Tensors, noise, wide


class AdamW:
    """The update of the paper (arXiv:1711.05101), groups with options of their own."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.groups, self.lr, self.betas, self.eps, self.steps = groups, lr, betas, eps, 0
        self.moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def step(self) -> None:
        self.steps += 1
        (b1, b2), n = self.betas, self.steps
        for group in self.groups:
            for p in group["params"]:
                m, v = self.moments.get(id(p), (torch.zeros_like(p), torch.zeros_like(p)))
                m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
                self.moments[id(p)] = m, v
                decayed = p.data * (1 - self.lr * group["weight_decay"])
                p.data = decayed - self.lr * m / (1 - b1**n) / ((v / (1 - b2**n)).sqrt() + self.eps)


def adamw_case(name: str, *shapes: tuple[int, ...]) -> Case:
    leaves = tuple(noise(*shape, seed=i) for i, shape in enumerate(shapes))

    def call(op: Any, t: Tensors) -> Sequence[torch.Tensor]:
        params = [wide(leaf).detach().clone() for leaf in t]  # masters, whatever the precision of a run
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
        optimizer = op([group for group in groups if group["params"]], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        for number in range(3):
            for i, p in enumerate(params):
                p.grad = noise(*p.shape, seed=10 * number + i).to(p)
            optimizer.step()
        return params

    return Case(name, leaves, call)


CASES = (
    adamw_case("one number", (1,)),
    adamw_case("groups", (33, 7), (41,), (5, 3, 2)),
    adamw_case("no elements", (9, 4), (0, 4)),
)
