"""python benchmarks/bench_moe.py: the layer of routed experts, from states to states, beside the layers of others.

All contestants have the same weights: a router (softmax over all experts, weights divided by their sum) and SwiGLU
experts. Peers: ``Qwen3MoeSparseMoeBlock`` of transformers, a loop over experts and ``grouped_mm``, and megatron-core's
``MoELayer`` of local experts; its 64 weights of a kind are views here, which costs it one copy of their gradients.
``gemms`` are the experts' GEMMs alone, on as many rows each: ``floor_flops`` counts the same operations.
"""

import datetime
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from harness import Floor, Function, Job, Tensors, noise, run
from torch import nn
from torch.func import functional_call
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from unimega import backend
from unimega.batch import make_microbatch
from unimega.config.experts import ExpertSpec
from unimega.config.layer import dense
from unimega.config.model import ModelSpec
from unimega.config.schema import ParallelConfig
from unimega.config.vocabulary import Vocabulary
from unimega.layers.context import Build, Call
from unimega.moe.layer import MoE
from unimega.parallel import groups
from unimega.parallel.linear import Layout

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # isort: skip  (after unimega.parallel)
from megatron.core.transformer.spec_utils import build_module  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Sizes:
    """Tokens, width, width of an expert, experts, experts a token."""

    t: int
    d: int
    f: int
    e: int
    k: int


SIZES = {
    "tiny": (Sizes(48, 32, 16, 8, 2),),
    "cpu": (Sizes(4096, 512, 256, 64, 8),),
    "gpu": (Sizes(16384, 2048, 768, 128, 8),),
}


def unimega(s: Sizes) -> Function:
    """Our layer in training, with its statistics, without losses."""
    device = backend.current().device
    vocabulary = Vocabulary(names=("text",), starts=(0,), codes=(1,), rows=1, ids=((),))
    spec = ModelSpec(
        vocabulary=vocabulary, layers=dense(1, ffn=1), width=s.d, heads=1, kv_heads=1, head_width=2, qk_norm=False,
        qkv_bias=False, output_bias=False, norm_eps=1e-6, rope_theta=1e4, tied=False,
    )  # fmt: skip
    layout = Layout(tp=mesh().tp, sequence_parallel=False)
    layer = MoE(Build(spec=spec, layout=layout, device=device), ExpertSpec(number=s.e, width=s.f, top_k=s.k)).to(device)
    ones, zeros = np.ones(s.t, dtype=np.int32), np.zeros(s.t, dtype=np.int32)
    batch = make_microbatch(
        zeros, modality=zeros, document=ones, labels=zeros, loss_weights=ones, modalities=1, step_tokens=s.t
    )
    order = backend.to_device(batch).order
    call = Call(order=order, cos=torch.empty(0), sin=torch.empty(0), step_tokens=batch.step_tokens)
    names = ("router.weight", "experts.gate_up.weight", "experts.down.weight")

    def forward(t: Tensors) -> Tensors:
        layer.take_statistics()
        return (functional_call(layer, dict(zip(names, t[1:], strict=True)), (t[0], call)),)

    return forward


def transformers(s: Sizes, implementation: str) -> Function:
    """Qwen3-MoE's block."""
    config = Qwen3MoeConfig(
        hidden_size=s.d, moe_intermediate_size=s.f, num_experts=s.e, num_experts_per_tok=s.k, norm_topk_prob=True,
        experts_implementation=implementation,
    )  # fmt: skip
    block = Qwen3MoeSparseMoeBlock(config).to(backend.current().device)
    names = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    return lambda t: (functional_call(block, dict(zip(names, t[1:], strict=True)), (t[0][None],))[0],)


