"""The operators of torch-npu that we call, on a CPU: recorded schemas, numbers as the documentation words them.

An agreement with these shows that a row passes the right things in the right order. It shows nothing about an NPU.
Operators with a derivative in torch-npu are differentiable here, the others are not.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.kernels.npu import contracts

SCHEMAS = (Path(__file__).parent / "schemas.txt").read_text().splitlines()
Arguments = contracts.Arguments
Tensors = tuple[torch.Tensor, ...]


def fusion_attention(a: Arguments) -> tuple[Any, ...]:
    query, mask, mode = a["query"], a["atten_mask"], a["sparse_mode"]
    key, value = (a[name].repeat_interleave(query.shape[1] // a[name].shape[1], dim=1) for name in ("key", "value"))
    parts, start = [], 0
    for end in a["actual_seq_qlen"]:
        run = end - start
        hidden = torch.ones(run, run).triu(1).bool() if mode in (2, 3) else mask[:run, :run] if mode == 1 else None
        q, k, v = (t[start:end].transpose(0, 1).float() for t in (query, key, value))
        scores = q @ k.transpose(1, 2) * a["scale"]
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
        start = end
    empty = torch.empty(0)
    return torch.cat(parts).to(query.dtype), empty, empty, empty, 0, 0, 0


def rms_norm(a: Arguments) -> Tensors:
    x = a["self"].float()
    rstd = (x.square().mean(-1, keepdim=True) + a["epsilon"]).rsqrt()
    return (x * rstd * a["gamma"].float()).to(a["self"].dtype), rstd


def rms_norm_backward(a: Arguments) -> Tensors:
    normed, g = a["self"] * a["rstd"], a["dy"] * a["gamma"]
    d_gamma = (a["dy"] * normed).flatten(0, -2).sum(0)
    return a["rstd"] * (g - normed * (g * normed).mean(-1, keepdim=True)), d_gamma


def swiglu(a: Arguments) -> torch.Tensor:
    gate, up = a["self"].float().chunk(2, a["dim"])
    return (F.silu(gate) * up).to(a["self"].dtype)


def rotary_mul(a: Arguments) -> torch.Tensor:
    x1, x2 = a["self"].chunk(2, -1)
    return a["r1"] * a["self"] + a["r2"] * torch.cat((-x2, x1), -1)


def grouped_matmul(a: Arguments) -> list[torch.Tensor]:
    (x,), (w,), ends = a["x"], a["weight"], a["group_list"].tolist()
    runs = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    if a["group_type"] == 0:
        return [torch.cat([x[run] @ matrix for run, matrix in zip(runs, w, strict=True)])]
    # The documentation does not say what an empty group leaves: NaN here.
    return [torch.stack([x[:, run] @ w[run] + (0.0 if run.start < run.stop else torch.nan) for run in runs])]


def token_permute(a: Arguments) -> Tensors:
    source = a["indices"].flatten().argsort(stable=True)
    return a["tokens"][source // a["indices"].shape[1]], source.argsort().int()


def token_unpermute(a: Arguments) -> torch.Tensor:
    y, probs = a["permuted_tokens"], a["probs"]
    slots = y[a["sorted_indices"].long()].view(*probs.shape, -1).float()
    return (slots * probs.float()[..., None]).sum(1).to(y.dtype)


def gating_top_k(a: Arguments) -> Tensors:
    x = a["x"].float()
    scores = x.sigmoid() if a["norm_type"] else x.softmax(-1)
    keys = scores if a["bias"] is None else scores + a["bias"]
    groups = keys.unflatten(1, (a["group_count"], -1))
    worth = groups.topk(2, -1).values.sum(-1) if a["group_select_mode"] else groups.amax(-1)
    closed = torch.ones_like(worth).scatter(1, worth.topk(a["k_group"], -1).indices, 0).bool()
    keys = groups.masked_fill(closed[..., None], -torch.inf).flatten(1)
    experts = keys.argsort(dim=1, descending=True, stable=True)[:, : a["k"]]  # who wins a tie is not documented
    return scores.gather(1, experts).to(a["x"].dtype), experts.int(), scores


DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": fusion_attention,
    "npu_rms_norm": rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_unpermute": token_unpermute,
}
OTHERS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_gating_top_k": gating_top_k,
}


Compare = Callable[[str, Arguments, Any], None]
_libraries: list[torch.library.Library] = []


def install(schemas: Sequence[str] = SCHEMAS, compare: Compare = lambda *_: None) -> bool:
    """Define the operators in this process, once; False: torch-npu is installed and has defined them.

    Args:
        schemas: those recorded, or all of a wheel.
        compare: sees every call: name, arguments, result.
    """
    if not _libraries and importlib.util.find_spec("torch_npu") is not None:
        return False
    if not _libraries:
        library = torch.library.Library("npu", "DEF")
        _libraries.append(library)
        for schema in schemas:
            library.define(schema)
        for name, function in {**DIFFERENTIABLE, **OTHERS}.items():
            kernel = _checked(name, function, compare)
            library.impl(name, kernel, "CPU")
            if name in DIFFERENTIABLE:  # made of ops that have derivatives
                library.impl(name, kernel, "AutogradCPU")
    return True


def _checked(name: str, function: Callable[..., Any], compare: Compare) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = contracts.check(name, args, kwargs)
        result = function(bound)
        compare(name, bound, result)
        return result

    return kernel
