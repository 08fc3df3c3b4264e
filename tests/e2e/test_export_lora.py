"""LoRA in a folder: merged it gives the engine's logits, alone it is an adapter that PEFT loads beside its model."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import exports, models
from tests.distributed.harness import run_dist
from tests.tolerances import relative_error
from unimega.config import layer
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.config.schema import Lora, ParallelConfig
from unimega.errors import CheckpointError, run_cli

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
LOGITS = 3e-5
"""Absolute, fp32: as for exports without LoRA."""
LORA = Lora(rank=3, alpha=6.0, dropout=0.05)
SPARSE = LayerSpec(experts=ExpertSpec(number=4, width=12, top_k=2))
SPECS: dict[str, ModelSpec] = {
    "unix": replace(models.PRESETS["unix"], lora=LORA),
    "qwen2, some": models.spec(
        layer.dense(2, ffn=24),
        models.ONE,
        qk_norm=False,
        qkv_bias=True,
        lora=Lora(rank=2, alpha=5.0, match=("layers.0.attention.*", "*.down")),
    ),
    "qwen3_moe": models.spec((SPARSE, SPARSE), models.ONE, lora=LORA),
    "mixed": models.spec((LayerSpec(shared_ffn=24), SPARSE), models.ONE, lora=LORA),
}
ENDS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TARGETS = {
    "unix": ENDS,
    "qwen2, some": [
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.0.self_attn.{end}" for end in ("k_proj", "o_proj", "q_proj", "v_proj")),
        "model.layers.1.mlp.down_proj",
    ],
    "qwen3_moe": ENDS,
    "mixed": ENDS,
}


def make_checkpoints(folder: str) -> dict[str, np.ndarray]:
    """On a rank: every spec as a checkpoint with random weights and factors, and without; the engine's logits."""
    from unimega.hf.evaluate import outputs
    from unimega.hf.export_config import describe
    from unimega.hf.lora import whole_table
    from unimega.parallel import checkpoint
    from unimega.parallel.lora import is_factor
    from unimega.training.engine import Engine

    torch.set_num_threads(1)
    logits = {}
    for name, spec in SPECS.items():
        layout = describe(spec, format="auto", dtype="float32", stored={}, special=None).layout
        shapes = {row.key: list(row.key_shape) for row in whole_table(spec, layout).rows}
        tensors = {key: models.random_tensor(key, shape) for key, shape in shapes.items()}
        place = Path(folder) / name
        checkpoint.save_tensors(place, tensors, metadata={"spec": spec.to_dict()})
        plain = {key: values for key, values in tensors.items() if not is_factor(key)}
        spec = replace(spec, lora=None)
        checkpoint.save_tensors(Path(folder) / f"{name}, plain", plain, metadata={"spec": spec.to_dict()})
        engine = Engine(SPECS[name], ParallelConfig(), optimizer_config=None, initial=str(place))
        logits[name] = outputs(engine, exports.packed(spec), names=None)["logits"]
        engine.close()
    return logits


@pytest.fixture(scope="module")
def made(export_folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of checkpoints, with exports that are merged, plain and adapters; logits."""
    from unimega.hf.export import export_checkpoint
    from unimega.hf.export_adapter import export_adapter

    folder = export_folder / "lora"
    logits = run_dist(make_checkpoints, world=1, args=(str(folder),))[0]
    for name in SPECS:
        export_checkpoint(folder / name, folder / "merged" / name, merge_lora=True)
        export_checkpoint(folder / f"{name}, plain", folder / "plain" / name)
        export_adapter(folder / name, folder / "adapter" / name)
    return folder, logits


def check_logits(model: Any, name: str, want: np.ndarray) -> None:
    inputs = exports.packed(SPECS[name])
    ids, documents = torch.from_numpy(inputs.ids), torch.from_numpy(inputs.documents)
    with torch.no_grad():
        for number in documents[0].unique():
            rows = documents[0] == number
            got = model(ids[:1, rows]).logits
            assert (got - torch.from_numpy(want)[:1, rows]).abs().max() <= LOGITS, f"document {number}"


@pytest.mark.parametrize("name", SPECS)
def test_merged_gives_the_logits_of_the_engine(made: Any, name: str) -> None:
    folder, logits = made
    check_logits(exports.load(folder / "merged" / name, needs_code=name == "unix"), name, logits[name])


@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_holds_what_was_merged(made: Any, name: str) -> None:
    """By PEFT's names and formula: W + alpha / r * B A for every module, and nothing else differs."""
    folder, _ = made
    adapter = load_file(folder / "adapter" / name / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / name / "adapter_config.json").read_text())
    plain, merged = (load_file(folder / kind / name / "model.safetensors") for kind in ("plain", "merged"))
    scale = config["lora_alpha"] / config["r"]
    changed = set()
    for key, a in adapter.items():
        if ".lora_A." in key:
            weight = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
            delta = scale * adapter[key.replace(".lora_A.", ".lora_B.")] @ a
            assert relative_error(plain[weight] + delta, merged[weight]) < 1e-6, weight
            changed.add(weight)
    assert len(adapter) == 2 * len(changed) > 0 and plain.keys() == merged.keys()
    assert {key for key in plain if not torch.equal(plain[key], merged[key])} == changed
    assert config["target_modules"] == TARGETS[name]
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    refused = name in ("qwen3_moe", "mixed")  # PEFT has no dropout on the parameters of fused experts
    assert config["lora_dropout"] == (0.0 if refused else SPECS[name].lora.dropout)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "mixed"])
