"""Every tolerance of the test suite, each with its reason.

Relative means max|difference| / max|reference| of a tensor, unless said otherwise.
"""

import torch

KERNEL_FACTOR = 2.0
"""An implementation may err twice as much as plain torch in the same dtype: sums in another order, no less precise."""

KERNEL_FLOOR = {torch.float64: 16.0, torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}
"""What is granted when plain torch happens to be exact, in units of the dtype's eps x max|exact|.

Half for 16-bit types is their one final rounding; four and more for wide ones is a sum in another order.
"""

NEIGHBOURS = 1e-6
"""Relative, fp32: a run of rows when the sizes of its neighbours change, and with them the shapes of the products."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max|got - want| / max|want| in fp64; 0 if they are equal, inf if want is all zero and got is not."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    difference = (got - want).abs().max().item() if got.numel() else 0.0
    if difference == 0:
        return 0.0
    scale = want.abs().max().item()
    return difference / scale if scale else float("inf")


def assert_as_good_as(got: torch.Tensor, low: torch.Tensor, exact: torch.Tensor, *, what: str) -> None:
    """Hold ``got`` to the exact result as well as plain torch in the same dtype does.

    Args:
        got: result of the implementation.
        low: the plain definition, computed in the dtype of the inputs.
        exact: the plain definition in fp64, of the same (rounded) inputs.
        what: name for the message.
    """
    mine, plain = relative_error(got, exact), relative_error(low, exact)
    allowed = KERNEL_FACTOR * plain + KERNEL_FLOOR[low.dtype] * torch.finfo(low.dtype).eps
    if not mine <= allowed:  # a NaN is not
        raise AssertionError(f"{what}: error {mine:.3g}, allowed {allowed:.3g} (plain torch {plain:.3g})")


PARITY_FP32 = 1e-5
"""Relative: the same model on other ranks adds the same products in another order (measured: 2e-6 and less)."""

NEIGHBOURS_LOGITS = 1e-5
"""Of the largest |logit|, fp32: rule 1 of the design when the sizes of a document's neighbours change."""

GPU_FP32 = 5e-5
"""Relative, fp32 without TF32: the same model on another device, whose GEMMs and softmax sum in another order."""

PARITY_BF16 = 6e-2
"""Relative, bf16: tp and recompute round the same sums at other places (2^-8 each, a few layers deep)."""

RESHARDED_LOSS = 1e-6
"""Relative, of losses after a resume under another layout in fp32: sums over ranks are rounded in another order."""
