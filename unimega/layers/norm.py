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

    def __init__(self, build: Build, *, split: bool) -> None:
        super().__init__()
        names = build.spec.modalities if split else None
        self.suffixes = tuple(f"_{name}" for name in names) if names else ("",)
        for suffix in self.suffixes:
            self.register_parameter(f"weight{suffix}", parameter(build.spec.width, on_local_rows=True))
        self.eps = build.spec.norm_eps
        self.rms_norm = resolve("rms_norm", device=build.device, impl=build.kernel("rms_norm"))

    def forward(self, x_tD: torch.Tensor, local_counts: tuple[int, ...]) -> torch.Tensor:
        """Normalise [t, D] rows in modality order; ``local_counts`` are host ints that sum to t."""
        counts = local_counts if len(self.suffixes) > 1 else (x_tD.shape[0],)
        return self.rms_norm(x_tD, tuple(getattr(self, f"weight{s}") for s in self.suffixes), counts, self.eps)


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
