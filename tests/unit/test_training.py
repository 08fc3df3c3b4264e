"""Schedules, FLOPs, metrics and the clock; what a run refuses before ranks meet."""

import errno
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import models, moe
from tests.models import PRESETS, microbatch
from tests.unit import config_cases
from tests.unit.data_corpora import BOI, CODEBOOK, TEXT, VOCABULARY, random_documents, write
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.parameters import parameters
from unimega.config.schema import Lora, OptimizerConfig, RunConfig, Source
from unimega.data.plan import Recipe
from unimega.errors import ConfigError, DataError, KernelUnavailable, UnimegaError
from unimega.models.build import build_block
from unimega.models.stage import Stage
from unimega.parallel import lora
from unimega.training import loop, start
from unimega.training.flops import step_flops
from unimega.training.metrics import Metrics, drop_after
from unimega.training.progress import Clock
from unimega.training.run import modality_losses
from unimega.training.schedule import learning_rate
from unimega.training.trackers import Trackers

EXPERTS = ExpertSpec(number=6, width=10, top_k=2, shared_width=7, shared_gate=True)
MODELS = [*PRESETS.values(), models.spec((LayerSpec(experts=EXPERTS), LayerSpec(shared_ffn=8)))]
OPTIMIZER = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10)


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("linear", 35, 0.775),
        ("linear", 109, 0.109),
        ("constant", 109, 1.0),
        ("wsd", 98, 1.0),
        ("wsd", 99, 1.0),
        ("wsd", 100, 0.918),
        ("wsd", 110, 0.1),
    ],
)
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(step, 110, replace(OPTIMIZER, schedule=schedule)) == pytest.approx(expected, abs=1e-3)


def test_edges_of_the_schedules() -> None:
    wsd = replace(OPTIMIZER, schedule="wsd", decay_share=0.5)
    assert [learning_rate(step, 100, wsd) for step in (50, 75, 100)] == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate(0, 100, replace(wsd, decay_share=1.0, warmup_steps=0)) == 1.0
    for schedule in ("cosine", "linear", "wsd", "constant"):
        all_warm = replace(OPTIMIZER, schedule=schedule, warmup_steps=4)
        assert [learning_rate(step, 4, all_warm) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
        one = replace(OPTIMIZER, schedule=schedule, warmup_steps=0)
        assert learning_rate(0, 1, one) == 1.0
        rates = [learning_rate(step, 100, replace(OPTIMIZER, schedule=schedule)) for step in range(9, 100)]
        assert rates == sorted(rates, reverse=True) and min(rates) >= 0.1


def test_a_share_of_the_run_is_no_step_more_for_its_rounding() -> None:
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.3, schedule="wsd", decay_share=0.07)
    assert [learning_rate(step, 100, optimizer) for step in (93, 94)] == pytest.approx([1.0, 0.9])


@pytest.mark.parametrize("factors", [None, Lora(rank=2), Lora(rank=2, match=("*.qkv", "*.ffn.*"))])
def test_names_of_parameters_are_those_of_the_modules(factors: Lora | None) -> None:
    """Patterns are checked without a model: each name is one that the model has, and none is left out."""
    for spec in (replace(model, lora=factors) for model in MODELS):
        build = replace(moe.build(), spec=spec)
        blocks = [build_block(build, index, dp=None) for index in range(len(spec.layers))]
        stage = Stage(build, None, blocks=blocks, is_first=True, is_last=True, virtual=None, recompute_blocks=False)
        lora.adapt(stage, factors)
        assert parameters(spec) == tuple(sorted(name for name, _ in stage.weights()))


