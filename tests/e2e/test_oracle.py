"""What the original code computes: imported folders give its logits, loss, gradients and AdamW losses, on any layout.

Options that the oracles lack are held to ``tests/reference.py``, a second implementation that is itself held to them.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle, reference
from tests.distributed.harness import run_dist
from unimega.config.schema import OptimizerConfig, ParallelConfig
from unimega.hf.inputs import IGNORED, Inputs, microbatches, read_inputs

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
LOGITS, LOSS, GRADIENTS, TIED_GRADIENTS, ADAMW = 3e-5, 1e-5, 3e-5, 1e-4, 1e-4
"""Met by the original and a second implementation (its README): absolute, AdamW losses relative."""
LAYOUTS = {
    "one rank": ParallelConfig(),
    "tp 2 + sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp 2": ParallelConfig(pp=2),
}
MORE_LAYOUTS = {"dp 2": ParallelConfig(), "pp 2 interleaved": ParallelConfig(pp=2, vpp=2)}
"""Dense cases alone: with one and two rows they need rows of pads here."""
CASES = (*oracle.UNIX, *oracle.DENSE)
STEPS = OptimizerConfig(
    lr=2e-3, min_lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=0.0, schedule="constant"
)
Outputs = dict[str, dict[str, Any]]


def inputs_of(case: str) -> dict[str, Inputs]:
    """Everything that the oracle of a case was asked."""
    if case in oracle.UNIX:
        return {"intended": read_inputs(oracle.DATA / case / "inputs.npz")}
    expected = np.load(oracle.DATA / case / "expected.npz")
    ids, pad_ids = expected["input_ids"], expected["pad_ids"]
    plain = Inputs(ids=ids, documents=np.ones_like(ids), targets=np.roll(ids, -1, 1))
    plain.targets[:, -1] = IGNORED
    starts = np.cumsum(expected["packed_position_ids"] == 0, axis=1)
    return {
        "intended": plain,
        "pad": Inputs(ids=pad_ids * expected["pad_mask"], documents=expected["pad_mask"], targets=None),
        "packed": Inputs(ids=ids, documents=starts, targets=None),
    }


def imported(folder: Path, target: Path, **options: Any) -> Path:
    oracle.import_folder(folder, target, **options)
    return target


def engine_of(checkpoint: Path, parallel: ParallelConfig, optimizer_config: OptimizerConfig | None = None) -> Any:
    """(Engine, spelling of its gradients) of an imported checkpoint."""
    from unimega.config.model import ModelSpec
    from unimega.hf.convert import layout_of
    from unimega.hf.names import table
    from unimega.parallel.checkpoint import read_model
    from unimega.training.engine import Engine

    stored = read_model(checkpoint)
    spec = ModelSpec.from_dict(stored["spec"])
    engine = Engine(spec, parallel, optimizer_config=optimizer_config, initial=str(checkpoint))
    return engine, table(spec, layout_of(stored))


def run_cases(folder: str, layout: str) -> dict[str, Outputs] | None:
    """Every case on one layout: answers to all of its inputs, then the losses of five steps. Results on rank 0."""
    from unimega import backend
    from unimega.hf.evaluate import outputs

    results: dict[str, Outputs] = {}
    for case in CASES if layout in LAYOUTS else oracle.DENSE:
        engine, names = engine_of(Path(folder) / case, (LAYOUTS | MORE_LAYOUTS)[layout], STEPS)
        asked = inputs_of(case)
        out = {
            name: outputs(engine, inputs, names=names, gradients=name == "intended") for name, inputs in asked.items()
        }
        if case in oracle.UNIX:
            out["asrun"] = outputs(engine, asked["intended"], names=names, cross_document=True)
            batches = [backend.to_device(batch) for batch in batches_of(engine, asked["intended"])]
            out["adamw"] = {"losses": [engine.step(batches, lr=STEPS.lr).loss for _ in range(5)]}
        results[case] = out
        engine.close()
    return results if os.environ["RANK"] == "0" else None


def batches_of(engine: Any, inputs: Inputs) -> list[Any]:
    groups = engine.groups
    return microbatches(
        inputs,
        engine.spec,
        tp_rank=groups.tp.rank(),
        tp=groups.tp.size(),
        sequence_parallel=engine.parallel.sequence_parallel,
        dp_rank=0,
        dp=1,
        multiple=1,
    )


def run_layouts(folder: str, layouts: tuple[str, ...]) -> Any:
    """Ranks of one world go through several layouts."""
    torch.set_num_threads(1)
    if layouts == ("one rank",):
        for case in CASES:
            imported(oracle.whole_folder(case, Path(folder) / "hf" / case), Path(folder) / case)
    return {layout: run_cases(folder, layout) for layout in layouts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, dict[str, Outputs]]:
    """[layout][case][question] -> arrays. Two worlds in all; the first also imports the folders."""
    alone = run_dist(run_layouts, world=1, args=(str(folder), ("one rank",)))[0]
    pair = run_dist(run_layouts, world=2, args=(str(folder), ("tp 2 + sp", "pp 2", *MORE_LAYOUTS)), timeout=250)[0]
    return alone | pair


def assert_close(got: Any, want: Any, tolerance: float, what: str) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, wanted {want.shape}"
    difference = np.abs(got - want).max()
    assert difference <= tolerance, f"{what}: off by {difference:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", oracle.UNIX)
def test_original_unix(answers: Any, case: str, layout: str) -> None:
    out, data = answers[layout][case], oracle.DATA / case
    for mode in ("intended", "asrun"):
        expected = np.load(data / f"expected_{mode}.npz")
        assert_close(out[mode]["logits"], expected["logits"], LOGITS, f"{mode} logits")
        assert_close(out[mode]["loss"], expected["loss"], LOSS, f"{mode} loss")
    adamw = json.loads((data / "meta_intended.json").read_text())["adamw"]["losses"]
    assert_close(np.array(out["adamw"]["losses"]) / adamw, np.ones(5), ADAMW, "AdamW losses")
    if (data / "grads_intended.npz").exists():
        compare_gradients(out["intended"], np.load(data / "grads_intended.npz"), GRADIENTS)


@pytest.mark.parametrize("layout", LAYOUTS | MORE_LAYOUTS)
@pytest.mark.parametrize("case", oracle.DENSE)
def test_stock_qwen(answers: Any, case: str, layout: str) -> None:
    out, data = answers[layout][case], oracle.DATA / case
    expected = np.load(data / "expected.npz")
    assert_close(out["intended"]["logits"], expected["logits"], LOGITS, "logits")
    assert_close(out["intended"]["loss"], expected["loss"], LOSS, "loss")
    assert_close(out["packed"]["logits"], expected["packed_logits_ref"], LOGITS, "packed logits")
    assert_close(out["pad"]["logits"], expected["pad_logits"], LOGITS, "padded logits")
    compare_gradients(out["intended"], np.load(data / "grads.npz"), GRADIENTS)


def compare_gradients(out: dict[str, Any], expected: Any, tolerance: float) -> None:
    assert set(out) - {"logits", "loss"} == set(expected), "other tensors have a gradient"
    for name in expected:
        assert_close(out[name], expected[name], tolerance, f"gradient of {name}")


# --- options without an oracle -------------------------------------------------------------------------------------


def variant(architecture: str = "UniQwen3ForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json with other options than the oracles'."""
    base = {"unix": "unix_x", "HardMoeQwen3CausalLM": "unix_moe", "MoTQwen3ForCausalLM": "unix_mot"}
    return oracle.config_of(base.get(architecture, "unix_x")) | {"architectures": [architecture]} | changes


VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "head width": (variant(head_dim=24), ()),
    "one KV head, odd vocabulary": (variant(num_key_value_heads=1, vocab_size=169), ()),
    "separators": (variant(add_sep_for_vis=1), (89, 92)),
    "skip": (variant(skip_connection_loc=0, num_vision_decode_layers=2), ()),
    "skip and shared FFN": (variant(skip_connection_loc=1, num_vision_decode_layers=3, add_share_ffn=1), ()),
    "skip that reaches nothing": (variant(skip_connection_loc=1), ()),
    "no vision FFN": (variant(add_share_ffn=1, ffn_vision_size=0), ()),
    "no shared FFN": (variant(add_share_ffn=1, ffn_share_size=0), ()),
    "no decode layers": (variant(num_vision_decode_layers=0), ()),
    "no encode layers, biases": (variant(num_vision_encode_layers=0, attention_bias=True), ()),
    "no split layers": (variant(num_vision_encode_layers=0, num_vision_decode_layers=0), ()),
    "all split, tied": (variant(num_vision_encode_layers=4, num_vision_decode_layers=2, tie_word_embeddings=True), ()),
    "moe, every layer": (variant("HardMoeQwen3CausalLM", decoder_sparse_step=1, attention_bias=True), (89,)),
    "moe, no layer": (variant("HardMoeQwen3CausalLM", decoder_sparse_step=9), ()),
    "mot, biases, tied": (variant("MoTQwen3ForCausalLM", attention_bias=True, tie_word_embeddings=True), (89,)),
}
ROUND_TRIPS = ("skip and shared FFN", "no encode layers, biases", "mot, biases, tied")
"""Variants whose weights are read back from the engine: imported, loaded, gathered, renamed, bit for bit."""


