"""RMSNorm with one weight for all tokens or one per modality."""

import torch
from torch import nn

from unimega.kernels.registry import resolve
from unimega.layers.context import Build
from unimega.parallel.parameter import parameter


class Norm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * weight[modality]`` on this rank's rows.

    Under sequence parallelism the weights see T / tp rows each; their gradients are summed over tp with all others that
    are marked so, in one all-reduce a step.
    """

    OP = "rms_norm"

    def __init__(self, build: Build, *, split: bool) -> None:
        super().__init__()
        names = build.spec.modalities if split else None
        self.suffixes = tuple(f"_{name}" for name in names) if names else ("",)
        for suffix in self.suffixes:
            self.register_parameter(f"weight{suffix}", parameter(build.spec.width, on_local_rows=True))
        self.eps = build.spec.norm_eps
        self.op = resolve(self.OP, device=build.device, impl=build.kernel(self.OP))

    def forward(self, x_tD: torch.Tensor, local_counts: tuple[int, ...]) -> torch.Tensor:
        """Normalise [t, D] rows in modality order; ``local_counts`` are host ints that sum to t."""
        return self.op(x_tD, *self._arguments(x_tD, local_counts))

    def _arguments(
        self, x_tD: torch.Tensor, local_counts: tuple[int, ...]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], float]:
        counts = local_counts if len(self.suffixes) > 1 else (x_tD.shape[0],)
        return tuple(getattr(self, f"weight{s}") for s in self.suffixes), counts, self.eps


class AddNorm(Norm):
    """The norm of a residual sum, which it makes in the same pass."""

    OP = "add_rms_norm"

    def forward(  # type: ignore[override]
        self, x_tD: torch.Tensor, residual_tD: torch.Tensor, local_counts: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([t, D] normalised sum, [t, D] sum) of two outputs of a layer's parts."""
        return self.op(x_tD, residual_tD, *self._arguments(x_tD, local_counts))


class HeadNorm(nn.Module):
    """The weights of a q or k norm, [N] each. The op ``qkv_prepare`` applies them; megatron-core finds them by name.

    They see this rank's heads only, so their gradients are summed over tp, with or without sequence parallelism.
    """

    def __init__(self, build: Build, *, split: bool) -> None:
        super().__init__()
        names = build.spec.modalities if split else None
        self.suffixes = tuple(f"_{name}" for name in names) if names else ("",)
        for suffix in self.suffixes:
            self.register_parameter(f"weight{suffix}", parameter(build.spec.head_width))

    def forward(self) -> tuple[torch.Tensor, ...]:
        """One weight per modality, or one."""
        return tuple(getattr(self, f"weight{suffix}") for suffix in self.suffixes)
