"""A dense checkpoint becomes experts: the same function at first, specialists where named; and the names of Uni-MoE."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.distributed.harness import run_dist
from unimega.errors import UnimegaError
from unimega.hf.inputs import Inputs

pytestmark = pytest.mark.timeout(300)

DENSE = "hf_qwen3"
KEYS = {"preset": "moe", "experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` and three specialists ``a``, ``b``, ``c``, which are the same but for their weights."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("upcycle")
    tensors = oracle.tensors_of(DENSE)
    oracle.import_folder(oracle.whole_folder(DENSE, place / "hf"), place / "dense")
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    for seed, name in enumerate("abc"):
        folder = oracle.write_folder(place / "hf of" / name, oracle.config_of(DENSE), _random(shapes, seed))
        oracle.import_folder(folder, place / name)
    return place


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    return oracle.random_tensors(shapes, seed=seed)


def upcycle(place: Path, target: str, *specialists: str, keys: dict[str, Any] = KEYS, **recipe: Any) -> Any:
    from unimega.hf.upcycle import Recipe, upcycle

    sources = [place / name for name in specialists]
    return upcycle(place / "dense", place / target, Recipe(keys=keys, **recipe), specialists=sources)


def stored(place: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    from unimega.hf.stored import StoredWeights

    weights = StoredWeights(_step(place))
    return weights.read(list(weights.shapes))


def _step(place: Path) -> Path:
    from unimega.parallel import step_folder

    return step_folder.resolve_step(place)


def logits(checkpoints: list[Path]) -> list[np.ndarray]:
    """On a rank."""
    from unimega.config.model import ModelSpec
    from unimega.config.schema import ParallelConfig
    from unimega.hf.evaluate import outputs
    from unimega.parallel import checkpoint
    from unimega.training.engine import Engine

    torch.set_num_threads(1)
    ids = np.arange(40)[None] * 7 % 160
    asked = Inputs(ids=ids, documents=np.ones_like(ids), targets=None)
    found = []
    for one in checkpoints:
        spec = ModelSpec.from_dict(checkpoint.read_model(str(one))["spec"])
        engine = Engine(spec, ParallelConfig(), optimizer_config=None, initial=str(one))
        found.append(outputs(engine, asked, names=None)["logits"])
        engine.close()
    return found


def test_computes_what_the_dense_model_did(place: Path) -> None:
    done = upcycle(place, "copies", keys=KEYS | {"dense_layers": [1]})
    assert not done.changes and done.model.dense_layers == (1,)
    dense, routed = run_dist(logits, world=1, args=([place / "dense", place / "copies"],), timeout=280)[0]
    assert np.abs(dense).max() > 0.5 and np.abs(dense - routed).max() < 1e-5
    router = stored(place / "copies")["layers.0.ffn.router.weight"]
    assert router.shape[0] == 4 and 0.01 < router.std() < 0.03
    again = upcycle(place, "again", keys=KEYS | {"dense_layers": [1]})
    assert again.fates == done.fates
    before, after = stored(place / "copies"), stored(place / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_experts_of_specialists(place: Path) -> None:
    """Expert e is the FFN of checkpoint e, from the first again after the last; the rest is the dense one's."""
    done = upcycle(place, "unimoe", "a", "b", "c", keys={"preset": "unimoe"})
    assert done.changes == "its experts are of several checkpoints"
    made, dense = stored(place / "unimoe"), stored(place / "dense")
    sources = [stored(place / name) for name in "abc"]
    for leaf in ("gate", "up", "down"):
        experts = made[f"layers.0.ffn.experts.{leaf}.weight"]
        assert len(experts) == 8
        for number, one in enumerate(experts):
            assert torch.equal(one, sources[number % 3][f"layers.0.ffn.{leaf}.weight"]), (leaf, number)
    rest = [key for key in made if ".experts." not in key and ".router." not in key]
    assert rest and all(torch.equal(made[key], dense[key]) for key in rest)
    assert dense.keys() - made.keys() == {key for key in dense if ".ffn." in key}
    dropped = {fate.names[0] for fate in done.fates if fate.kind == "dropped"}
    assert dropped == dense.keys() - made.keys()
    layer = json.loads((_step(place / "unimoe") / "model.json").read_text())["spec"]["layers"][0]
    assert layer["experts"]["balance_counts"] == "first"


