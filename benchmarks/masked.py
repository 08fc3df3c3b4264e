"""Uni-X as its original code computes it, said again in plain torch: the thing that ``bench_step.py`` compares with.

What is kept of that formulation: tokens stay in input order; text and vision layers are separate modules that run one
after the other; their tokens are picked with ``x[mask]`` and put back with ``x[mask] = y`` at the borders of the split
ends; positions and document numbers are picked the same way; the host reads the number of vision tokens and of each
stream's runs; q, k, v and gate, up are separate linears; all logits are made, in fp32 for the loss. Two differences,
so that the numbers are those of the engine: attention never crosses documents (the original means that and misses it),
and positions start anew in each. Attention is one ``scaled_dot_product_attention`` a run, where the original calls
flash attention; the run lengths take the place of the one number that it reads there.

S tokens of one pack, s of one stream, D width, V rows of the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unimega.config.model import ModelSpec
from unimega.config.schema import OptimizerConfig

Angles = tuple[torch.Tensor, torch.Tensor]
IGNORED = -100


class RMSNorm(nn.Module):
    """As in transformers: fp32 inside, the weight applied in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Layer(nn.Module):
    """One decoder layer with weights of its own, of which a split layer has two side by side."""

    def __init__(self, spec: ModelSpec, ffn: int) -> None:
        super().__init__()
        width, self.head_width = spec.width, spec.head_width
        inner, narrow = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
        self.attention_norm, self.ffn_norm = RMSNorm(width, spec.norm_eps), RMSNorm(width, spec.norm_eps)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, narrow, bias=False)
        self.v = nn.Linear(width, narrow, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(spec.head_width, spec.norm_eps) for _ in range(2))
        self.gate, self.up = nn.Linear(width, ffn, bias=False), nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor, angles: Angles, lengths: list[int]) -> torch.Tensor:
        """[s, D] -> [s, D]; ``lengths`` are the runs that do not see each other."""
        x = x + self.output(attend(*self.heads(self.attention_norm(x)), angles, lengths))
        return x + self.feed_forward(self.ffn_norm(x))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of [s, D], q and k with their norms: [s, heads of each, N]."""
        q, k, v = (linear(x).unflatten(1, (-1, self.head_width)) for linear in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, D] -> [s, D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MaskedUniX(nn.Module):
    """The stack: ``encode`` layers by two, shared layers, ``decode`` layers by two."""

    inverse_frequency: torch.Tensor

    def __init__(self, spec: ModelSpec, *, encode: int, decode: int) -> None:
        super().__init__()
        assert spec.qk_norm and not spec.qkv_bias and not spec.tied, "what the benchmark compares"
        self.spec, self.encode, self.decode = spec, encode, decode
        vocabulary = spec.vocabulary
        self.text_rows, self.vision_start = vocabulary.starts[1], vocabulary.ids[1][0]
        widths = [layer.ffn or (layer.shared_ffn,) * 2 for layer in spec.layers]
        self.embedding = nn.Embedding(vocabulary.rows, spec.width)
        self.text = nn.ModuleList([Layer(spec, ffn[0]) for ffn in widths])
        ends = widths[:encode] + widths[len(widths) - decode :]
        self.vision = nn.ModuleList([Layer(spec, ffn[1]) for ffn in ends])
        self.final_norm = RMSNorm(spec.width, spec.norm_eps)
        self.head = nn.Linear(spec.width, vocabulary.rows, bias=False)
        half = torch.arange(0, spec.head_width, 2, dtype=torch.float32) / spec.head_width
        self.register_buffer("inverse_frequency", 1.0 / spec.rope_theta**half, persistent=False)

    def forward(
        self, ids: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy.

        Args:
            ids, labels: int64 [S] in input order; label i is the target of token i, or IGNORED.
            documents: int64 [S] non-decreasing, 1 for the first; no pads.
            positions: int64 [S].
        """
        vision = (ids >= self.text_rows) | (ids == self.vision_start)
        text = ~vision
        if vision.sum().item() == 0:
            raise ValueError("a pack without images leaves the vision layers without gradients")
        assert (documents > 0).all()
        x = self.embedding(ids)
        x_vision, x_text = x[vision], x[text]
        angles = self._angles(positions)
        angles_vision, angles_text = self._angles(positions[vision]), self._angles(positions[text])
        own_vision, own_text = documents[vision], documents[text]
        runs, runs_vision, runs_text = runs_of(documents), runs_of(own_vision), runs_of(own_text)

        last = len(self.text) - self.decode
        for i in range(self.encode):
            x_text = self.text[i](x_text, angles_text, runs_text)
            x_vision = self.vision[i](x_vision, angles_vision, runs_vision)
        x[text], x[vision] = x_text, x_vision
        for i in range(self.encode, last):
            x = self.text[i](x, angles, runs)
        x_text, x_vision = x[text], x[vision]
        for i in range(last, len(self.text)):
            x_text = self.text[i](x_text, angles_text, runs_text)
            x_vision = self.vision[self.encode + i - last](x_vision, angles_vision, runs_vision)
        x[text], x[vision] = x_text, x_vision
        return F.cross_entropy(self.head(self.final_norm(x)).float(), labels, ignore_index=IGNORED)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights of an engine, by checkpoint key (``Engine.gather_parameters``)."""
        with torch.no_grad():
            for mine, key in ((self.embedding, "embedding"), (self.final_norm, "final_norm"), (self.head, "head")):
                mine.weight.copy_(weights[f"{key}.weight"])
            last = len(self.text) - self.decode
            for i, layer in enumerate(self.text):
                split = not self.encode <= i < last
                self._load(layer, f"layers.{i}", "_text" if split else "", weights)
                if split:
                    twin = self.vision[i if i < self.encode else self.encode + i - last]
                    self._load(twin, f"layers.{i}", "_vision", weights)

    def _load(self, layer: nn.Module, prefix: str, suffix: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Our qkv holds, for each KV group, its query heads, its key head and its value head."""
        per_group, groups = self.spec.heads // self.spec.kv_heads, self.spec.kv_heads
        qkv = weights[f"{prefix}.attention.qkv.weight{suffix}"]
        parts = qkv.view(groups, per_group + 2, self.spec.head_width, -1).split((per_group, 1, 1), dim=1)
        values = {name: part.flatten(0, 2) for name, part in zip("qkv", parts, strict=True)}
        keys = {"q_norm": "attention.q_layernorm", "k_norm": "attention.k_layernorm", "output": "attention.output"}
        keys |= {name: f"ffn.{name}" for name in ("gate", "up", "down")}
        keys |= {name: name for name in ("attention_norm", "ffn_norm")}
        values |= {name: weights[f"{prefix}.{key}.weight{suffix}"] for name, key in keys.items()}
        for name, value in values.items():
            layer.get_parameter(f"{name}.weight").copy_(value)

    def _angles(self, positions: torch.Tensor) -> Angles:
        angle = positions.float()[:, None] * self.inverse_frequency
        angle = torch.cat((angle, angle), dim=-1)
        dtype = self.head.weight.dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Trainer:
    """Forward, backward, clipping and AdamW, with fp32 masters and moments like the engine's.

    Args:
        model: with fp32 weights; it is brought to ``device`` and ``dtype`` here.
    """

    def __init__(self, model: MaskedUniX, config: OptimizerConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.clip = model.to(device), config.clip
        self.masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        self.model.to(dtype)
        if dtype == torch.float32:
            self.masters = list(model.parameters())
        matrices, vectors = ([p for p in self.masters if (p.ndim > 1) is wanted] for wanted in (True, False))
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )

    def forward_backward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss; gradients are in the model's parameters."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(*batch)
        loss.backward()
        return loss.detach()

    def step(self, batch: tuple[torch.Tensor, ...], *, lr: float) -> torch.Tensor:
        """One update; the loss before it, on the device."""
        loss = self.forward_backward(batch)
        has_copies = self.masters[0].dtype != self.model.head.weight.dtype
        if has_copies:
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if has_copies:
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), self.masters)
        return loss


def runs_of(documents: torch.Tensor) -> list[int]:
    """How many tokens of each document there are, on the host."""
    return torch.unique(documents, return_counts=True)[1].tolist()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: Angles, lengths: list[int]) -> torch.Tensor:
    """RoPE and attention inside of runs: q, k, v [s, heads, N] to [s, heads N]."""
    q, k, v = (t[None].transpose(1, 2) for t in (q, k, v))
    q, k = _rotate(q, angles), _rotate(k, angles)
    runs = [
        F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=True, enable_gqa=True)
        for q_run, k_run, v_run in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    ]
    return torch.cat(runs, dim=2).transpose(1, 2).reshape(v.shape[2], -1)


def _rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """RoPE of [1, heads, s, N] as transformers does it."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
