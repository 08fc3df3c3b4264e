"""What torch-npu's documentation demands of each operator that we call, beyond types: its schemas and meta kernels let
most wrong calls pass (24 of 33 tried). The words of the documentation are in the wheel: torch_npu/_op_plugin_docs.py.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SORTED = 16777215
"""Numbers that an operator sorts, and how many, stay below."""

Arguments = Mapping[str, Any]


class Refused(AssertionError):
    """A call that the documentation does not allow, or whose result it does not promise."""


def want(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(what)


def bind(schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its name."""
    bound = {}
    for i, argument in enumerate(schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = args[i] if i < len(args) else kwargs.get(argument.name, default)
    return bound


def readable(x: torch.Tensor) -> bool:
    return x.device.type != "meta"


def fusion_attention(a: Arguments) -> None:
    q, k, v, mask, mode = (a[name] for name in ("query", "key", "value", "atten_mask", "sparse_mode"))
    want(a["input_layout"] == "TND", "input_layout: we use TND")
    want(q.dtype == k.dtype == v.dtype and q.dtype in FLOATS, "one dtype of fp16, bf16, fp32")
    want(q.dim() == 3 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], "shapes")
    want(q.shape[1] == a["head_num"] <= 256 and q.shape[1] % k.shape[1] == 0, "heads")
    want(1 <= q.shape[2] <= 768 and 1 <= q.shape[0] <= 1 << 20, "sizes")
    ends = a["actual_seq_qlen"]
    want(bool(ends) and list(ends) == list(a["actual_seq_kvlen"]), "the lengths of q and of k, v")
    want(all(type(n) is int for n in ends), "lengths are host ints")
    want(ends[0] > 0, "cumulative lengths begin with that of the first run, not with 0")
    want(list(ends) == sorted(ends) and ends[-1] == q.shape[0], "cumulative lengths end with T")
    want(len(ends) <= 1024, "at most 1024 runs")
    want(mask is not None or mode == 0, "without a mask sparse_mode means nothing")
    want(mask is None or (mask.dtype in (torch.bool, torch.uint8) and mask.dim() == 2), "mask: 2-d bool")
    lengths = torch.tensor(ends).diff(prepend=torch.zeros(1, dtype=torch.long))
    if mode == 1:
        want(tuple(mask.shape) == (int(lengths.max()),) * 2, "sparse_mode 1: mask of the longest run")
        want(not readable(mask) or not bool(mask.all(dim=1).any()), "a row of the mask hides everything")
    elif mode != 0:
        want(mode in (2, 3), "sparse_mode: we use 1 to 3")
        want(tuple(mask.shape) == (2048, 2048), "sparse_mode 2, 3: the mask of 2048")
        want(not readable(mask) or _is_upper_triangle(mask), "True hides: the upper triangle")
    want(not a["softmax_layout"] and a["keep_prob"] == 1.0 and a["pse"] is None, "nothing else is used")


@functools.lru_cache(maxsize=1)  # a row keeps its mask
def _is_upper_triangle(mask: torch.Tensor) -> bool:
    return torch.equal(mask.bool().cpu(), torch.ones(mask.shape, dtype=torch.bool).triu(1))


def rms_norm(a: Arguments) -> None:
    x, gamma = a["self"], a["gamma"]
    want(x.dtype == gamma.dtype and x.dtype in FLOATS, "one dtype of fp16, bf16, fp32")
    want(2 <= x.dim() <= 8 and x.numel() > 0, "2 to 8 dims, not empty")
    want(tuple(x.shape[-gamma.dim() :]) == tuple(gamma.shape), "gamma has the last dims of x")


def rms_norm_backward(a: Arguments) -> None:
    rms_norm(a)
    want(a["dy"].shape == a["self"].shape and a["dy"].dtype == a["self"].dtype, "dy is like x")
    kept = a["self"].dim() - a["gamma"].dim()
    want(a["rstd"].dtype == torch.float32, "rstd is fp32")
    want(tuple(a["rstd"].shape) == (*a["self"].shape[:kept], *(1 for _ in a["gamma"].shape)), "rstd of forward")


def swiglu(a: Arguments) -> None:
    x = a["self"]
    want(x.dtype in FLOATS and 1 <= x.dim() <= 8 and x.numel() > 0, "dtype, 1 to 8 dims, not empty")
    want(x.shape[a["dim"]] % 2 == 0, "two halves")


def rotary_mul(a: Arguments) -> None:
    x, cos, sin = a["self"], a["r1"], a["r2"]
    want(x.dim() == cos.dim() == sin.dim() == 4 and cos.shape == sin.shape, "4 dims, cos and sin alike")
    want(x.dtype == cos.dtype == sin.dtype and x.dtype in FLOATS, "one dtype of fp16, bf16, fp32")
    batch, rows, heads, width = x.shape
    want(tuple(cos.shape) in ((1, rows, 1, width), (batch, rows, 1, width)), "BSND with 1S1D or BS1D, all of D")
    want(width % 2 == 0 and width < 896 and batch < 1000 and heads < 1000, "sizes")
    want(a["rotary_mode"] == "half" and a["rotate"] is None, "by halves")
    for t in (cos, sin):
        want(not readable(t) or float(t.abs().max()) <= 1, "cos and sin lie in [-1, 1]")


