"""A ``[model]`` as TOML, to start a run from an imported checkpoint. No torch."""

import json
from dataclasses import asdict, fields
from typing import Any

from unimega.config.schema import ModelConfig

_LEFT_OUT = ("hf_config", "init", "init_vision")
"""Keys without a meaning for a run that starts from a checkpoint."""


def model_table(model: ModelConfig) -> str:
    """The lines of the table, for ``--config CHECKPOINT/model.toml RUN.toml`` or to be pasted."""
    values = {one.name: getattr(model, one.name) for one in fields(model) if one.name not in _LEFT_OUT}
    values["lora"] = asdict(model.lora) if model.lora.rank else None  # without factors, the run's to choose
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["[model]", *lines, ""])


def _toml(value: Any) -> str:
    """JSON spells numbers, strings, booleans and flat lists as TOML does."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
