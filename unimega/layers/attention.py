"""Attention with grouped queries: weights shared or per modality, over the document or over its own modality."""

import torch
from torch import nn

from unimega.batch import Intervals
from unimega.config.layer import LayerSpec
from unimega.kernels.registry import resolve
from unimega.layers.context import Build, Call
from unimega.layers.norm import HeadNorm
from unimega.parallel.factors import Fused
from unimega.parallel.linear import Weights, column_linear, row_linear, split_linear_op
from unimega.parallel.recompute import recompute


class Attention(nn.Module):
    """``x + output(attention(rope(norm(q)), rope(norm(k)), v))`` without the sum; heads are cut over tp.

    Projections see the modality order. With scope ``own`` attention does too: each (modality, document) is one run of
    rows. With scope ``document`` q, k, v are gathered into document order by the pass that applies norm and RoPE.
    """

    def __init__(self, build: Build, layer: LayerSpec) -> None:
        super().__init__()
        spec, layout = build.spec, build.layout
        split = spec.modalities if layer.attention == "split" else None
        split_output = spec.modalities if layer.output_projection == "split" else None
        self.layout, self.eps, self.scope = layout, spec.norm_eps, layer.scope
        self.heads, self.kv_heads = spec.heads // layout.size, spec.kv_heads // layout.size
        self.scale = spec.head_width**-0.5
        self.selective_recompute = build.selective_recompute
        self.qkv = Weights(
            spec.width,
            (spec.heads + 2 * spec.kv_heads) * spec.head_width,
            modalities=split,
            dim=0,
            layout=layout,
            bias=spec.qkv_bias,
            fused=Fused((spec.heads // spec.kv_heads, 1, 1), repeats=self.kv_heads),
        )
        self.q_layernorm = HeadNorm(build, split=split is not None) if spec.qk_norm else None
        self.k_layernorm = HeadNorm(build, split=split is not None) if spec.qk_norm else None
        self.output = Weights(
            spec.heads * spec.head_width,
            spec.width,
            modalities=split_output,
            dim=1,
            layout=layout,
            bias=spec.output_bias,
            unused=spec.modalities[1:] if layer.unused_output else (),
        )
        self.gemms = split_linear_op(build.device, build.kernels)
        self.prepare = resolve("qkv_prepare", device=build.device, impl=build.kernel("qkv_prepare"))
        self.attend = resolve("attention", device=build.device, impl=build.kernel("attention"))

    def forward(self, x_tD: torch.Tensor, call: Call) -> torch.Tensor:
        """[t, D] -> [t, D]. Collectives: those of one column and one row linear."""
        order = call.order
        total = sum(order.counts)
        (qkv,) = column_linear(x_tD, self.qkv(order.counts), self.layout, self.gemms)
        q_weights = self.q_layernorm() if self.q_layernorm is not None else None
        k_weights = self.k_layernorm() if self.k_layernorm is not None else None

        def core(qkv: torch.Tensor) -> torch.Tensor:
            rows, inverse, intervals = self._view(call)
            q, k, v = self.prepare(
                qkv,
                q_weights,
                k_weights,
                order.counts if q_weights is not None and len(q_weights) > 1 else (total,),
                call.cos,
                call.sin,
                rows,
                heads=self.heads,
                kv_heads=self.kv_heads,
                eps=self.eps,
                inverse=inverse,
            )
            return self.attend(q, k, v, intervals, scale=self.scale, rows=rows, inverse=inverse)

        o = recompute(core, qkv) if self.selective_recompute else core(qkv)
        y = row_linear((o,), self.output(order.counts), total, self.layout, self.gemms)
        return self.output.add_bias(y, order.local_counts)

    def _view(self, call: Call) -> tuple[torch.Tensor | None, torch.Tensor | None, Intervals]:
        """(gather, its inverse, intervals) of the order in which this layer attends."""
        order = call.order
        if self.scope == "own":
            return None, None, order.own
        return order.to_documents, order.from_documents, order.documents