def grouped_matmul(a: Arguments) -> None:
    want(len(a["x"]) == len(a["weight"]) == 1, "one tensor each: we use no lists")
    (x,), (w,), ends, kind = a["x"], a["weight"], a["group_list"], a["group_type"]
    want(x.dtype == w.dtype and x.dtype in FLOATS, "one dtype of fp16, bf16, fp32")
    want(ends is not None and ends.dtype == torch.int64 and ends.dim() == 1, "group_list: int64")
    want(1 <= ends.shape[0] <= 1024, "at most 1024 groups")
    want(a["split_item"] in (2, 3), "split_item: one output")
    want(a["group_list_type"] == 0 or (a["group_list_type"] == 1 and ends.shape[0] > 1), "counts: not of one group")
    want(max(x.shape[-1], w.shape[-1]) < 65536, "last dims below 65536")
    want(x.dim() == 2 and x.numel() > 0, "x: 2-d, not empty")
    if kind == 0:
        want(x.is_contiguous(), "x may not be transposed")
        want(w.dim() == 3 and w.shape[0] == ends.shape[0] and w.shape[1] == x.shape[1], "w: [groups, K, N]")
        want(w.is_contiguous() or w.transpose(1, 2).is_contiguous(), "w is stored as it is, or transposed")
        total = x.shape[0]
    else:
        want(kind == 2, "group_type 0: rows, 2: inner")
        want(x.t().is_contiguous() and w.is_contiguous(), "x comes transposed")
        want(w.dim() == 2 and x.shape[1] == w.shape[0], "inner dims")
        total = x.shape[1]
    if readable(ends):
        listed = ends.tolist() if a["group_list_type"] == 0 else ends.cumsum(0).tolist()
        want(listed == sorted(listed) and listed[0] >= 0 and listed[-1] == total, "groups fill the rows")
    for name in ("bias", "scale", "activation_input", "per_token_scale"):
        want(a[name] is None, name)
    want(a["act_type"] == 0, "no activation without quantisation")


def token_permute(a: Arguments) -> None:
    tokens, indices = a["tokens"], a["indices"]
    want(tokens.dim() == 2 and tokens.dtype in FLOATS, "tokens: 2-d of fp16, bf16, fp32")
    want(indices.dtype in (torch.int32, torch.int64) and indices.dim() == 2, "indices: [t, k] of int32 or int64")
    want(indices.shape[0] == tokens.shape[0] and 1 <= indices.shape[1] <= 512, "a row of indices per token")
    want(indices.numel() < SORTED and a["padded_mode"] is False and a["num_out_tokens"] is None, "limits")
    if readable(indices) and indices.numel():
        want(int(indices.min()) >= 0 and int(indices.max()) < SORTED, "indices from 0 to 2^24 - 2")


def token_unpermute(a: Arguments) -> None:
    y, places, probs = a["permuted_tokens"], a["sorted_indices"], a["probs"]
    want(y.dim() == 2 and y.dtype in FLOATS, "rows: 2-d of fp16, bf16, fp32")
    want(places.dtype == torch.int32 and tuple(places.shape) == (y.shape[0],), "sorted_indices: int32, one a row")
    want(probs is not None, "without probs k is 1")
    want(probs.dim() == 2 and probs.dtype in FLOATS and probs.numel() == y.shape[0], "probs: [t, k]")
    want(probs.shape[1] <= 512 and a["padded_mode"] is False and a["restore_shape"] is None, "limits")
    if readable(places):
        want(torch.equal(places.sort().values.cpu(), torch.arange(y.shape[0]).int()), "sorted_indices: no number twice")


def gating_top_k(a: Arguments) -> None:
    x, k, groups, bias = a["x"], a["k"], a["group_count"], a["bias"]
    want(x.dim() == 2 and x.dtype in FLOATS and x.shape[1] <= 2048, "x: 2-d, at most 2048 experts")
    want(bias is None or (tuple(bias.shape) == (x.shape[1],) and bias.dtype == x.dtype), "bias: of x's dtype")
    want(1 <= a["k_group"] <= groups and x.shape[1] % groups == 0, "groups")
    want(1 <= k <= x.shape[1] // groups * a["k_group"], "k")
    want(x.shape[1] // groups > 2 and -(-(x.shape[1] // groups) // 32) * 32 * groups <= 2048, "more than 2 in a group")
    want(a["renorm"] == 0 and a["norm_type"] in (0, 1) and a["group_select_mode"] in (0, 1), "modes")
    want(a["input_ids"] is None and a["tid2eid"] is None, "no hash")


CONTRACTS: dict[str, Callable[[Arguments], None]] = {
    "npu_fusion_attention": fusion_attention,
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_unpermute": token_unpermute,
    "npu_moe_gating_top_k": gating_top_k,
}


def check(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """All arguments of a call of ``torch.ops.npu.NAME``; Refused unless the documentation allows it."""
    bound = bind(getattr(torch.ops.npu, name).default._schema, args, kwargs)
    CONTRACTS[name](bound)
    return bound
