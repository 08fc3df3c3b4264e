# Copyright 2026 The unimega authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Causal language models over text and image codes: Uni-X, its shared-FFN form, hard MoE, MoT, routed experts.

This file goes into an export beside its weights and needs transformers (4.57 or 5) alone:
``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)``. Parameter names are the original Uni-X code's.

A token is vision if its id is a code (``real_text_vocab_size`` and up) or in ``vision_token_ids``, else text.
  x    the first and last layers exist twice. A token passes the layer of its modality and attends there to earlier
       tokens of its own modality; in the layers between it attends to all earlier ones. With ``add_share_ffn`` an FFN
       between is the sum of one per modality and one for all.
  moe  every ``decoder_sparse_step``-th layer has an FFN per modality.
  routed  every layer but ``mlp_only_layers`` has an FFN of routed experts, beside which a shared one may stand; the
       experts that a token may use can depend on its modality. No token is ever dropped.
  mot  q, k, v projections, their norms and the FFN exist per modality; attention is over all earlier tokens.

Keys and values of a token are made and read in its own modality's layer alone, so a cache has one slot per layer and
token. What it needs besides, the modality of each past token, it keeps as one more layer: whatever reorders, crops or
repeats a cache of transformers takes it along.

``attention_mask`` is absent, 0 and 1 (pads on either side), or numbers of packed documents (1, 1, 2, 2, ..., 0: pad);
without it, ``position_ids`` that restart mark documents too, as long as nothing is cached.

Shapes: B rows, T tokens of this call, S tokens with those of the cache, n tokens of one modality, D width, H query
heads, K key-value heads, N head width.
"""

# Modules have computed names and transformers is untyped, so mypy knows of neither:
# mypy: disable-error-code="no-any-return,no-untyped-call,operator,arg-type,union-attr,misc,return-value,override"
# mypy: disallow-untyped-decorators=False

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import can_return_tuple


class UniXConfig(Qwen3Config):
    """A Qwen3 configuration, the fields of the original Uni-X code, and what that code took for granted."""

    model_type = "uni_x"
    base_model_tp_plan: ClassVar[dict[str, str]] = {}
    base_model_pp_plan: ClassVar[dict[str, Any]] = {}

    variant: str = "x"
    """``x``, ``moe``, ``mot`` or ``routed``."""
    real_text_vocab_size: int = 151936
    """Id of image code 0: ids below it are text."""
    vision_vocab_size: int = 8192
    """Image codes; later rows are never sampled. 0: a model of text alone."""
    vision_start_id: int | None = None
    """The token before an image's codes."""
    vision_token_ids: list[int] | None = None
    """Ids below ``real_text_vocab_size`` that are vision."""
    num_vision_encode_layers: int = 0
    num_vision_decode_layers: int = 0
    skip_connection_loc: int = -1
    """x: vision states after this layer are added before the last layers' one of that number; -1: none."""
    add_share_ffn: int = 0
    ffn_share_size: int = 0
    ffn_vision_size: int = 0
    """x (layers between), mot: width of the vision FFN."""
    decoder_sparse_step: int = 2
    qk_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    vision_o_proj: str = "unused"
    """mot: ``absent``, ``unused`` (stored, but vision passes text's, as in the original) or ``used``."""
    num_experts: int = 0
    """routed; also what follows, named as in Qwen3-MoE, Qwen2-MoE and DeepSeek-V3 where these have it."""
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    mlp_only_layers: list[int] | None = None
    router_score: str = "softmax"
    """``softmax`` over all experts, or ``sigmoid`` of each."""
    router_bias: bool = False
    """Added to scores for the choice alone."""
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    expert_sets: list[list[int]] | None = None
    """Experts that text and vision may use; absent or empty: all."""
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False