def test_flops_are_six_per_weight_and_token_plus_attention() -> None:
    model = PRESETS["unix"]
    batch = microbatch(model, "mixed", 1)
    attention = 4 * 12
    linears = 32 * (2 * attention + 2 * 2 * 12) + 3 * 32 * 24
    documents = sum(n * (n + 1) // 2 for n in batch.order.documents.lengths)
    own = sum(n * (n + 1) // 2 for n in batch.order.own.lengths)
    expected = 6 * 4 * 64 * linears + 3 * 4 * attention * 2 * (documents + own)
    expected += 6 * len(batch.loss_rows) * 32 * 43
    assert step_flops(model, [batch]) == expected


def test_flops_of_routed_experts_leave_pads_out() -> None:
    dense, width = PRESETS["dense"], 32
    batch = microbatch(dense, "mixed", 1)
    sparse = replace(dense, layers=(LayerSpec(experts=EXPERTS), *dense.layers[1:]))
    more = (64 - batch.order.pads) * (6 + 3 * 2 * 10) + 64 * (3 * 7 + 1) - 64 * 3 * 24
    assert batch.order.pads and step_flops(sparse, [batch]) - step_flops(dense, [batch]) == 6 * width * more


def test_flops_of_what_is_frozen_and_of_factors() -> None:
    """Each product once forward, once more where something below trains, and once more where its weight does."""
    model, batches = PRESETS["dense"], [microbatch(PRESETS["dense"], kind, 1) for kind in ("mixed", "text")]
    qkv, others, down = 128 * 32 * 96, 128 * 32 * (48 + 2 * 24), 128 * 32 * 24
    attention = 2 * 2 * 48 * sum(n * (n + 1) // 2 for n in batches[0].order.documents.lengths)
    head = sum(len(batch.loss_rows) for batch in batches) * 32 * 43
    forward = qkv + others + down + attention

    def flops(*trainable: str, factors: Lora | None = None) -> float:
        return step_flops(replace(model, lora=factors), batches, trainable=trainable)

    assert flops("*") == 2 * (4 * 3 * forward + 3 * head)
    assert flops("final_norm.*") == 2 * (4 * forward + 2 * head)
    assert flops("layers.3.*") == 2 * (3 * forward + 3 * forward + 2 * head)
    assert flops("layers.3.ffn.down.weight") == 2 * (4 * forward + down + 2 * head)
    a, b = 128 * 32 * 3 * 2, 128 * 96 * 2  # q, k and v have an A each
    below = 4 * (2 * (others + down) + 3 * attention) + 2 * head
    assert flops("*lora*", factors=Lora(rank=2, match=("*.qkv",))) == 2 * (
        (qkv + 2 * a + 3 * b) + 3 * (2 * qkv + 3 * a + 3 * b) + below
    )
    assert flops("final_norm.*", factors=Lora(rank=2, match=("*.qkv",))) == 2 * (4 * (forward + a + b) + 2 * head)


def test_metrics_append_and_hold_no_nan(tmp_path) -> None:
    for step in (1, 2):
        metrics = Metrics(str(tmp_path))
        metrics.write({"step": step, "loss": math.nan})
        metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]


def raise_missing() -> None:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, and a folder that went away under the run, as TensorBoard's thread tells of it later."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").symlink_to("/dev/full")
    line = "logging.directory='full' cannot be written (No space left on device). Once it can, the same command goes on"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnimegaError) as caught:
        Metrics("full").write({"step": 1})
    assert str(caught.value).startswith(line)
    config = config_cases.run(config_cases.base(logging={"directory": "gone"}))
    board = Trackers(config, step=0)
    monkeypatch.setattr(board._board, "flush", raise_missing)
    with pytest.raises(UnimegaError, match=r"logging\.directory='gone' cannot be written"):
        board.sync()
    Path("checkpoints").mkdir()
    Path("checkpoints/run.tmp").symlink_to("/dev/full")
    with pytest.raises(UnimegaError, match=r"checkpoint\.directory='checkpoints' cannot be written"):
        start.write_run(config_cases.run(config_cases.base(checkpoint={"directory": "checkpoints"})))


def test_a_modality_without_a_loss_is_null() -> None:
    found = modality_losses(("text", "vision", "audio"), (0.0, 6.0, 0.0), (5, 3, 0), (0.0, 4.0, 1.0))
    assert found == {"loss_text": None, "loss_vision": 2.0, "loss_audio": None}


def test_pauses_belong_to_no_step() -> None:
    times = iter([0.0, 10.0, 10.0, 110.0, 114.0, 114.0])
    clock = Clock(now=lambda: next(times))
    assert clock.lap(5) == 2.0
    with clock.paused():
        pass
    assert clock.lap(9) == 1.0
    assert clock.left(9, 18) == 114.0


def test_the_clock_of_a_resumed_run_counts_its_own_steps() -> None:
    times = iter([0.0, 4.0, 4.0])
    clock = Clock(100, now=lambda: next(times))
    assert clock.lap(102) == 2.0
    assert clock.left(102, 112) == 20.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run on a small corpus whose tokenizer names the vision ids, in an empty folder."""
    config_cases.enter_empty_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(loop.log, "setup", lambda **_: None)  # it would keep records from pytest's own handler
    write(tmp_path / "a", random_documents(40, 1))
    data = {"train": [{"path": "a"}], "window_tokens": 4096, "templates": "none"}
    return config_cases.run(config_cases.base(model={"vision_offset": TEXT, "codebook": CODEBOOK}, data=data))


def refusal(run: RunConfig, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        loop.train(run)
    assert not dist.is_initialized() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("section", ["checkpoint", "logging"])
def test_a_folder_that_cannot_be_made(section: str, run: RunConfig) -> None:
    Path("file").touch()
    for name, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        changed = replace(run, **{section: replace(getattr(run, section), directory=name)})
        line = f"{section}.directory={name!r} is no folder that can be written ({reason}). Name another one."
        assert refusal(changed) == line


def test_the_records_of_another_run_are_not_touched(run: RunConfig) -> None:
    folder = Path(run.logging.directory)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    line = f"logging.directory={str(folder)!r} holds metrics.jsonl of another run than checkpoint.directory="
    assert refusal(run) == line + f"{run.checkpoint.directory!r}. Name another directory, or remove this one."
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


def resumed(run: RunConfig, **changes: dict[str, object]) -> RunConfig:
    """A run whose folders hold a step of ``run``, with keys changed."""
    folder = Path(run.checkpoint.directory)
    (folder / "step-00000003").mkdir(parents=True, exist_ok=True)
    start.write_run(run)
    for section, keys in changes.items():
        run = replace(run, **{section: replace(getattr(run, section), **keys)})
    return run


@pytest.mark.parametrize(
    "section, keys, line",
    [
        ("model", {"norm_eps": 1e-5}, "model.norm_eps was 1e-06, is 1e-05"),
        ("data", {"seed": 2}, "data.seed was 1, is 2"),
        ("data", {"pack_length": 192}, "data.pack_length was 96, is 192"),
        ("data", {"train": (Source(path="b"),)}, 'data.train was [{"path": "a", "weight": 1.0'),
        ("training", {"trainable": ("*_vision",)}, 'training.trainable was ["*"], is ["*_vision"]'),
    ],
)
def test_what_may_not_change_in_the_middle_of_a_run(section: str, keys: dict, line: str, run: RunConfig) -> None:
    told = refusal(resumed(loop.resolved(run), **{section: keys}))
    assert told.startswith(f"{run.checkpoint.directory}/run.json: {line}")
    before = (Path(run.checkpoint.directory) / "run.json").read_text()
    assert json.loads(before) == json.loads(json.dumps(asdict(loop.resolved(run))))


def test_what_may_change_is_logged(run: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "unimega")
    run = loop.resolved(run)
    Path("moved").mkdir()
    moved = (replace(run.data.train[0], path="moved/a"),)
    start.check_before(
        resumed(run, optimizer={"lr": 2e-4}, training={"steps": 40}, data={"train": moved, "evaluation": ("a",)})
    )
    (line,) = caplog.messages
    assert line.endswith(
        'data.evaluation was [], is ["a"]; optimizer.lr was 0.0001, is 0.0002; training.steps was 20, is 40'
    )
    caplog.clear()
    start.check_before(resumed(run, data={"seed": 2, "allow_change": True}))
    assert caplog.messages[0].startswith("data.seed was 1, is 2: from here on the order is another one")


def test_a_damaged_run_file_is_told_and_left(run: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    changed = resumed(run, data={"seed": 2})
    (Path(run.checkpoint.directory) / "run.json").write_text('{"model": ')
    start.check_before(changed)
    assert "cannot be read" in caplog.text


def test_records_that_come_again_are_dropped_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert drop_after(tmp_path, 3) == 0 and not file.exists()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    lines.insert(3, json.dumps({"step": 3, "evaluation/a/loss_text": 1.0}))
    file.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    assert drop_after(tmp_path, 5) == 1
    inode = file.stat().st_ino
    assert drop_after(tmp_path, 5) == 0 and file.stat().st_ino == inode
    assert drop_after(tmp_path, 3) == 2
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 3]
    file.write_text('{"step": 1}\n{"step": 2, "lo{"step": 2}\nnull\n{"step": 3}\n')
    assert drop_after(tmp_path, 3) == 2 and len(file.read_text().splitlines()) == 2
    assert drop_after(tmp_path, 0) == 2 and file.read_text() == ""
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_refused_before_ranks_meet_leaves_no_folder(run: RunConfig) -> None:
    here = sorted(Path().iterdir())
    data = replace(run.data, evaluation=("nowhere",))
    assert "nowhere" in refusal(replace(run, data=data), DataError)
    nothing = replace(run, data=replace(run.data, train=(Source(path="nowhere"),)))  # not even opened
    for kernels, line in (
        ({"swigluu": "reference"}, "kernels.swigluu is not an op. Choose from: adamw, "),
        ({"swiglu": "tritonn"}, "kernels.swiglu='tritonn' is not an implementation. "),
        ({"swiglu": "npu"}, "kernels.swiglu='npu' cannot run on "),
    ):
        assert refusal(replace(nothing, kernels=kernels), KernelUnavailable).startswith(line)
    assert sorted(Path().iterdir()) == here


def test_vision_ids_of_the_tokenizer_are_kept_in_the_run(run: RunConfig) -> None:
    assert run.model.vision_ids is None
    resolved = loop.resolved(run)
    assert resolved.model.vision_ids == (BOI,)
    plan, evaluations = loop.plans(resolved)
    assert plan.vocabulary == VOCABULARY and not evaluations


def test_every_key_of_the_data_reaches_the_plan(run: RunConfig) -> None:
    data = replace(run.data, overlong="drop", evaluation=("a",))
    plan, evaluations = loop.plans(loop.resolved(replace(run, data=data)))
    assert plan.recipe == Recipe(
        **{k: v for k, v in asdict(data).items() if k not in ("train", "evaluation", "allow_change")}
    )
    assert plan.recipe.overlong == "drop" and list(evaluations) == ["a"]
    training = replace(run.training, evaluate_every_steps=0)
    assert not loop.plans(loop.resolved(replace(run, data=data, training=training)))[1]