def test_noise_and_drop(place: Path) -> None:
    """Noise is in deviations of the weight; the units drawn anew are the same in gate, up and down."""
    upcycle(place, "noise", noise=0.1)
    upcycle(place, "drop", drop=0.25)
    dense, noisy, dropped = (stored(place / name) for name in ("dense", "noise", "drop"))
    gate = dense["layers.0.ffn.gate.weight"]
    off = noisy["layers.0.ffn.experts.gate.weight"] - gate
    assert torch.isclose(off.std(), 0.1 * gate.std(), rtol=0.05) and not torch.equal(off[0], off[1])
    changed = []
    for leaf, dim in (("gate", 1), ("up", 1), ("down", 0)):
        kept = dropped[f"layers.0.ffn.experts.{leaf}.weight"] == dense[f"layers.0.ffn.{leaf}.weight"]
        changed.append(~kept.all(dim=dim + 1))
    assert (changed[0] == changed[1]).all() and (changed[0] == changed[2]).all()
    width = gate.shape[0]
    assert changed[0].sum(dim=1).tolist() == [round(width / 4)] * 4 and not (changed[0][0] == changed[0][1]).all()


@pytest.mark.parametrize(
    ("keys", "specialists", "line"),
    [
        ({"top_k": 5}, (), r"model\.top_k=5 is more than model\.experts=4\. Lower it\."),
        ({"expert_width": 8}, (), r"model\.expert_width=8: experts are copies of FFNs of width \d+\. Remove it\."),
        ({"shared_expert_width": 8}, (), r"model\.shared_expert_width=8: nothing of the dense model would fill .*"),
        ({"experts": 2}, ("a", "b", "c"), r"--from names 3 checkpoints, but there are fewer experts\. Name as many\."),
        ({}, ("a", "other"), r"--from .*other: its model has other layers\. Specialists are of one model\."),
    ],
)
def test_what_cannot_be_is_one_line(place: Path, keys: dict[str, Any], specialists: Any, line: str) -> None:
    if "other" in specialists and not (place / "other").is_dir():
        config = oracle.config_of(DENSE) | {"num_hidden_layers": 1, "layer_types": None, "max_window_layers": 1}
        tensors = {name: values for name, values in oracle.tensors_of(DENSE).items() if not _beyond_first(name)}
        oracle.import_folder(oracle.write_folder(place / "hf of other", config, tensors), place / "other")
    with pytest.raises(UnimegaError) as caught:
        upcycle(place, "refused", *specialists, keys=KEYS | keys)
    assert re.fullmatch(line, str(caught.value)) and not (place / "refused").exists()


def _beyond_first(name: str) -> bool:
    return "layers." in name and ".layers.0." not in name


def test_experts_do_not_become_experts_again(place: Path) -> None:
    from unimega.hf.upcycle import Recipe
    from unimega.hf.upcycle import upcycle as again

    upcycle(place, "once")
    with pytest.raises(UnimegaError, match=r"layers\.0 has routed experts already\. Only a dense checkpoint becomes"):
        again(place / "once", place / "twice", Recipe(keys=KEYS))


@pytest.mark.parametrize("target", ["kept", "special"])
def test_no_source_is_replaced(place: Path, tmp_path: Path, target: str) -> None:
    """--overwrite would take away the only copy of what the experts are made of."""
    from unimega.hf.upcycle import Recipe
    from unimega.hf.upcycle import upcycle as command

    for name in ("kept", "special"):
        shutil.copytree(place / "dense", tmp_path / name)
    steps = [tmp_path / name / (tmp_path / name / "latest").read_text().strip() for name in ("kept", "special")]
    for dense, special in ((tmp_path / "kept", tmp_path / "special"), steps):
        with pytest.raises(UnimegaError, match=r"is where '.*' is read from\. Name another folder\.$"):
            command(dense, tmp_path / target, Recipe(keys=KEYS), specialists=[special], overwrite=True)
    assert stored(tmp_path / target).keys() == stored(place / "dense").keys()