class Modalities:
    """Which of B x T tokens are vision, and the way of each to its own weights."""

    def __init__(self, is_vision_BT: Tensor, *, training: bool) -> None:
        self.is_vision_BT = is_vision_BT
        flat = is_vision_BT.flatten()
        self.rows = ((~flat).nonzero()[:, 0], flat.nonzero()[:, 0])
        # In training a branch without tokens runs on zero rows: its gradients are zeros then, on every rank.
        self.present = [m for m in (0, 1) if training or len(self.rows[m])]
        self.inverse = torch.cat(self.rows).argsort() if len(self.present) > 1 else None

    def apply(self, branches: Sequence[Callable[..., Tensor]], *inputs: Tensor) -> Tensor:
        """Send tokens through (text branch, vision branch): each of ``inputs`` [B, T, ...], the result too."""
        if self.inverse is None:
            return branches[self.present[0]](*inputs)
        flat = [x.flatten(0, 1) for x in inputs]
        parts = [branches[m](*(x[self.rows[m]] for x in flat)) for m in self.present]
        return torch.cat(parts)[self.inverse].unflatten(0, self.is_vision_BT.shape)


@dataclass(frozen=True)
class View:
    """Whom each query sees, as the attention implementation wants it: both None is plain causal attention."""

    mask: Tensor | None = None
    """eager, sdpa: [B, 1, T, S]."""
    packing: tuple[Tensor, Tensor, dict[str, Any]] | None = None
    """flash: places of queries in B x T and of keys in B x S, sorted by group, and the lengths of groups."""
    places: dict[str, Tensor] = field(default_factory=dict)
    """Where transformers 4 puts keys into a cache that is allocated ahead; version 5 counts itself."""
    weights: list[Tensor] | None = None
    """What layers have attended to so far, if somebody asked."""


def view_of(group_BS: Tensor, *, queries: slice, implementation: str, dtype: torch.dtype) -> View:
    """A query sees the keys of its group up to its own place. Group 0 is pads, whose outputs mean nothing."""
    if "flash" in implementation:
        return View(packing=_packing(group_BS[:, queries], group_BS))
    places_S = torch.arange(group_BS.shape[1], device=group_BS.device)
    mask = (group_BS[:, queries, None] == group_BS[:, None]) & (places_S <= places_S[queries, None])
    mask = mask[:, None]
    if implementation != "sdpa":
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return View(mask=mask)


def documents_of(attention_mask: Tensor | None, position_ids: Tensor | None, past: int, *, like: Tensor) -> Tensor:
    """[B, tokens so far]: the number of each token's document, 0 for pads. ``like`` is [B, T]."""
    rows, length = like.shape
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[1] < past + length:
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}, wanted [{rows}, {past + length}]")
        return attention_mask[:, : past + length].long()
    if past == 0 and position_ids is not None:
        restarts = position_ids.diff(dim=-1) != 1
        return nn.functional.pad(restarts.cumsum(-1), (1, 0)).expand(rows, length) + 1
    return torch.ones(rows, past + length, dtype=torch.long, device=like.device)


def _packing(group_BT: Tensor, group_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The queries of a group are its last keys, so kernels that align causality bottom-right need lengths alone."""
    base = int(group_BS.max()) + 1
    row = base * torch.arange(len(group_BT), device=group_BT.device)[:, None]
    queries, keys = (torch.where(group > 0, group + row, 0).flatten() for group in (group_BT, group_BS))
    keys = torch.where(torch.isin(keys, queries), keys, 0)
    places, lengths = zip(*(_sorted(groups) for groups in (queries, keys)), strict=True)
    starts = [nn.functional.pad(one.cumsum(0), (1, 0)).int() for one in lengths]
    longest = [int(one.max()) for one in lengths]
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return *places, dict(zip(names, (*starts, *longest), strict=True))


def _sorted(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Places of what is in a group, group by group, and how many there are in each."""
    places = groups.nonzero()[:, 0]
    values, order = groups[places].sort(stable=True)
    return places[order], values.unique_consecutive(return_counts=True)[1]


class UniXMLP(nn.Module):
    """SwiGLU; with copies the sum of the token's own modality's and of one for all."""

    def __init__(
        self, config: UniXConfig, *, vision: str = "", vision_size: int = 0, share_size: int = 0, size: int = 0
    ) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.vision = vision if vision_size else None
        self.share = share_size > 0
        self.plain = not vision  # every token passes the one FFN that there is
        width = config.hidden_size
        own = size or config.intermediate_size
        for prefix, hidden in (("", own), (vision, vision_size), ("share_", share_size)):
            if hidden:
                setattr(self, f"{prefix}gate_proj", nn.Linear(width, hidden, bias=False))
                setattr(self, f"{prefix}up_proj", nn.Linear(width, hidden, bias=False))
                setattr(self, f"{prefix}down_proj", nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor, modalities: Modalities | None = None) -> Tensor:
        """[..., D] -> [..., D]; [B, T, D] where there are copies."""
        if self.plain:
            return self._ffn("", x)
        assert modalities is not None
        vision = torch.zeros_like if self.vision is None else partial(self._ffn, self.vision)
        own = modalities.apply((partial(self._ffn, ""), vision), x)
        return own + self._ffn("share_", x) if self.share else own

    def _ffn(self, prefix: str, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, f"{prefix}{leaf}_proj") for leaf in ("gate", "up", "down"))
        return down(self.activation(gate(x)) * up(x))


