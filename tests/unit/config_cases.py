"""A run that every test of the configuration starts from."""

import json
from pathlib import Path

import pytest

from unimega.config import loader, strict
from unimega.config.schema import RunConfig
from unimega.errors import ConfigError

ROOT = Path(__file__).parents[2]
MODEL = {
    "preset": "unix",
    "num_layers": 8,
    "width": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 16,
    "ffn_width": 96,
    "encode_layers": 2,
    "decode_layers": 1,
    "vision_offset": 96,
    "codebook": 64,
}
BASE = {
    "model": MODEL,
    "data": {"train": [{"path": "corpus/a"}], "pack_length": 96},
    "training": {"steps": 20, "global_batch_packs": 8},
    "checkpoint": {"directory": "ck"},
    "logging": {"directory": "logs"},
}
DENSE = {"preset": "dense", "encode_layers": None, "decode_layers": None}
SHARE = {"preset": "share", "shared_ffn_width": 48}
MOE_HARD = {**DENSE, "preset": "moe_hard", "split_every": 2}
MOT = {**DENSE, "preset": "mot"}
MOE = {**DENSE, "preset": "moe", "experts": 8, "top_k": 2}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 4,
    "tie_word_embeddings": False,
}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 24, "attention_bias": True}


def enter_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors name files as the user gave them; ranks are what the test says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def toml(values: dict) -> str:
    """One section per table, everything inside it inline."""
    return "\n".join(
        f"[{section}]\n" + "\n".join(f"{key} = {inline(value)}" for key, value in keys.items())
        for section, keys in values.items()
    )


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    return json.dumps(value)


def base(**sections: dict) -> dict:
    """BASE with keys changed; None removes one."""
    merged = strict.merge(BASE, sections)
    return {name: {k: v for k, v in keys.items() if v is not None} for name, keys in merged.items()}


def run(values: dict, *argv: str) -> RunConfig:
    Path("run.toml").write_text(toml(values), encoding="utf-8")
    return loader.load_run(["--config", "run.toml", *argv])


def line_of(values: dict, *argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(values, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)
