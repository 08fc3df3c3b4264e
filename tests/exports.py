"""Checkpoints of every kind as exports, loaded with transformers: what the tests of the export share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import models, oracle
from unimega.config import layer
from unimega.config.experts import ExpertSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import ParallelConfig
from unimega.hf.inputs import Inputs

DOCUMENTS = (9, 1, 17, 6, 4)
"""Tokens of each document of a pack; the last ones are pads in the second row."""

_half_biased: dict[str, Any] = {"qk_norm": True, "qkv_bias": True, "output_bias": False}
_routed: dict[str, Any] = {"number": 6, "width": 12, "top_k": 2}
SPECS: dict[str, ModelSpec] = {
    **{name: one for name, one in models.PRESETS.items() if len(one.modalities) < 3},
    "skip": models.SKIP,
    "dense, codes, qwen3": models.spec(layer.dense(3, ffn=24)),
    "dense, qwen3 with biases": models.spec(layer.dense(2, ffn=24), models.ONE, qkv_bias=True, output_bias=True),
    "dense, text, qwen2": models.spec(layer.dense(2, ffn=24), models.ONE, qk_norm=False, qkv_bias=True),
    "dense, llama": models.spec(layer.dense(2, ffn=24), qk_norm=False),
    "dense, no stock one": models.spec(layer.dense(2, ffn=24), **_half_biased),
    "unix, biases, no norms": models.spec(
        layer.unix(4, ffn=(24, 24), encode=1, decode=2), qk_norm=False, qkv_bias=True, tied=True
    ),
    "unix, all split": models.spec(layer.unix(3, ffn=(24, 24), encode=2, decode=1), **_half_biased),
    "unix, no end at the bottom": models.spec(layer.unix(3, ffn=(24, 24), encode=0, decode=1)),
    "unix, nothing split": models.spec(layer.unix(2, ffn=(24, 24), encode=0, decode=0)),
    "share, no shared FFN": models.spec(layer.share(4, ffn=(24, 24), middle=(24, 10), shared=0, encode=1, decode=1)),
    "share, no ends": models.spec(layer.share(2, ffn=(24, 24), middle=(24, 10), shared=8, encode=0, decode=0)),
    "share, one modality": models.spec(
        layer.share(4, ffn=(24,), middle=(24,), shared=8, encode=1, decode=1), models.ONE
    ),
    "moe_hard, every layer": models.spec(layer.moe_hard(3, ffn=(24, 24), every=1), output_bias=True, qkv_bias=True),
    "qwen3_moe": models.spec(layer.moe((True, False, True), experts=ExpertSpec(**_routed, normalize=False), ffn=24)),
    "mixtral": models.spec(layer.moe((True,) * 2, experts=ExpertSpec(**_routed), ffn=0), models.ONE, qk_norm=False),
    "routed, sets": models.spec(
        layer.moe((True,) * 2, experts=ExpertSpec(**_routed, sets=((0, 1, 2, 5), (2, 3, 4))), ffn=0), tied=True
    ),
    "routed, as DeepSeek-V3": models.spec(
        layer.moe(
            (False, True),
            experts=ExpertSpec(
                **_routed,
                score="sigmoid",
                scale=2.5,
                groups=3,
                group_topk=2,
                bias_rate=0.001,
                shared_width=8,
                shared_gate=True,
                balance=0.01,
            ),
            ffn=24,
        ),
        qk_norm=False,
    ),
    "mot, no projection of vision": models.spec(layer.mot(2, ffn=(24, 16), output_projection="shared")),
}
STOCK = {
    "dense": "qwen2",
    "one modality": "qwen3",
    "dense, codes, qwen3": "qwen3",
    "dense, qwen3 with biases": "qwen3",
    "dense, text, qwen2": "qwen2",
    "dense, llama": "llama",
    "unix, nothing split": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "mixtral": "mixtral",
}
"""Specs that load without code of ours; the rest is uni_x."""


def packed(spec: ModelSpec) -> Inputs:
    """Two packs of all ids that may be drawn."""
    rng = np.random.default_rng(3)
    top = spec.vocabulary.starts[-1] + spec.vocabulary.codes[-1]
    ids = rng.integers(0, top, (2, sum(DOCUMENTS)))
    ids[:, ::8] = 5
    documents = np.repeat([np.arange(1, 1 + len(DOCUMENTS))] * 2, DOCUMENTS, axis=1)
    documents[1, -DOCUMENTS[-1] :] = 0
    return Inputs(ids=np.where(documents == 0, 0, ids), documents=documents, targets=None)


def make_checkpoints(folder: str) -> dict[str, np.ndarray]:
    """On a rank: every spec as a checkpoint with random weights, and the engine's logits; every oracle imported."""
    from unimega.hf.evaluate import outputs
    from unimega.hf.export_config import describe
    from unimega.hf.names import table
    from unimega.parallel import checkpoint
    from unimega.training.engine import Engine

    torch.set_num_threads(1)
    logits = {}
    for name, spec in SPECS.items():
        layout = describe(spec, format="auto", dtype="float32", stored={}, special=None).layout
        shapes = {row.key: list(row.key_shape) for row in table(spec, layout).rows}
        tensors = {key: models.random_tensor(key, shape) for key, shape in shapes.items()}
        place = Path(folder) / name
        checkpoint.save_tensors(place, tensors, metadata={"spec": spec.to_dict()})
        engine = Engine(spec, ParallelConfig(), optimizer_config=None, initial=str(place))
        logits[name] = outputs(engine, packed(spec), names=None)["logits"]
        engine.close()
    for case in (*oracle.UNIX, *oracle.DENSE):
        oracle.import_folder(oracle.whole_folder(case, Path(folder) / "hf" / case), Path(folder) / case)
    return logits


def load(folder: Path, *, attention: str = "sdpa", needs_code: bool = True) -> Any:
    """The model of an export, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=needs_code, dtype="auto")
    model.config._attn_implementation = attention
    return model.eval()


def flash_on_cpu(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What a flash attention kernel computes: causal, aligned bottom-right, run by run where lengths are given."""
    assert attention_mask is None
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    whole = [0, query.shape[2]], [0, key.shape[2]]
    of_q, of_k = whole if cu_seq_lens_q is None else (cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist())
    if cu_seq_lens_q is not None:
        assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32 and len(query) == 1
        assert (max_length_q, max_length_k) == (max(np.diff(of_q)), max(np.diff(of_k)))
    runs = []
    for q0, q1, k0, k1 in zip(of_q, of_q[1:], of_k, of_k[1:], strict=False):
        assert k1 - k0 >= q1 - q0 > 0
        scores = query[:, :, q0:q1] @ key[:, :, k0:k1].transpose(-1, -2) * scaling
        seen = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - q1 + q0).bool()
        runs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, :, k0:k1])
    return torch.cat(runs, 2).transpose(1, 2), None
