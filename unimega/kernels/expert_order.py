"""Expert-major order of the slots of tokens: a counting sort by expert, stable, whose counts stay on the device.

``expert_order(experts, num_experts) -> ExpertOrder``

experts: [t, k] int32, the experts of each token, 0 .. E - 1; any other number (E, as ``topk_routing`` gives pads) is no
expert. No slot of a token may name an expert twice. There are N = t k slots; slot (i, j) is number i k + j.
No gradients. Nothing is read by the host: shapes depend on t, k and E alone.
Bytes: 12 N and what lies in caches. Deterministic.
"""

from dataclasses import dataclass

import torch

from unimega.kernels import compiled as helper
from unimega.kernels import registry


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Where slots lie when those of one expert are together; within an expert by their number."""

    offsets: torch.Tensor
    """[E + 1] int32: rows of expert e are offsets[e] .. offsets[e + 1]; slots without an expert lie behind."""
    place: torch.Tensor
    """[t, k] int32: row of slot (i, j)."""
    source: torch.Tensor
    """[N] int32: number of the slot at a row; the inverse of ``place``."""


def reference(experts: torch.Tensor, num_experts: int) -> ExpertOrder:
    """See the module: the definition in plain torch."""
    flat = experts.reshape(-1)
    flat = flat.where((flat >= 0) & (flat < num_experts), num_experts)
    if num_experts < torch.iinfo(torch.int16).max:
        flat = flat.short()  # a radix sort passes over each byte
    ids, source = flat.sort(stable=True)
    borders = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, borders, out_int32=True)
    rows = torch.arange(flat.shape[0], dtype=torch.int32, device=ids.device)
    place = torch.empty_like(rows).scatter_(0, source, rows)
    return ExpertOrder(offsets, place.view(experts.shape), source.int())


def compiled(experts: torch.Tensor, num_experts: int) -> ExpertOrder:
    """See the module: two passes over the slots in C++."""
    experts = experts.contiguous()
    offsets = experts.new_empty(num_experts + 1)
    place, source = torch.empty_like(experts), experts.new_empty(experts.numel())
    helper.module.expert_order(
        experts.data_ptr(), experts.numel(), num_experts, offsets.data_ptr(), place.data_ptr(), source.data_ptr()
    )
    return ExpertOrder(offsets, place, source)


registry.declare(
    "expert_order",
    registry.cuda("routing:expert_order"),
    registry.triton("routing:expert_order"),
    registry.Impl("cpp", f"{__name__}:compiled", frozenset({"cpu"}), helper.why_not),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
