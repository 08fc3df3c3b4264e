"""Records of routed experts: what they say, and the picture that is drawn of them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import models
from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.errors import UnimegaError
from unimega.moe.statistics import Statistics
from unimega.training import expert_charts
from unimega.training.expert_metrics import expert_record
from unimega.training.metrics import Metrics

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot_experts.py"
EXPERTS = ExpertSpec(number=4, width=8, top_k=2, sets=((0, 1, 2), (0, 1, 2, 3)))
SPEC = models.spec((LayerSpec(experts=EXPERTS), LayerSpec(shared_ffn=8), LayerSpec(experts=EXPERTS)))


def seen(text: list[int], vision: list[int], **rest: Any) -> Statistics:
    slots = torch.tensor([text, vision])
    tokens = tuple((slots.sum(1) // 2).tolist())
    values = {"dropped": [0, 0], "entropy": [2.0, 3.0], "balance": 20.0, "z_loss": 5.0} | rest
    return Statistics(tokens, slots, **{key: torch.tensor(value) for key, value in values.items()})


def test_a_record() -> None:
    record = expert_record(
        SPEC, {2: seen([12, 0, 0, 0], [0, 0, 0, 0]), 0: seen([2, 2, 8, 0], [4, 4, 4, 4], dropped=[3, 8])}
    )
    assert record["moe_layers"] == [0, 2]
    assert record["moe_load_text"] == [[0.5, 0.5, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]]  # 3 experts are open to text
    assert record["moe_load_vision"] == [[1.0, 1.0, 1.0, 1.0], None]
    assert record["moe_entropy_text"] == [0.3333, 0.3333] and record["moe_entropy_vision"] == [0.375, None]
    assert record["moe_dropped_text"] == [0.25, 0.0] and record["moe_dropped_vision"] == [0.5, None]
    assert record["moe_load_max"] == 4.0 and record["moe_dropped"] == 0.275
    assert record["moe_entropy"] == pytest.approx((5 / 14 + 5 / 6) / 2, rel=1e-3)
    assert record["moe_balance_loss"] == pytest.approx((20 / 14 + 20 / 6) / 2, rel=1e-3)
    assert record["moe_z_loss"] == pytest.approx((5 / 14 + 5 / 6) / 2, rel=1e-3)
    assert expert_record(SPEC, {}) == {}


def test_no_number_is_null(tmp_path: Path) -> None:
    record = expert_record(SPEC, {0: seen([2, 2, 8, 0], [0, 0, 0, 0], entropy=[math.nan, 0.0], z_loss=math.inf)})
    assert record["moe_entropy_text"] == [None] and record["moe_z_loss"] is None
    sink = Metrics(str(tmp_path))
    sink.write({"step": 1} | record)
    sink.close()
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


def write_run(folder: Path, steps: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sink = Metrics(str(folder))
    for step in range(1, steps + 1):
        text = [12 - step, step, 12, 0]
        record = expert_record(SPEC, {0: seen(text, [0, 0, 0, 0]), 2: seen([8, 8, 8, 0], [4, 4, 8, 8])})
        sink.write({"step": 10 * step, "loss": 1.0} | record)
        sink.write({"step": 10 * step, "evaluation/a/loss_text": 1.0})
    sink.close()
    return folder / "metrics.jsonl"


def test_the_history_of_a_run(tmp_path: Path) -> None:
    file = write_run(tmp_path / "logs")
    with file.open("a") as torn:
        torn.write('{"step": 60, "moe_la')
    for place in (tmp_path, tmp_path / "logs", file):
        assert expert_charts.find(place) == file
    history = expert_charts.read(file)
    assert history.steps.tolist() == [10, 20, 30, 40, 50] and history.layers == (0, 2)
    assert history.load["text"].shape == (5, 2, 4) and history.load["text"][1, 0].tolist() == [1.25, 0.25, 1.5, 0.0]
    vision = history.load["vision"]
    assert np.isnan(vision[:, 0]).all() and vision[4, 1, 3] == pytest.approx(4 / 3, 1e-3)
    assert history.entropy["text"].shape == (5, 2) and np.isnan(history.dropped["vision"][:, 0]).all()
    assert expert_charts.read(file, layers=[2]).load["text"].shape == (5, 1, 4)


@pytest.mark.parametrize("steps", [1, 5, expert_charts.MOST_COLUMNS + 7])
def test_a_picture(tmp_path: Path, steps: int) -> None:
    history = expert_charts.read(write_run(tmp_path, steps))
    expert_charts.write_charts(tmp_path / "a.png", history, title="a $ b")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "metrics.jsonl"]


ONE = '{"step": 1, "moe_layers": [0], "moe_load_text": [%s], "moe_entropy_text": [1], "moe_dropped_text": [0]}'


@pytest.mark.parametrize(
    ("content", "say"),
    [
        ('{"step": 1}\n', "no record tells of routed experts"),
        ('{"step": 1}\nhello\n{"step": 2}\n', ":2: is no record of metrics"),
        ('{"step": 1, "moe_layers": [0], "moe_load_text": [[1, 1]]}\n', "do not fit together"),
        (f"{ONE % '[1, 1]'}\n{ONE % '[1]'}\n", "do not fit together"),
        ('{"step": 1, "moe_layers": [0], "moe_load_max": 1}\n', "no record has moe_load_MODALITY"),
        ('{"step": 1, "moe_layers": 3}\n', "moe_layers=3 is no list of layers"),
        ("", "no record tells of routed experts"),
    ],
    ids=["dense", "text", "missing", "unequal", "no loads", "no layers", "empty"],
)
def test_files_that_are_refused(tmp_path: Path, content: str, say: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(content)
    with pytest.raises(UnimegaError, match=say):
        expert_charts.read(file)


def test_the_tool(tmp_path: Path) -> None:
    write_run(tmp_path / "logs")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False)

    done = run(str(tmp_path))
    assert done.returncode == 0 and "2 layers, 5 records of steps 10 to 50" in done.stdout, done.stderr
    assert (tmp_path / "logs" / "experts.png").exists()
    done = run(str(tmp_path / "none"))
    assert done.returncode == 2 and "no such file or folder" in done.stderr and done.stderr.count("\n") == 1


def test_what_the_tool_refuses(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    with pytest.raises(UnimegaError, match="holds no"):
        expert_charts.find(tmp_path.parent)
    with pytest.raises(UnimegaError, match=r"layer 1 has no routed experts. Those have: 0, 2\."):
        expert_charts.read(file, layers=[1])
    history = expert_charts.read(file)
    for output, say in (("a.gif", "ends in none of"), ("no/a.png", "cannot be written")):
        with pytest.raises(UnimegaError, match=say):
            expert_charts.write_charts(tmp_path / output, history, title="")
