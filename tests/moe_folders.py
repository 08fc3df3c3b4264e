"""Tiny folders of routed experts as the installed transformers writes them, for the tests of import and export."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimega.hf.inputs import IGNORED, Inputs

_sizes: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
QWEN: dict[str, Any] = _sizes | {"head_dim": 12, "num_experts": 4, "moe_intermediate_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, dense among sparse, tied": (
        "Qwen3Moe",
        QWEN | {"num_hidden_layers": 3, "mlp_only_layers": [1, 7], "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe, every second, not normalised": (
        "Qwen3Moe",
        QWEN | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "mixtral": ("Mixtral", _sizes | {"num_hidden_layers": 2, "num_local_experts": 4}),
}
NO_SPARSE = {"decoder_sparse_step": 3, "mlp_only_layers": [5]}, {"mlp_only_layers": [0, 1]}, {"num_experts": 0}
"""Of a Qwen3-MoE of two layers: transformers gives each an FFN."""


def make(case: str) -> Any:
    """The model of transformers, with weights that a swapped or dropped tensor shows in."""
    return make_of(*CASES[case])


def make_of(kind: str, options: dict[str, Any]) -> Any:
    """``make`` of what is not in the table."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(len(options))
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_((1.0 if "norm" in name else 0.0) + 0.2 * torch.randn(values.shape))
    return model


def inputs() -> Inputs:
    """Two rows; the second ends with pads."""
    rng = np.random.default_rng(5)
    ids, documents = rng.integers(0, 80, (2, 22)), np.ones((2, 22), dtype=np.int64)
    documents[1, 15:] = 0
    targets = np.where(documents == 0, IGNORED, np.roll(ids, -1, axis=1))
    targets[:, -1], targets[1, 14] = IGNORED, IGNORED
    return Inputs(ids=np.where(documents == 0, 0, ids), documents=documents, targets=targets)


def answers(model: Any) -> dict[str, torch.Tensor]:
    """What transformers computes of ``inputs``, under the names of ``tools/logits.py``."""
    asked = inputs()
    mask = torch.from_numpy(asked.documents)
    out = model(torch.from_numpy(asked.ids), attention_mask=mask, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), torch.from_numpy(asked.targets).flatten())
    loss.backward()
    named = {name: values.grad for name, values in model.named_parameters() if values.grad is not None}
    return {
        "logits": out.logits.detach() * mask[..., None],
        "loss": loss.detach(),
        "router_logits": torch.stack(out.router_logits).detach() * mask.flatten()[:, None],
        "router_loss": out.aux_loss.detach(),
        **{name: grad for whole, values in named.items() for name, grad in _each(whole, values, type(model).__name__)},
    }


def _each(name: str, values: torch.Tensor, kind: str) -> list[tuple[str, torch.Tensor]]:
    """A gradient under the names that lie on the disk."""
    base, _, leaf = name.partition("mlp.")
    is_mixtral = kind.startswith("Mixtral")
    place = f"{base}block_sparse_moe." if is_mixtral else f"{base}mlp."
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    if leaf == "experts.gate_up_proj":
        halves = (values.chunk(2, dim=1)[number] for number in (0, 1))
        return [
            (f"{place}experts.{e}.{spelled}.weight", one)
            for spelled, half in zip((gate, up), halves, strict=True)
            for e, one in enumerate(half)
        ]
    if leaf == "experts.down_proj":
        return [(f"{place}experts.{e}.{down}.weight", one) for e, one in enumerate(values)]
    return [(place + leaf if leaf else name, values)]


def imported(folders: dict[str, Path], place: Path) -> None:
    """Checkpoints of folders; no process group is needed."""
    from tests import oracle

    for name, folder in folders.items():
        oracle.import_folder(folder, place / name)