@pytest.mark.parametrize("noise", ["nan", "inf", "-1"])
def test_noise_that_is_no_number_is_refused(tmp_path: Path, noise: str, capsys: pytest.CaptureFixture[str]) -> None:
    from unimega.errors import run_cli

    found = importlib.util.spec_from_file_location("upcycle", Path(__file__).parents[2] / "tools" / "upcycle.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with pytest.raises(SystemExit) as caught:
        run_cli(module.main, ["dense", str(tmp_path / "out"), "--experts", "2", "--top-k", "1", f"--noise={noise}"])
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.endswith("is no deviation. It is 0 or more, and finite.\n")


# --- Uni-MoE's folders ---------------------------------------------------------------------------------------------

UNIMOE = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "moe": True,
    "moe_type": "dense",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 80,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "mm_projector_type": "mlp2x_gelu",
}
_IN_EXPERT = {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}


def unimoe_tensors(*, factors: bool) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (80, 32),
        "lm_head.weight": (80, 32),
        "model.norm.weight": (32,),
        "model.mm_projector.0.weight": (4, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    }
    for base in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{base}{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        shapes |= {f"{base}self_attn.{leaf}_proj.weight": (32, 32) for leaf in "qkvo"}
        shapes[f"{base}mlp.deepspeed_moe.gate.wg.weight"] = (8, 32)
        for number in range(8):
            for leaf, (out, inner) in _IN_EXPERT.items():
                name = f"{base}mlp.deepspeed_moe.experts.deepspeed_experts.{number}.{leaf}_proj"
                shapes[f"{name}.weight"] = (out, inner)
                if factors:
                    shapes |= {f"{name}_lora_A.weight": (4, inner), f"{name}_lora_B.weight": (out, 4)}
    return _random(shapes, 9)


@pytest.mark.parametrize("factors", [True, False])
def test_names_of_unimoe(tmp_path: Path, factors: bool) -> None:
    """There and back, and with the factors merged as a stock Mixtral."""
    from unimega.hf.export import export_checkpoint

    tensors = unimoe_tensors(factors=factors)
    folder = oracle.write_folder(tmp_path / "hf", UNIMOE, tensors)
    what = oracle.import_folder(folder, tmp_path / "checkpoint")
    assert what.model.preset == "unimoe" and what.spec.layers[1].experts.balance_counts == "first"
    assert what.model.lora.rank == (4 if factors else 0)
    assert ("lora = { rank = 4, alpha = 8.0" in (tmp_path / "checkpoint" / "model.toml").read_text()) == factors
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back", format="unimoe")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert tensors.keys() - back.keys() == {name for name in tensors if "mm_projector" in name or "inv_freq" in name}
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in UNIMOE if factors or "lora" not in name} == {
        name: value for name, value in UNIMOE.items() if factors or "lora" not in name
    }
    merged = export_checkpoint(tmp_path / "checkpoint", tmp_path / "merged", merge_lora=factors)
    assert merged.model_type == "mixtral"
    name = "model.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.5.down_proj"
    want = tensors[f"{name}.weight"]
    if factors:
        want = want + 2 * tensors[f"{name}_lora_B.weight"] @ tensors[f"{name}_lora_A.weight"]
    got = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"moe_type": "sparse"}, "moe_type='sparse' is not supported"),
        ({"use_fm_block": True}, "use_fm_block=true is not supported"),
        ({"num_experts": None}, "num_experts=None is not a number of experts"),
        ({"lora_r": None}, "lora_r=None is not a rank, but the folder has factors of LoRA"),
    ],
)
def test_unimoe_that_is_refused(tmp_path: Path, config: dict[str, Any], line: str) -> None:
    name = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.0.gate_proj_lora_A.weight"
    folder = oracle.write_folder(tmp_path / "hf", UNIMOE | config, {})
    save_file({name: torch.zeros(4, 32)}, folder / "model.safetensors")
    with pytest.raises(UnimegaError) as caught:
        oracle.import_folder(folder, tmp_path / "out")
    assert line in str(caught.value) and "\n" not in str(caught.value)