def megatron(s: Sizes, dtype: torch.dtype) -> Function:
    """megatron-core's layer with its loop over local experts: what it has without TransformerEngine."""
    config = TransformerConfig(
        num_layers=1, hidden_size=s.d, num_attention_heads=1, num_moe_experts=s.e, moe_router_topk=s.k,
        moe_ffn_hidden_size=s.f, gated_linear_unit=True, activation_func=nn.functional.silu, add_bias_linear=False,
        moe_router_load_balancing_type="none", params_dtype=dtype,
    )  # fmt: skip
    module = get_moe_module_spec(use_te=False, num_experts=s.e, moe_grouped_gemm=False)
    layer: Any = build_module(module, config=config, layer_number=1, pg_collection=mesh().collection)
    layer.to(backend.current().device)

    def forward(t: Tensors) -> Tensors:
        weights = {"router.weight": t[1]}
        for name, all_experts in (("linear_fc1", t[2]), ("linear_fc2", t[3])):
            for number, own in enumerate(all_experts.unbind(0)):
                weights[f"experts.local_experts.{number}.{name}.weight"] = own
        return (functional_call(layer, weights, (t[0][:, None],))[0][:, 0],)

    return forward


class _Gemms(torch.autograd.Function):
    """Two GEMMs an expert forward and four backward, all on T K / E rows, into buffers that exist."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, buffers: Tensors) -> torch.Tensor:
        ctx.save_for_backward(gate_up, down)
        ctx.buffers = rows, both, hidden, out, *_ = buffers
        for e in range(len(down)):
            torch.mm(rows, gate_up[e].t(), out=both)
            torch.mm(hidden, down[e].t(), out=out)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, down = ctx.saved_tensors
        rows, both, hidden, out, d_hidden, d_rows = ctx.buffers
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        for e in range(len(down)):
            torch.mm(out.t(), hidden, out=d_down[e])
            torch.mm(out, down[e], out=d_hidden)
            torch.mm(both.t(), rows, out=d_gate_up[e])
            torch.mm(both, gate_up[e], out=d_rows)
        return dy, d_gate_up, d_down, None


def gemms(s: Sizes, dtype: torch.dtype) -> Function:
    """The GEMMs of the experts, and nothing else."""
    rows = s.t * s.k // s.e
    buffers = tuple(noise(rows, width, dtype=dtype, grad=False) for width in (s.d, 2 * s.f, s.f, s.d, s.f, s.d))
    return lambda t: (_Gemms.apply(t[0], t[2], t[3], buffers),)


def job(s: Sizes, dtype: torch.dtype) -> Job:
    """The layer at one shape."""

    def leaves() -> Tensors:
        return (
            noise(s.t, s.d, dtype=dtype),
            noise(s.e, s.d, dtype=dtype, scale=s.d**-0.5),
            noise(s.e, 2 * s.f, s.d, dtype=dtype, scale=s.d**-0.5),
            noise(s.e, s.d, s.f, dtype=dtype, scale=s.f**-0.5),
        )

    flops = 6.0 * s.t * s.k * s.d * s.f
    held = dtype.itemsize * (2 * s.t * s.d + 3 * s.e * s.d * s.f)
    return Job(
        "moe layer",
        asdict(s) | {"threads": torch.get_num_threads()},
        leaves,
        {
            "unimega": unimega(s),
            "transformers grouped_mm": transformers(s, "grouped_mm"),
            "transformers loop": transformers(s, "eager"),
            "megatron-core local experts": megatron(s, dtype),
        },
        Floor(held, flops),
        Floor(3 * held, 3 * flops),
        dtype,
        tolerance=1e-4 if dtype == torch.float32 else 0.05,
        unlike={"gemms": gemms(s, dtype)},
        passes=("both",),
    )


@functools.cache
def mesh() -> groups.Groups:
    """Groups of this process alone."""
    backend.current().init_process_group(timeout=TIMEOUT)
    return groups.initialize(ParallelConfig())


def jobs(sizes: str, dtype: torch.dtype) -> Iterator[Job]:
    """Every job."""
    for s in SIZES[sizes]:
        yield job(s, dtype)


if __name__ == "__main__":
    run(__doc__, jobs, dtypes=("fp32",))
