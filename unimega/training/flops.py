"""How many floating-point operations a step needs, from the model, what of it trains, and the make-up of its tokens."""

from collections.abc import Mapping, Sequence

import numpy as np

from unimega.batch import Intervals, Microbatch
from unimega.config.layer import LayerSpec
from unimega.config.lora import has_factors
from unimega.config.model import ModelSpec
from unimega.config.parameters import matches, parameters

Macs = dict[str, int]
"""Multiply-adds of a forward by the name of the parameter."""


def step_flops(spec: ModelSpec, microbatches: Sequence[Microbatch], *, trainable: Sequence[str] = ("*",)) -> float:
    """FLOPs of forward and backward, a multiply-add as two, nothing counted twice under recompute.

    Forward: 2 x weights passed, per token of each modality, those of LoRA's factors too; attention: 4 x keys seen x
    heads x head width per query; head: rows that carry loss only. Backward: as much for the gradient of what goes in
    (attention: twice) where something below trains, and as much for that of a weight that trains.

    Args:
        microbatches: on the host.
        trainable: patterns of the names of the parameters that train.
    """
    return 2.0 * _Count(spec, microbatches, trainable).total


class _Count:
    """Multiply-adds of a step. A state is known by whether its gradient is wanted: whether something below trains."""

    def __init__(self, spec: ModelSpec, microbatches: Sequence[Microbatch], trainable: Sequence[str]) -> None:
        self.spec, self.total = spec, 0
        self.trained = {name for name in parameters(spec) if matches(name, trainable)}
        self.modules = {name.rpartition(".")[0] for name in self.trained}
        orders = [batch.order for batch in microbatches]
        counts = np.sum([order.counts for order in orders], axis=0).tolist()
        self.split = {f"_{name}": count for name, count in zip(spec.modalities, counts, strict=True)}
        self.tokens = sum(counts)
        self.routed = self.tokens - sum(order.pads for order in orders)
        self.pairs = {
            "document": sum(_pairs(order.documents) for order in orders),
            "own": sum(_pairs(order.own) for order in orders),
        }
        state = "embedding" in self.modules
        for index, layer in enumerate(spec.layers):
            state = self._layer(f"layers.{index}", layer, state)
        table = "embedding.weight" if spec.tied else "head.weight"
        rows = sum(len(batch.loss_rows) for batch in microbatches)
        self._multiply(state or "final_norm" in self.modules, {table: rows * spec.width * spec.vocabulary.rows})

    def _layer(self, at: str, layer: LayerSpec, state: bool) -> bool:
        spec, width = self.spec, self.spec.width
        heads, both = spec.heads * spec.head_width, (spec.heads + 2 * spec.kv_heads) * spec.head_width
        rows = {"shared": {"": self.tokens}, "split": self.split}
        qkv = self._linear(f"{at}.attention.qkv", rows[layer.attention], width, both, projections=3)
        output = self._linear(f"{at}.attention.output", rows[layer.output_projection], heads, width)
        attended = self._multiply(state or f"{at}.attention_norm" in self.modules, qkv)
        attended |= not self.modules.isdisjoint({f"{at}.attention.q_layernorm", f"{at}.attention.k_layernorm"})
        self.total += 2 * self.pairs[layer.scope] * heads * (3 if attended else 1)
        state = self._multiply(attended, output)
        return self._ffn(f"{at}.ffn", layer, state or f"{at}.ffn_norm" in self.modules)

    def _ffn(self, at: str, layer: LayerSpec, state: bool) -> bool:
        width, experts = self.spec.width, layer.experts
        gates, gate_up, down = Macs(), Macs(), Macs()
        if experts is None:
            own = zip(self.split.items(), layer.ffn, strict=False)
            parts = [(at, {copy: number}, hidden) for (copy, number), hidden in own]
            parts.append((f"{at}.shared" if layer.ffn else at, {"": self.tokens}, layer.shared_ffn))
        else:
            gates[f"{at}.router.weight"] = self.routed * width * experts.number
            gates[f"{at}.shared_gate.weight"] = self.tokens * width * experts.shared_gate
            parts = [(f"{at}.experts", {"": self.routed * experts.top_k}, experts.width)]
            parts.append((f"{at}.shared", {"": self.tokens}, experts.shared_width))
        for name, rows, hidden in (part for part in parts if part[-1]):
            gate_up |= self._linear(f"{name}.gate_up", rows, width, 2 * hidden, projections=2)
            down |= self._linear(f"{name}.down", rows, hidden, width)
        gated, made = self._multiply(state, gates), self._multiply(self._multiply(state, gate_up), down)
        return gated or made

    def _linear(self, name: str, rows: Mapping[str, int], d_in: int, d_out: int, *, projections: int = 1) -> Macs:
        """Of rows by the copy that they pass. Each projection of a linear has an A of its own."""
        made = Macs()
        for copy, number in rows.items():
            made |= {f"{name}.weight{copy}": number * d_in * d_out, f"{name}.bias{copy}": 0}
            if self.spec.lora is not None and has_factors(self.spec.lora, name):
                made[f"{name}.lora_a{copy}"] = number * d_in * projections * self.spec.lora.rank
                made[f"{name}.lora_b{copy}"] = number * d_out * self.spec.lora.rank
        return made

    def _multiply(self, state: bool, products: Macs) -> bool:
        """Multiply a state with parameters, forward and backward; whether a gradient of what comes out is wanted."""
        for name, number in products.items():
            wanted = state or (".lora_b" in name and name.replace(".lora_b", ".lora_a") in self.trained)
            self.total += number * (1 + wanted + (name in self.trained))
        return state or not self.trained.isdisjoint(products)


def _pairs(intervals: Intervals) -> int:
    """Number of (query, key) pairs that attention computes."""
    return int((intervals.hi.astype(np.int64) - intervals.lo).sum())
