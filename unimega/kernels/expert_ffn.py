"""The SwiGLU FFN of routed experts on the rows of tokens, weighted and summed, as one op.

``expert_ffn(x, gate_up, down, weights, order) -> out``

``out[i] = sum_j weights[i, j] down[e] (silu(gate[e] x[i]) * (up[e] x[i]))`` with e the expert of slot (i, j).

x, out: [t, D], gate_up: [E, 2F, D] with rows [gate; up], down: [E, D, F], one dtype. weights: [t, k] fp32. order: of
``expert_order``; slots without an expert add nothing, and their weights have gradient 0.
Equal to ``permute``, ``grouped_gemm``, ``swiglu``, ``grouped_gemm``, ``unpermute``, each of which rounds once; an
implementation may keep more digits between them.

Gradients of x, gate_up, down and weights; frozen ones are not computed. The gradient of the weights is ``<h, dh>`` with
h the rows between the two GEMMs, so that the outputs of the experts, [N, D], need not be kept.
Saved for backward: x, the output of the first GEMM [N, 2F], and the arguments.
Operations: 6 N D F forward, twice that backward. The host reads no count. No atomics: a call repeats bit for bit.
"""

import torch

from unimega.kernels import grouped_gemm, permute, registry, swiglu
from unimega.kernels.expert_order import ExpertOrder


def reference(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, order: ExpertOrder
) -> torch.Tensor:
    """See the module: the definition in plain torch; it keeps more for backward than an implementation must."""
    hidden = swiglu.reference(grouped_gemm.reference(permute.permute(x, order), gate_up, order.offsets))
    return permute.unpermute(grouped_gemm.reference(hidden, down, order.offsets), weights, order)


registry.declare(
    "expert_ffn",
    registry.triton("expert_ffn:expert_ffn"),
    registry.Impl("cpu", "unimega.kernels.cpu:expert_ffn", frozenset({"cpu"})),
    registry.npu(
        "experts:expert_ffn", "npu_grouped_matmul", "npu_swiglu", "npu_moe_token_permute", "npu_moe_token_unpermute"
    ),
    registry.Impl("reference", f"{__name__}:reference", registry.EVERYWHERE),
)
