"""AdamW whose state survives megatron-core's checkpoints."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class AdamW(torch.optim.Optimizer):
    """AdamW as TransformerEngine's and Apex's FusedAdam keep it: ``step`` is an int of the group, never a tensor.

    megatron-core's distributed optimizer saves groups and moments apart and cannot reload torch's AdamW, whose ``step``
    lies with the moments. The arithmetic is torch's fused kernel, the state ``exp_avg`` and ``exp_avg_sq``.
    A parameter that has no gradient is left alone in that step; the group's step counts on.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        """Take parameters or groups.

        Args:
            params: as torch's optimizers take them.
            lr, betas, eps, weight_decay: defaults of the groups.
            adam_w_mode: False adds the weight decay to the gradient (Adam); megatron-core passes it.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient: one kernel call per group, device and dtype. No host sync."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            alike: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    params, grads = alike.setdefault((p.device, p.dtype), ([], []))
                    params.append(p)
                    grads.append(p.grad)
            for params, grads in alike.values():
                self._update(group, params, grads)
        return loss

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        beta1, beta2 = group["betas"]
        step = torch.full((), float(group["step"]), device=params[0].device)
        self._kernel(
            params,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
