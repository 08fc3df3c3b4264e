"""A second implementation of the original models, straight from their tensors: slow, masks everywhere, fp32.

Held to the oracles by ``tests/e2e/test_oracle.py``; then it says what options should do for which there is no oracle.
"""

from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


def logits(
    config: dict[str, Any], tensors: Tensors, ids_T: torch.Tensor, documents_T: torch.Tensor, *, separators: Any = ()
) -> torch.Tensor:
    """[T, rows]: one pack; document 0 is pads, whose logits mean nothing."""
    kind = config["architectures"][0]
    x = tensors["model.embed_tokens.weight"][ids_T]
    vision = torch.zeros(len(ids_T), dtype=torch.bool)
    encode = decode = 0
    if kind not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        vision = (ids_T >= config["real_text_vocab_size"]) | (ids_T == config["vision_start_id"])
        vision |= torch.isin(ids_T, torch.tensor(separators, dtype=torch.long))
    if kind == "UniQwen3ForCausalLM":
        encode, decode = config["num_vision_encode_layers"], config["num_vision_decode_layers"]
    layers, saved = config["num_hidden_layers"], None
    for i in range(layers):
        twin = None
        if i < encode:
            twin = f"model.vision_encode_layers.{i}."
        if i >= layers - decode:
            twin = f"model.vision_decode_layers.{i - layers + decode}."
            if i - layers + decode == config["skip_connection_loc"]:
                x = torch.where(vision[:, None], x + saved, x)
        group = documents_T * 2 + vision if twin else documents_T
        layer = _Layer(config, tensors, f"model.layers.{i}.", twin, vision)
        x = x + layer.attention(layer.norm(x, "input_layernorm"), group)
        x = x + layer.ffn(layer.norm(x, "post_attention_layernorm"))
        if i < encode and i == config["skip_connection_loc"]:
            saved = x
    x = F.rms_norm(x, x.shape[-1:], tensors["model.norm.weight"], config["rms_norm_eps"])
    return x @ tensors["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


class _Layer:
    def __init__(self, config: dict[str, Any], tensors: Tensors, text: str, twin: str | None, vision: torch.Tensor):
        self.config, self.tensors, self.text, self.twin, self.vision = config, tensors, text, twin, vision

    def both(self, part: str, leaf: str, x: torch.Tensor, apply: Any, prefixes: tuple[str, ...]) -> torch.Tensor:
        """``apply`` with text's tensor on text, with vision's on vision, wherever that one is."""
        mine = apply(x, f"{self.text}{part}{leaf}")
        for other in (f"{self.twin}{part}{leaf}", *(f"{self.text}{part}{prefix}{leaf}" for prefix in prefixes)):
            if f"{other}.weight" in self.tensors:
                return torch.where(self.vision.view(-1, *[1] * (x.ndim - 1)), apply(x, other), mine)
        return mine

    def norm(self, x: torch.Tensor, leaf: str) -> torch.Tensor:
        return self.both("", leaf, x, self._rms, ())

    def _rms(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.config["rms_norm_eps"])

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def attention(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        c, total = self.config, len(x)
        width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        positions = torch.arange(total, dtype=torch.float32)
        angle = torch.outer(positions, c["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width))
        q, k, v = (
            self.both("self_attn.", f"{leaf}_proj", x, self._linear, ("vis_",)).view(total, -1, width) for leaf in "qkv"
        )
        if f"{self.text}self_attn.q_norm.weight" in self.tensors:
            q, k = (
                self.both("self_attn.", f"{leaf}_norm", part, self._rms, ("vis_",))
                for leaf, part in (("q", q), ("k", k))
            )
        q, k = _rotate(q, angle), _rotate(k, angle)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        scores = torch.einsum("qhn,khn->hqk", q, k) * width**-0.5
        seen = (group[:, None] == group[None, :]) & torch.ones(total, total).tril().bool()
        y = torch.einsum("hqk,khn->qhn", scores.masked_fill(~seen, float("-inf")).softmax(-1), v).flatten(1)
        return self.both("self_attn.", "o_proj", y, self._linear, ())

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        own = self._swiglu(x, f"{self.text}mlp.")
        other = next(
            (p for p in (f"{self.twin}mlp.", f"{self.text}mlp.vision_", f"{self.text}mlp.vis_") if self._has(p)), None
        )
        shared = self._has(f"{self.text}mlp.share_")
        if other or shared:
            own = torch.where(self.vision[:, None], self._swiglu(x, other) if other else 0 * own, own)
        return own + self._swiglu(x, f"{self.text}mlp.share_") if shared else own

    def _has(self, prefix: str) -> bool:
        return f"{prefix}gate_proj.weight" in self.tensors

    def _swiglu(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up = self._linear(x, f"{prefix}gate_proj"), self._linear(x, f"{prefix}up_proj")
        return self._linear(F.silu(gate) * up, f"{prefix}down_proj")


def _rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