class UniXRouter(nn.Linear):
    """The experts of each token and their weights, in fp32."""

    def __init__(self, config: UniXConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.config = config
        if config.router_bias:
            zeros = torch.zeros(config.num_experts, dtype=torch.float32)  # and so it is loaded, whatever the rest is
            self.register_buffer("e_score_correction_bias", zeros)

    def forward(self, x: Tensor, is_vision: Tensor | None) -> tuple[Tensor, Tensor]:
        """[n, D] -> weights and experts [n, K]; ``is_vision`` [n] where modalities have experts of their own."""
        config = self.config
        logits = nn.functional.linear(x.float(), self.weight.float())
        if config.expert_sets and is_vision is not None:
            closed = torch.ones(2, logits.shape[1], dtype=torch.bool, device=x.device)
            for row, experts in zip(closed, config.expert_sets, strict=False):
                row[experts] = False
            logits = logits.masked_fill(closed[is_vision.long()], -torch.inf)
        is_softmax = config.router_score == "softmax"
        scores = logits.softmax(-1) if is_softmax else logits.sigmoid()
        keys = scores + self.e_score_correction_bias.float() if config.router_bias else scores
        keys = keys.masked_fill(logits == -torch.inf, -torch.inf)
        if config.n_group > 1:
            groups = keys.unflatten(-1, (config.n_group, -1))
            best = min(1 if is_softmax else 2, groups.shape[-1])  # as DeepSeek-V2 and V3 rate a group
            open_ones = groups.topk(best, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, open_ones, False)
            keys = groups.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        chosen = keys.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + (0.0 if is_softmax else 1e-20))
        return weights * config.routed_scaling_factor, chosen


