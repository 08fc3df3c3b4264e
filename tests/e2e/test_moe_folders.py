"""Qwen3-MoE and Mixtral through import, evaluation and export: equal to transformers, and every tensor back."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import moe_folders, oracle
from tests.distributed.harness import run_dist
from unimega.config.schema import OptimizerConfig, ParallelConfig
from unimega.errors import CheckpointError, ConfigError
from unimega.hf.inputs import Inputs

pytestmark = pytest.mark.timeout(300)

CASES = tuple(moe_folders.CASES)
TIED = CASES[0]
LOGITS, LOSS, GRADIENTS = 3e-5, 1e-5, 3e-5
LAYOUTS = {
    "pp 2": ParallelConfig(pp=2),
    "ep 2": ParallelConfig(ep=2),
    "ep 2 x tp 2": ParallelConfig(ep=2, tp=2),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moe folders")


@pytest.fixture(scope="module")
def folders(place: Path) -> dict[str, Any]:
    """What transformers computes, by case; ``hf``, ``fused`` and ``checkpoints`` appear beside each other."""
    torch.set_num_threads(1)
    found, where = {}, {}
    for case in CASES:
        model = moe_folders.make(case)
        for kind, original in (("hf", True), ("fused", False)):
            model.save_pretrained(place / kind / case, save_original_format=original)
            where[f"{kind}/{case}"] = place / kind / case
        found[case] = moe_folders.answers(model)
    for number, options in enumerate(moe_folders.NO_SPARSE):
        model = moe_folders.make_of("Qwen3Moe", moe_folders.QWEN | {"num_hidden_layers": 2} | options)
        where[f"no sparse {number}"] = place / f"no sparse {number}"
        model.save_pretrained(where[f"no sparse {number}"])
        with torch.no_grad():
            asked = moe_folders.inputs()
            found[f"no sparse {number}"] = model(torch.from_numpy(asked.ids)).logits
    where["oracle"] = oracle.whole_folder("hf_qwen3_moe", place / "oracle")
    moe_folders.imported(where, place / "checkpoints")
    return found


def evaluate(checkpoint: Path, parallel: ParallelConfig, inputs: Inputs, gradients: bool) -> Any:
    """On a rank: what tools/logits.py writes."""
    from unimega.config.model import ModelSpec
    from unimega.hf.convert import layout_of
    from unimega.hf.evaluate import outputs
    from unimega.hf.names import table
    from unimega.parallel import checkpoint as checkpoints
    from unimega.training.engine import Engine

    torch.set_num_threads(1)
    stored = checkpoints.read_model(str(checkpoint))
    spec = ModelSpec.from_dict(stored["spec"])
    config = OptimizerConfig() if gradients else None
    engine = Engine(spec, parallel, optimizer_config=config, initial=str(checkpoint))
    out = outputs(engine, inputs, names=table(spec, layout_of(stored)), gradients=gradients)
    engine.close()
    return out


def on_one_rank(checkpoints: Path) -> Any:
    asked, expected = moe_folders.inputs(), np.load(oracle.DATA / "hf_qwen3_moe" / "expected.npz")
    out = {case: evaluate(checkpoints / "hf" / case, ParallelConfig(), asked, True) for case in CASES}
    ids = expected["input_ids"]
    plain = Inputs(ids=ids, documents=np.ones_like(ids), targets=None)
    asked = Inputs(ids=asked.ids, documents=np.ones_like(asked.ids), targets=None)
    for number in range(len(moe_folders.NO_SPARSE)):
        name = f"no sparse {number}"
        out[name] = evaluate(checkpoints / name, ParallelConfig(), asked, False)
    return out | {"oracle": evaluate(checkpoints / "oracle", ParallelConfig(), plain, False)}


def on_two_ranks(checkpoint: Path) -> Any:
    asked = moe_folders.inputs()
    return {name: evaluate(checkpoint, parallel, asked, True) for name, parallel in LAYOUTS.items()}


@pytest.fixture(scope="module")
def computed(folders: Any, place: Path) -> Any:
    return run_dist(on_one_rank, world=1, args=(place / "checkpoints",), timeout=280)[0]


def assert_equal(got: Any, want: dict[str, torch.Tensor]) -> None:
    """All of ``tools/logits.py``, the gradient of every tensor too."""
    assert got.keys() == want.keys()
    for name, values in want.items():
        off = float(np.abs(got[name] - values.numpy()).max())
        limit = {"logits": LOGITS, "router_logits": LOGITS, "loss": LOSS, "router_loss": LOSS}.get(name, GRADIENTS)
        assert got[name].shape == tuple(values.shape) and off <= limit, f"{name}: off by {off:.2e}"
    assert np.abs(got["router_logits"]).max() > 0.1 and got["router_logits"].dtype == np.float32


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(folders: Any, computed: Any, case: str) -> None:
    assert_equal(computed[case], folders[case])


def test_equals_the_oracle(computed: Any) -> None:
    got, want = computed["oracle"], np.load(oracle.DATA / "hf_qwen3_moe" / "expected.npz")
    for name in ("logits", "router_logits"):
        assert np.abs(got[name] - want[name]).max() <= LOGITS, name
    assert got["router_loss"] == pytest.approx(want["aux_loss"], abs=LOSS)


@pytest.mark.parametrize("number", range(len(moe_folders.NO_SPARSE)))
def test_without_a_sparse_layer(folders: Any, computed: Any, place: Path, number: int) -> None:
    """transformers builds it of FFNs alone; so do we, and a Qwen3 holds it."""
    from unimega.hf.export import export_checkpoint

    name = f"no sparse {number}"
    assert np.abs(computed[name]["logits"] - folders[name].numpy()).max() <= LOGITS
    done = export_checkpoint(place / "checkpoints" / name, place / "out" / name)
    want, got = (load_file(where / name / "model.safetensors") for where in (place, place / "out"))
    assert done.model_type == "qwen3" and got.keys() == want.keys()
    assert all(torch.equal(got[tensor], want[tensor]) for tensor in want)


def test_layouts_give_the_same(folders: Any, place: Path) -> None:
    """Of the case with a dense layer among the sparse ones and a tied table."""
    out = run_dist(on_two_ranks, world=2, args=(place / "checkpoints" / "hf" / TIED,), timeout=280)
    assert out[1] == dict.fromkeys(LAYOUTS)
    for got in out[0].values():
        assert_equal(got, folders[TIED])


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back(folders: Any, place: Path, case: str) -> None:
    """From the folder that lies expert by expert and from the fused one; transformers takes the export as its own."""
    from transformers import AutoModelForCausalLM

    from unimega.hf.export import export_checkpoint

    want = load_file(place / "hf" / case / "model.safetensors")
    for kind in ("hf", "fused"):
        done = export_checkpoint(place / "checkpoints" / kind / case, place / "out" / kind / case)
        assert not done.needs_code
        got = load_file(place / "out" / kind / case / "model.safetensors")
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    model, info = AutoModelForCausalLM.from_pretrained(
        place / "out/hf" / case, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == f"{moe_folders.CASES[case][0]}ForCausalLM"
    asked = moe_folders.inputs()
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(asked.ids), attention_mask=torch.from_numpy(asked.documents)).logits
    mask = torch.from_numpy(asked.documents)[..., None]
    assert torch.allclose(logits * mask, folders[case]["logits"], rtol=0, atol=1e-6)
    old, new = (json.loads((where / case / "config.json").read_text()) for where in (place / "hf", place / "out/hf"))
    spelled = {"num_local_experts": "num_experts"} if "Qwen" in moe_folders.CASES[case][0] else {}
    written_anew = {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim"}
    for name in old.keys() - written_anew:
        assert new[spelled.get(name, name)] == old[name], name


def changed(place: Path, target: Path, tensors: Any = lambda tensors: None, **config: Any) -> Path:
    """The first case with another config.json, or without some tensors."""
    shutil.copytree(place / "hf" / TIED, target)
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    held = load_file(target / "model.safetensors")
    tensors(held)
    save_file(held, target / "model.safetensors")
    return target


def test_experts_of_several_dtypes_are_widened_with_a_word(
    folders: Any, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No value is rounded, as loading with the wider dtype does not."""
    from unimega.hf.export import export_checkpoint

    def narrow(held: dict[str, torch.Tensor]) -> None:
        held |= {name: values.bfloat16() for name, values in held.items() if ".mlp.experts.2." in name}

    folder = changed(place, tmp_path / "mixed", narrow)
    oracle.import_folder(folder, tmp_path / "checkpoint")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("unimega")]
    assert said == [
        f"{folder}: what layers.0.ffn.experts.gate.weight (and 5 more) is made of is bfloat16 and float32: "
        "float32 is taken, which holds all values"
    ]
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "out"))
    assert all(got[name].dtype == torch.float32 and torch.equal(got[name], want[name].float()) for name in want)