def folder_of(config: dict[str, Any], separators: tuple[int, ...], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for a config.json."""
    from unimega.hf.names import table
    from unimega.hf.read import describe

    source = describe(config, folder=Path("config"), separator_ids=separators)
    rows = table(source.spec, source.layout).rows
    shapes = {name: shape for row in rows for name, shape in zip(row.names, row.shapes, strict=True)}
    return oracle.random_tensors(shapes, seed=seed)


def packed_ids() -> Inputs:
    """Two packs of documents of every make-up, with pads at the end of the second, in the middle of nowhere's loss."""
    generator = np.random.default_rng(5)
    ids = np.where(
        generator.random((2, 37)) < 0.5, generator.integers(0, 96, (2, 37)), generator.integers(96, 160, (2, 37))
    )
    ids[:, ::7] = [[89], [92]]
    ids[:, 3::9] = 90
    documents = np.repeat([[1, 2, 3, 4]], 2, 0).repeat([9, 1, 17, 10], 1)
    documents[1, 30:] = 0
    ids[documents == 0] = 0
    targets = np.where(generator.random(ids.shape) < 0.7, np.roll(ids, -1, 1), IGNORED)
    targets[:, -1] = IGNORED
    targets[documents == 0] = IGNORED
    return Inputs(ids=ids, documents=documents, targets=targets)


def run_variants(folder: str) -> dict[str, Any]:
    """Every variant imported and evaluated on one rank, with what its skipping rules of hf.md ask for."""
    from unimega.hf.evaluate import outputs

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, (config, separators) in VARIANTS.items():
        tensors = folder_of(config, separators)
        place = oracle.write_folder(Path(folder) / "hf" / name, config, tensors)
        checkpoint = imported(place, Path(folder) / name, separator_ids=separators)
        engine, names = engine_of(checkpoint, ParallelConfig(), STEPS)
        results[name] = outputs(engine, packed_ids(), names=names, gradients=True)
        if name in ROUND_TRIPS:
            back = names.to_hf(engine.gather_parameters())
            assert set(back) == set(tensors), name
            assert all(torch.equal(back[tensor], tensors[tensor]) for tensor in tensors), name
        engine.close()
    return results | run_metamorphic(Path(folder)) | {"failures": run_failures(Path(folder))}


def run_failures(folder: Path) -> dict[str, Any]:
    """What a failed or repeated import says and leaves."""
    from unimega.errors import CheckpointError
    from unimega.hf import convert

    place = oracle.whole_folder("hf_qwen3", folder / "failures" / "hf")
    target = folder / "failures" / "checkpoint"
    said = {}

    def attempt(name: str, target: Path, **options: Any) -> None:
        try:
            imported(place, target, **options)
        except CheckpointError as error:
            said[name] = str(error)

    save, convert.write_step = convert.write_step, _write_half
    attempt("disk full", target)
    said["left by a failure"] = sorted(path.name for path in target.parent.iterdir())
    convert.write_step = save
    target.mkdir()
    attempt("empty folder is fine", target)
    attempt("repeated", target)
    run = target / "run.json"
    run.touch()  # of a training that goes on there
    attempt("has more", target, overwrite=True)
    run.unlink()
    (target / "model.toml").write_text("old")
    attempt("overwritten", target, overwrite=True)
    said["is new"] = (target / "model.toml").read_text() != "old" and (target / "latest").exists()
    shutil.copy(target / "latest", place / "latest")  # DeepSpeed has one too
    attempt("not a checkpoint", place, overwrite=True)
    said["left"] = sorted(path.name for path in target.parent.iterdir())
    return said


def _write_half(directory: Path, *_: Any, **__: Any) -> None:
    directory.mkdir()
    (directory / "half").touch()
    raise OSError(28, "No space left on device")


def run_metamorphic(folder: Path) -> dict[str, Any]:
    """Pairs of models and inputs whose logits must be equal."""
    from unimega.hf.evaluate import outputs

    def logits(name: str, config: dict[str, Any], tensors: Any, inputs: Inputs) -> np.ndarray:
        place = oracle.write_folder(folder / "hf" / name, config, tensors)
        engine, _ = engine_of(imported(place, folder / name), ParallelConfig())
        out = outputs(engine, replace(inputs, targets=None), names=None)
        engine.close()
        return out["logits"]

    inputs, dense = packed_ids(), oracle.config_of("hf_qwen3") | {"vocab_size": 168, "num_hidden_layers": 6}
    weights = folder_of(dense, None)
    twins = {
        name.replace(f"layers.{i}.", other): tensor
        for i, other in ((0, "vision_encode_layers.0."), (1, "vision_encode_layers.1."), (5, "vision_decode_layers.0."))
        for name, tensor in weights.items()
        if f"layers.{i}." in name
    }
    text = replace(inputs, ids=inputs.ids % 89)
    image = replace(inputs, ids=np.where(inputs.documents > 0, 96 + inputs.ids % 64, 0))
    mot = variant("MoTQwen3ForCausalLM")
    with_dead = folder_of(mot, ())
    without = {name: 0 * value if "vis_o_proj" in name else value for name, value in with_dead.items()}
    split = variant(head_dim=24)
    alone = Inputs(ids=inputs.ids[:1, 10:27], documents=np.ones((1, 17), np.int64), targets=None)
    return {
        "dense": [
            logits(f"dense {k}", dense, weights, v) for k, v in (("mixed", inputs), ("text", text), ("image", image))
        ],
        "no ends": logits("no ends", VARIANTS["no split layers"][0] | {"head_dim": 24}, weights, inputs),
        "twins": [
            logits(f"twins {k}", split, weights | twins, v)
            for k, v in (("mixed", inputs), ("text", text), ("image", image))
        ],
        "mot": [logits(f"mot {k}", mot, v, inputs) for k, v in (("whole", with_dead), ("zeroed", without))],
        "packed": [
            logits("packed", split, weights | twins, inputs)[:1, 10:27],
            logits("alone", split, weights | twins, alone),
        ],
    }


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_dist(run_variants, world=1, args=(str(tmp_path_factory.mktemp("variants")),))[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_option_against_reference(variants: Any, name: str) -> None:
    config, separators = VARIANTS[name]
    inputs, got = packed_ids(), variants[name]
    tensors = {key: value.requires_grad_() for key, value in folder_of(config, separators).items()}
    loss = torch.zeros(())
    for row, (ids, documents) in enumerate(zip(inputs.ids, inputs.documents, strict=True)):
        want = reference.logits(
            config, tensors, torch.from_numpy(ids), torch.from_numpy(documents), separators=separators
        )
        real = documents > 0
        assert_close(got["logits"][row][real], want.detach().numpy()[real], LOGITS, f"logits of row {row}")
        targets = torch.from_numpy(inputs.targets[row])
        loss = loss + torch.nn.functional.cross_entropy(want, targets, ignore_index=IGNORED, reduction="sum")
    loss = loss / inputs.scored
    assert_close(got["loss"], loss.item(), LOSS, "loss")
    loss.backward()
    gradients = {key: value.grad.numpy() for key, value in tensors.items() if value.grad is not None}
    compare_gradients(got, gradients, TIED_GRADIENTS if config["tie_word_embeddings"] else GRADIENTS)


def test_reference_meets_the_oracles() -> None:
    for case in oracle.UNIX:
        inputs, expected = inputs_of(case)["intended"], np.load(oracle.DATA / case / "expected_intended.npz")
        got = reference.logits(
            oracle.config_of(case),
            oracle.tensors_of(case),
            torch.from_numpy(inputs.ids[0]),
            torch.from_numpy(inputs.documents[0]),
        )
        assert_close(got.numpy(), expected["logits"][0], LOGITS, case)


def test_equal_models_are_equal(variants: Any) -> None:
    """E = D = 0 is the dense model; twins that copy text are too, on text alone and on images alone, not on both."""
    mixed, text, image = variants["dense"]
    assert_close(variants["no ends"], mixed, LOGITS, "no split layers")
    assert_close(variants["twins"][1], text, LOGITS, "copied twins on text")
    assert_close(variants["twins"][2], image, LOGITS, "copied twins on images")
    assert np.abs(variants["twins"][0] - mixed).max() > 0.1
    assert_close(*variants["packed"], LOGITS, "packed against alone")
    np.testing.assert_array_equal(*variants["mot"])


def test_import_leaves_all_or_nothing(variants: Any) -> None:
    said = variants["failures"]
    assert "checkpoint' cannot be written: [Errno 28] No space left on device" in said["disk full"]
    assert said["left by a failure"] == ["hf"] and said["left"] == ["checkpoint", "hf"]
    assert "empty folder is fine" not in said and "overwritten" not in said and said["is new"]
    assert "holds a converted checkpoint already" in said["repeated"] and "--overwrite" in said["repeated"]
    assert "checkpoint' holds 'run.json', which is no part of a converted checkpoint" in said["has more"]
    assert "exists and is not a converted checkpoint" in said["not a checkpoint"]


# --- the commands --------------------------------------------------------------------------------------------------


def command(*words: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment["PYTHONPATH"] = str(ROOT)
    arguments = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_commands(tmp_path: Path) -> None:
    """import_hf.py, then logits.py on two ranks: pads to a multiple of tp inside, gradients by original name."""
    case = oracle.whole_folder("unix_mot", tmp_path / "hf")
    done = command("tools/import_hf.py", case, tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "117 copied, 6 carried, 0 initialised, 0 dropped" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]
    inputs = dict(np.load(case / "inputs.npz"))
    cut = {name: inputs[name][:, :97] for name in ("input_ids", "segment_ids", "labels")}
    np.savez(tmp_path / "in.npz", **cut)
    layout = ("--parallel.tp", "2", "--parallel.sequence_parallel", "true")
    files = ("--inputs", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    done = command("tools/logits.py", "--checkpoint", tmp_path / "checkpoint", *files, "--gradients", *layout, ranks=2)
    assert done.returncode == 0, done.stderr
    out, expected = dict(np.load(tmp_path / "out.npz")), np.load(case / "expected_intended.npz")
    assert out["logits"].shape == (1, 97, 168) and out["logits"].dtype == np.float32
    assert_close(out["logits"], expected["logits"][:, :97], LOGITS, "logits")
    assert set(out) - {"logits", "loss"} == set(np.load(case / "grads_intended.npz").files)
    for bad in (
        command("tools/logits.py", "--checkpoint", tmp_path / "checkpoint", *files, "--parallel.tpp", "2"),
        command("tools/import_hf.py", case, tmp_path / "other", "--separator-ids", "x"),
    ):
        assert bad.returncode == 2 and bad.stderr.startswith("unimega: ") and bad.stderr.count("\n") == 1, bad.stderr