class UniXExperts(nn.Module):
    """The sum of a token's experts, and of a shared FFN if there is one."""

    def __init__(self, config: UniXConfig) -> None:
        super().__init__()
        self.gate = UniXRouter(config)
        self.experts = nn.ModuleList(
            UniXMLP(config, size=config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        size = config.shared_expert_intermediate_size
        self.shared_expert = UniXMLP(config, size=size) if size else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: Tensor, modalities: Modalities | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows = x.flatten(0, -2)
        weights, chosen = self.gate(rows, None if modalities is None else modalities.is_vision_BT.flatten())
        out = torch.zeros_like(rows, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if len(token) or self.training:  # an expert without tokens has gradients of zeros, on every rank
                out = out.index_add(0, token, weights[token, slot, None] * expert(rows[token]).float())
        out = out.to(x.dtype)
        if self.shared_expert is not None:
            shared = self.shared_expert(rows)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(rows).sigmoid()
            out = out + shared
        return out.view_as(x)


class UniXAttention(nn.Module):
    """Projections before and after attention, one or one per modality, and attention itself, which has no weights."""

    def __init__(self, config: UniXConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.split = config.variant == "mot" and config.vision_vocab_size > 0
        self.split_output = self.split and config.vision_o_proj == "used"
        width, queries = config.hidden_size, config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        for prefix in ("", "vis_") if self.split else ("",):
            for leaf, rows in (("q", queries), ("k", keys), ("v", keys)):
                setattr(self, f"{prefix}{leaf}_proj", nn.Linear(width, rows, bias=config.qkv_bias))
            if config.qk_norm:
                for leaf in "qk":
                    setattr(self, f"{prefix}{leaf}_norm", Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps))
            if not prefix or config.vision_o_proj != "absent":
                setattr(self, f"{prefix}o_proj", nn.Linear(queries, width, bias=config.o_bias))

    def project(self, x: Tensor, modalities: Modalities | None) -> Tensor:
        """[..., D] -> [..., H + 2 K, N], normed and not rotated yet."""
        if not self.split:
            return self._project("", x)
        assert modalities is not None
        return modalities.apply((partial(self._project, ""), partial(self._project, "vis_")), x)

    def _project(self, prefix: str, x: Tensor) -> Tensor:
        parts = [getattr(self, f"{prefix}{leaf}_proj")(x).unflatten(-1, (-1, self.head_dim)) for leaf in "qkv"]
        if self.config.qk_norm:
            parts[:2] = [getattr(self, f"{prefix}{leaf}_norm")(y) for leaf, y in zip("qk", parts, strict=False)]
        return torch.cat(parts, dim=-2)

    def attend(self, qkv: Tensor, rotary: tuple[Tensor, Tensor], view: View, cache: Cache | None) -> Tensor:
        """[B, T, H + 2 K, N] -> [B, T, H * N]. Called outside ``forward``: no hook of a wrapper may need to run.

        Weights [B, H, T, S] are noted in the view, if it asks for them and the implementation has them.
        """
        qkv = qkv.transpose(1, 2)
        keys = self.config.num_key_value_heads
        turned, v = qkv.split([qkv.shape[1] - keys, keys], dim=1)
        cos, sin = (part[:, None] for part in rotary)
        turned = turned * cos + rotate_half(turned) * sin
        q, k = turned.split([turned.shape[1] - keys, keys], dim=1)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, view.places)
        function = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        options = {
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "sliding_window": None,
        }
        if view.packing is None:
            attended, weights = function(self, q, k, v, view.mask, **options)
            if view.weights is not None:
                view.weights.append(weights)
            return attended.flatten(2)
        of_queries, of_keys, lengths = view.packing
        q_flat, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        packed = (x[places].transpose(0, 1)[None] for x, places in ((q_flat, of_queries), (k, of_keys), (v, of_keys)))
        out = function(self, *packed, None, **options, **lengths)[0][0].to(q.dtype)
        whole = torch.zeros_like(q_flat).index_copy(0, of_queries, out)
        return whole.unflatten(0, (len(q), -1)).flatten(2)

    def output(self, x: Tensor, modalities: Modalities | None) -> Tensor:
        """[..., H * N] -> [..., D]."""
        if not self.split_output:
            return self.o_proj(x)
        assert modalities is not None
        return modalities.apply((self.o_proj, self.vis_o_proj), x)


class UniXDecoderLayer(GradientCheckpointingLayer):
    """One layer, or what one modality has of a layer that exists twice."""

    def __init__(self, config: UniXConfig, layer_idx: int, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.self_attn = UniXAttention(config, layer_idx)
        self.mlp = UniXMLP(config) if mlp is None else mlp
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        attended: Tensor | None = None,
        *,
        half: bool = False,
        modalities: Modalities | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        view: View | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """[..., D] -> [..., D]. ``half``: up to q, k and v, then, with ``attended``, the rest.

        A layer that exists twice attends once for both modalities, between two calls of each module. Both go through
        ``__call__``, so that what wraps a module (FSDP, checkpointing) sees all uses of its parameters.
        """
        if attended is None:
            qkv = self.self_attn.project(self.input_layernorm(x), modalities)
            if half:
                return qkv
            assert rotary is not None and view is not None
            attended = self.self_attn.attend(qkv, rotary, view, past_key_values)
        x = x + self.self_attn.output(attended, modalities)
        return x + self.mlp(self.post_attention_layernorm(x), modalities)


class UniXPreTrainedModel(PreTrainedModel):
    """What transformers asks about the models below."""

    config_class = UniXConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["UniXDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Transformers looks for a spelling in this file that it changes between versions."""
        return True


class UniXModel(UniXPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: UniXConfig) -> None:
        super().__init__(config)
        if config.variant not in ("x", "moe", "mot", "routed"):
            raise ValueError(f"variant={config.variant!r} is unknown. Variants: x, moe, mot, routed.")
        layers, is_twice = config.num_hidden_layers, config.variant == "x"
        self.encode = config.num_vision_encode_layers if is_twice else 0
        self.decode = layers - config.num_vision_decode_layers if is_twice else layers
        self.has_twins = config.vision_vocab_size > 0 and (self.encode > 0 or self.decode < layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(UniXDecoderLayer(config, i, self._mlp(i)) for i in range(layers))
        if self.has_twins:
            self.vision_encode_layers = nn.ModuleList(UniXDecoderLayer(config, i) for i in range(self.encode))
            self.vision_decode_layers = nn.ModuleList(UniXDecoderLayer(config, i) for i in range(self.decode, layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def _mlp(self, i: int) -> nn.Module:
        """The FFN of layer i, with its copies or experts."""
        config, has_vision = self.config, self.config.vision_vocab_size > 0
        if config.variant == "routed":
            is_sparse = (i + 1) % config.decoder_sparse_step == 0 and i not in (config.mlp_only_layers or ())
            return UniXExperts(config) if is_sparse else UniXMLP(config)
        if config.variant == "moe" and has_vision and (i + 1) % config.decoder_sparse_step == 0:
            return UniXMLP(config, vision="vis_", vision_size=config.intermediate_size)
        if config.variant == "mot" and has_vision:
            return UniXMLP(config, vision="vision_", vision_size=config.ffn_vision_size)
        if config.variant == "x" and config.add_share_ffn and self.encode <= i < self.decode:
            size = config.ffn_vision_size if has_vision else 0
            return UniXMLP(config, vision="vision_", vision_size=size, share_size=config.ffn_share_size)
        return UniXMLP(config)

    def is_vision(self, input_ids: Tensor) -> Tensor:
        """Bool, shape of ``input_ids``."""
        if not self.config.vision_vocab_size:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        among = input_ids >= self.config.real_text_vocab_size
        for one in self.config.vision_token_ids or ():
            among = among | (input_ids == one)
        return among

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        vision_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Final states [B, T, D]. ``vision_mask`` [B, T] goes with ``inputs_embeds``; ids speak for themselves."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("output_attentions needs attn_implementation='eager': no other one has the weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            vision_mask = self.is_vision(input_ids)
        elif vision_mask is None:
            raise ValueError("inputs_embeds needs vision_mask: [B, T], true for vision tokens")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        modalities = Modalities(vision_mask, training=self.training)
        views = self._views(attention_mask, position_ids, modalities, past_key_values, past, x.dtype)
        weights: list[Tensor] | None = [] if output_attentions else None
        views = (replace(views[0], weights=weights), replace(views[1], weights=weights))
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        rotary = self.rotary_emb(x, position_ids)
        states, skip = [], None
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(x)
            twin = self._twin(i)
            if twin is None:
                x = layer(x, modalities=modalities, rotary=rotary, view=views[0], past_key_values=past_key_values)
                continue
            if skip is not None and i - self.decode == self.config.skip_connection_loc:
                x = torch.where(vision_mask[..., None], x + skip, x)
            qkv = modalities.apply((partial(layer, half=True), partial(twin, half=True)), x)
            attended = layer.self_attn.attend(qkv, rotary, views[1], past_key_values)
            x = modalities.apply((layer, twin), x, attended)
            if i < self.encode and i == self.config.skip_connection_loc:
                skip = x
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=None if weights is None else tuple(weights),
        )

    def _twin(self, i: int) -> UniXDecoderLayer | None:
        """The vision layer beside layer i."""
        if not self.has_twins or self.encode <= i < self.decode:
            return None
        return self.vision_encode_layers[i] if i < self.encode else self.vision_decode_layers[i - self.decode]

    def _views(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        modalities: Modalities,
        cache: Cache | None,
        past: int,
        dtype: torch.dtype,
    ) -> tuple[View, View]:
        """Views of layers that see the document, and of those that see the own modality's tokens in it."""
        is_vision = modalities.is_vision_BT
        length, room = is_vision.shape[1], _room(cache)
        seen = past + length
        documents = documents_of(attention_mask, position_ids, past, like=is_vision)
        is_plain = bool((documents == 1).all())
        documents = nn.functional.pad(documents, (0, max(0, room - seen)))
        implementation = self.config._attn_implementation or "eager"
        make = partial(view_of, queries=slice(past, seen), implementation=implementation, dtype=dtype)
        places = {"cache_position": torch.arange(past, seen, device=documents.device)}
        # Without a mask sdpa aligns causality top-left, and no kernel knows what part of a cache is only allocated.
        is_causal = "flash" in implementation or (implementation == "sdpa" and (past == 0 or length == 1))
        whole = View() if is_plain and is_causal and not room else make(documents)
        whole = replace(whole, places=places)
        if not self.has_twins:
            return whole, whole
        if cache is not None:
            is_vision = self._remember(cache, is_vision, places)
        groups = torch.where(documents > 0, 2 * documents + is_vision, 0)
        return whole, replace(make(groups), places=places)

    def _remember(self, cache: Cache, is_vision_BT: Tensor, places: dict[str, Tensor]) -> Tensor:
        """Put these tokens' modality into the layer behind the last one; that of all tokens, [B, S]."""
        layer = self.config.num_hidden_layers
        if cache.layer_class_to_replicate is None and len(cache.layers) == layer:
            room = _room(cache)
            cache.layers.append(StaticLayer(max_cache_len=room) if room else DynamicLayer())
        bits = is_vision_BT[:, None, :, None]
        return cache.update(bits, bits, layer, places)[0][:, 0, :, 0]


def _room(cache: Cache | None) -> int:
    """Tokens that a cache has allocated ahead; 0 if it grows."""
    if cache is None or not cache.layers:
        return 0
    layer = cache.layers[0]
    return max(0, layer.get_max_length() if hasattr(layer, "get_max_length") else layer.get_max_cache_shape())


class Samplable(LogitsProcessor):
    """Leaves only ids that may be drawn: never a row behind the codes; of one modality's range if one is named."""

    def __init__(self, config: UniXConfig, modality: str | None) -> None:
        offset, end = config.real_text_vocab_size, config.real_text_vocab_size + config.vision_vocab_size
        ranges = {None: (0, end), "text": (0, offset), "vision": (offset, end)}
        if modality not in ranges:
            raise ValueError(f"modality={modality!r} is unknown. Give 'text', 'vision' or None.")
        self.range = ranges[modality]
        self.but = list(config.vision_token_ids or ()) if modality == "text" else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, rows], -inf where an id may not be drawn."""
        ids = torch.arange(scores.shape[-1], device=scores.device)
        never = (ids < self.range[0]) | (ids >= self.range[1])
        never[self.but] = True
        return scores.masked_fill(never, -float("inf"))


class UniXForCausalLM(UniXPreTrainedModel, GenerationMixin):
    """The model with its head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: UniXConfig) -> None:
        super().__init__(config)
        self.model = UniXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        vision_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, rows of the vocabulary], and the loss if there are labels."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            vision_mask=vision_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def generate(
        self,
        *args: Any,
        modality: str | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; rows that no token has are never drawn.

        Args:
            modality: ``"vision"`` draws image codes only (code k is id ``real_text_vocab_size`` + k), ``"text"`` only
                ids below them that are not vision either, as the start of an image is.
            kwargs: for guidance give ``guidance_scale`` s and ``negative_prompt_ids``: logits are u + s (c - u), u from
                the negative prompt and c from the prompt, before ids are masked.
        """
        processors = LogitsProcessorList([*(logits_processor or ()), Samplable(self.config, modality)])
        return super().generate(*args, logits_processor=processors, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as it is: the model makes its own from it, for caches allocated ahead too."""
        return attention_mask


UniXConfig.register_for_auto_class()
UniXModel.register_for_auto_class("AutoModel")
UniXForCausalLM.register_for_auto_class("AutoModelForCausalLM")
