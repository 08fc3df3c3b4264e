"""The run files of examples/moe: they are sound on their ranks, and the models are as large as they say."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests import moe
from unimega.config import loader, presets
from unimega.config.model import ModelSpec
from unimega.config.schema import RunConfig
from unimega.layers.context import Build
from unimega.models.build import build_block
from unimega.parallel import lora
from unimega.parallel.linear import Layout

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "moe"
RANKS = {"digits": 2, "unimoe_8e": 8, "qwen3_30b_a3b": 32}


def load(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> RunConfig:
    monkeypatch.setenv("WORLD_SIZE", str(RANKS[name]))
    return loader.load_run(["--config", str(EXAMPLES / f"{name}.toml"), *options])


def sizes(spec: ModelSpec) -> Mapping[str, int]:
    """Parameters of all modules by kind; of layers, those of equal description are built once, without memory."""
    found = {"tables": spec.vocabulary.rows * spec.width * (1 if spec.tied else 2), "norms": spec.width}
    built: dict[object, dict[str, int]] = {}
    build = Build(spec=spec, layout=Layout(tp=moe.Alone(), sequence_parallel=False), device=torch.device("cpu"))
    for index, layer in enumerate(spec.layers):
        if layer not in built:
            kinds = built[layer] = {}
            with torch.device("meta"):
                block = build_block(build, index, dp=None)
            lora.adapt(block, spec.lora)
            for name, values in block.named_parameters():
                part = name.split(".")[1] if name.startswith("ffn.") else name.split(".")[0]
                kind = "lora" if "lora" in name else "norms" if "norm" in name else part
                kinds[kind] = kinds.get(kind, 0) + values.numel()
        for kind, number in built[layer].items():
            found[kind] = found.get(kind, 0) + number
    return found


def test_every_run_file_is_here() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.toml")} == set(RANKS)


def test_qwen3_30b_a3b(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("qwen3_30b_a3b", monkeypatch)
    ours = sizes(presets.model_spec(config.model))
    assert sum(ours.values()) == 30_565_677_056
    # Qwen's own has 151936 rows and no codes of pictures: 30.5e9, of which a token meets 3.3e9.
    theirs = sizes(presets.model_spec(load("qwen3_30b_a3b", monkeypatch, "--model.codebook", "0").model))
    assert theirs["experts"] == 48 * 128 * 3 * 2048 * 768 and theirs["router"] == 48 * 128 * 2048
    assert theirs["tables"] == 2 * 151936 * 2048
    assert sum(theirs.values()) == 30_532_122_624
    assert sum(theirs.values()) - theirs["experts"] * 120 // 128 == 3_353_032_704


def test_unimoe_8e(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("unimoe_8e", monkeypatch)
    found = sizes(presets.model_spec(config.model))
    base = {kind: number for kind, number in found.items() if kind != "lora"}
    assert base["experts"] == 32 * 8 * 3 * 4096 * 11008 and base["attention"] == 32 * 4 * 4096 * 4096
    assert sum(base.values()) == 37_106_225_152
    # LLaMA-7B itself: one FFN a layer in place of eight, no routers, 32000 rows.
    dense = sum(base.values()) - base["experts"] * 7 // 8 - base["router"] - 2 * 8192 * 4096
    assert dense == 6_738_415_616
    per_layer = 4 * 8 * (4096 + 4096) + 8 * 3 * 8 * (4096 + 11008)
    assert found["lora"] == 32 * per_layer