def test_peft_loads_it(made: Any, name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    folder, logits = made
    model = exports.load(folder / "plain" / name, needs_code=name == "unix")
    check_logits(peft.PeftModel.from_pretrained(model, str(folder / "adapter" / name)).eval(), name, logits[name])


def tool(*words: str | Path) -> None:
    """``python tools/export_hf.py WORDS`` in this process."""
    found = importlib.util.spec_from_file_location("export_hf", ROOT / "tools" / "export_hf.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    run_cli(module.main, [str(word) for word in words])


def test_the_command(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = made
    tool(folder / "qwen3_moe", tmp_path / "adapter", "--adapter", "--dtype", "bf16")
    assert "adapter of a qwen3_moe: 64 tensors" in capsys.readouterr().out
    assert {v.dtype for v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    tool(folder / "qwen2, some", tmp_path / "merged", "--merge-lora")
    assert (tmp_path / "merged" / "config.json").exists()


LINES = [
    ("unix", (), "its model has LoRA. Add it to the weights with --merge-lora, or write it alone with --adapter."),
    ("unix, plain", ("--merge-lora",), "--merge-lora: the checkpoint's model has no LoRA. Leave the option out."),
    ("unix, plain", ("--adapter",), "--adapter: the checkpoint's model has no LoRA. Leave the option out."),
    (
        "unix",
        ("--adapter", "--merge-lora"),
        "--adapter writes LoRA's factors alone, so that --merge-lora has no place. Leave one out.",
    ),
]


@pytest.mark.parametrize(("name", "options", "line"), LINES, ids=[line[:30] for _, _, line in LINES])
def test_what_cannot_be_exported_is_one_line(
    made: Any, tmp_path: Path, name: str, options: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    with pytest.raises(SystemExit) as caught:
        tool(folder / name, tmp_path / "out", *options)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and error.rstrip().endswith(line)
    assert not list(tmp_path.iterdir())


def test_experts_beside_dense_layers_are_said_to_peft(
    made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from unimega.hf.export_adapter import export_adapter

    folder, _ = made
    export_adapter(folder / "mixed", tmp_path / "mixed")
    assert "PEFT with transformers 5 leaves out" in caplog.text
    caplog.clear()
    export_adapter(folder / "qwen3_moe", tmp_path / "sparse")
    assert "PEFT" not in caplog.text


def test_a_checkpoint_without_a_factor_is_refused(made: Any, tmp_path: Path) -> None:
    from unimega.hf.export import export_checkpoint
    from unimega.parallel import checkpoint

    spec = SPECS["qwen2, some"]
    run_dist(_save_without_factors, world=1, args=(str(tmp_path / "bad"), spec.to_dict()))
    with pytest.raises(CheckpointError, match=r"key 'layers\.0\.attention\.qkv\.lora_a' is missing"):
        export_checkpoint(tmp_path / "bad", tmp_path / "out", merge_lora=True)
    assert checkpoint.resolve_step(tmp_path / "bad").is_dir() and not (tmp_path / "out").exists()


def _save_without_factors(place: str, spec: dict[str, Any]) -> None:
    from unimega.parallel import checkpoint

    checkpoint.save_tensors(place, {"embedding.weight": torch.zeros(43, 32)}, metadata={"spec": spec})
