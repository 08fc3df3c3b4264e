"""Whole runs of ``training.loop`` in worlds of the harness, on a corpus of 40 random documents, in a second each."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit import config_cases, data_corpora
from unimega.config import loader
from unimega.config.schema import RunConfig

MODEL = {"num_layers": 2, "encode_layers": 1, "decode_layers": 0, "width": 16, "heads": 2, "kv_heads": 2}
MODEL |= {"head_width": 8, "ffn_width": 16, "vision_offset": data_corpora.TEXT, "codebook": data_corpora.CODEBOOK}


def make(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of 6 steps below a folder, whose corpus is written if it is not there."""
    if not (folder / "a.idx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        data_corpora.write(folder / "a", data_corpora.random_documents(40, 1))
    base = {
        "model": MODEL,
        "data": {"train": [{"path": str(folder / "a")}], "window_tokens": 4096, "templates": "none"},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "training": {"steps": 6, "global_batch_packs": 4, "precision": "fp32"},
        "checkpoint": {"directory": str(folder / "checkpoints"), "every_steps": 0},
        "logging": {"directory": str(folder / "logs"), "every_steps": 1},
    }
    values = config_cases.strict.merge(config_cases.base(**base), sections)
    return loader.from_dict(values)


def train(config: RunConfig, before: Callable[[], None] | None = None) -> str:
    """On a rank: the run; what it told the user if it ended with an error."""
    from unimega.errors import UnimegaError
    from unimega.training import loop

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = ""
    if before is not None:
        before()
    try:
        loop.train(config)
    except UnimegaError as error:
        return str(error)
    return ""


def records(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.logging.directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
