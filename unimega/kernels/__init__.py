"""Ops: each a contract, a reference and a table of implementations. Importing this package imports no Triton.

Importing the modules of the ops fills the table of ``registry``; a call site only ever asks that.
"""

from unimega.kernels import (
    adamw,
    add_rms_norm,
    attention,
    expert_ffn,
    expert_order,
    grouped_gemm,
    linear_cross_entropy,
    permute,
    qkv_prepare,
    registry,
    rms_norm,
    route,
    split_linear,
    swiglu,
    topk_routing,
)

__all__ = [
    "adamw",
    "add_rms_norm",
    "attention",
    "expert_ffn",
    "expert_order",
    "grouped_gemm",
    "linear_cross_entropy",
    "permute",
    "qkv_prepare",
    "registry",
    "rms_norm",
    "route",
    "split_linear",
    "swiglu",
    "topk_routing",
]