def test_a_layout_that_does_not_fit_speaks_of_config_json(
    folders: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimega.hf.evaluate import Request
    from unimega.hf.evaluate import evaluate as command

    monkeypatch.setenv("WORLD_SIZE", "4")
    checkpoint = str(place / "checkpoints" / "hf" / TIED)
    request = Request(
        checkpoint=checkpoint,
        inputs=moe_folders.inputs(),
        where=Path("in.npz"),
        gradients=False,
        cross_document=None,
        parallel=ParallelConfig(tp=4),
    )
    with pytest.raises(ConfigError, match=r"^parallel\.tp=4 is more than config\.json's num_key_value_heads=2: "):
        command(request)


def test_what_does_not_fit_is_one_line(folders: Any, place: Path, tmp_path: Path) -> None:
    lost = changed(place, tmp_path / "lost", lambda held: held.pop("model.layers.2.mlp.experts.3.up_proj.weight"))
    fewer, more = (changed(place, tmp_path / f"{n}", num_local_experts=n) for n in (3, 5))
    wide = changed(place, tmp_path / "wide", moe_intermediate_size=20)
    for folder, line in (
        (lost, "tensor 'model.layers.2.mlp.experts.3.up_proj.weight' is missing. config.json describes a model that"),
        (fewer, "tensor 'model.layers.0.mlp.experts.3.down_proj.weight' (and 5 more) would not be used. config.json"),
        (more, "tensor 'model.layers.0.mlp.experts.4.gate_proj.weight' (and 5 more) is missing. config.json"),
        (wide, "tensor 'model.layers.0.mlp.experts.0.gate_proj.weight' has shape [16, 32], but config.json makes it"),
    ):
        with pytest.raises(CheckpointError) as caught:
            oracle.import_folder(folder, tmp_path / "out")
        assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
