"""AdamW, the optimizer that megatron-core's distributed one calls: a class, with the state and arguments of ``AdamW``.

megatron-core chooses as it is imported, TransformerEngine's FusedAdam before Apex's; where neither can run, ours takes
their place (``unimega.parallel.repairs``). The table says which it is. A row cannot be named instead of that one.

Bytes of a step: 28 for each fp32 parameter (it, its gradient and two moments read, all but the gradient written).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from unimega.kernels import availability, registry


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


def _missing(device: torch.device) -> dict[str, str | None]:
    """Why FusedAdam of a package cannot run, in megatron-core's order."""
    return {
        name: availability.missing(package)
        for name, package in (("transformer-engine", "transformer_engine"), ("apex", "apex"))
        if device.type == "cuda"
    }


def _why_not(own: str) -> Callable[[torch.device], str | None]:
    """The ``why_not`` of a row: it is not there, or megatron-core takes one before it."""

    def why_not(device: torch.device) -> str | None:
        for name, reason in _missing(device).items():
            if name == own:
                return reason
            if reason is None:
                return f"megatron-core takes {name}'s"
        return None

    return why_not


registry.declare(
    "adamw",
    *(
        registry.Impl(name, f"{target}:FusedAdam", frozenset({"cuda"}), _why_not(name), note="never run on hardware")
        for name, target in (
            ("transformer-engine", "transformer_engine.pytorch.optimizers"),
            ("apex", "apex.optimizers"),
        )
    ),
    # torch._fused_adamw_ again: torch-npu has had a kernel of its own for it since 2.1
    registry.Impl("npu", f"{__name__}:AdamW", frozenset({"npu"}), availability.npu(), note="never run on hardware"),
    registry.Impl("reference", f"{__name__}:AdamW", registry.EVERYWHERE, _why_not("reference")),
)
