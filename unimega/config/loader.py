"""A run from its files and command line.

Precedence: defaults < a Hugging Face config.json < files left to right < ``--section.key value``.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from unimega.config import hf_config, reference, rules, strict
from unimega.config.schema import ModelConfig, RunConfig
from unimega.errors import ConfigError

COMMAND_LINE = "command line"
USAGE = "Give --config RUN.toml, then --section.key value; --help lists every key."


def load_run(argv: Sequence[str]) -> RunConfig:
    """The run that a command line describes, resolved and checked against the number of ranks.

    ``--help`` prints every key and exits.

    Raises:
        ConfigError: one line that names the file or option, the key, what is wrong and what to do.
    """
    if not argv:
        raise ConfigError(f"no configuration. {USAGE}")
    if "--help" in argv or "-h" in argv:
        reference.print_help()
        raise SystemExit(0)
    files, options = split_arguments(argv)
    values: dict[str, Any] = {}
    for file in files:
        values = strict.merge(values, strict.partial(RunConfig, read_file(file), where=file))
    values = strict.merge(values, override(RunConfig, options))
    config = resolve(values, where=files[-1] if files else COMMAND_LINE)
    rules.check(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    return config


def resolve(values: Mapping[str, Any], *, where: str) -> RunConfig:
    """Fill in what a Hugging Face folder and the defaults give; ``values`` have passed ``strict.partial``."""
    model = values.get("model", {})
    path = model.get("hf_config", "")
    if path and (hf_config.KEYS | hf_config.EXPERT_KEYS) - model.keys():
        file = os.path.join(path, "config.json") if os.path.isdir(path) else path
        implied = hf_config.model_keys(read_file(file, key="model.hf_config", is_json=True), where=file)
        model = strict.merge(strict.partial(ModelConfig, implied, prefix="model.", where=file), model)
    return strict.construct(RunConfig, {**values, "model": model}, where=where)


def dump(config: RunConfig) -> dict[str, Any]:
    """Every key of the resolved run as plain JSON values; ``from_dict`` gives an equal run back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def from_dict(values: Mapping[str, Any], *, where: str = "stored run") -> RunConfig:
    """Inverse of ``dump``, as strict as the loader of files; does not read ``hf_config`` again."""
    return strict.construct(RunConfig, strict.partial(RunConfig, values, where=where), where=where)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Config files, and the words after every other option by its name; the last of equal options wins."""
    files: list[str] = []
    options: dict[str, list[str]] = {}
    words: list[str] | None = None
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            words = files if name == "config" else options.setdefault(name, [])
            if name != "config":
                words.clear()
            words += [value] if equals else []
        elif words is None:
            raise ConfigError(f"{COMMAND_LINE}: unexpected {argument!r}. {USAGE}")
        else:
            words.append(argument)
    if not files and any(argument == "--config" for argument in argv):
        raise ConfigError(f"{COMMAND_LINE}: --config wants at least one file.")
    return files, options


def read_file(file: str, *, key: str = "--config", is_json: bool = False) -> dict[str, Any]:
    """Parse a TOML file, or a JSON file such as a stored run.

    Args:
        key: what named the file, for errors.
        is_json: whatever it is called.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}). {key} wants a file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start}). {key} wants a text file.") from None
    is_json = is_json or file.endswith(".json")
    try:
        values = json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file}: not valid {'JSON' if is_json else 'TOML'}: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: wants a table of sections, found {type(values).__name__}.")
    return values


def override(cls: type[Any], options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Check ``--section.key value`` options against a dataclass of sections; as strict as the loader of files.

    A list is words (``--parallel.layout 1 2 0 1``) or one word in TOML or JSON, a table one word, a bool true or false.

    Returns:
        Partial values for ``strict.merge`` and ``resolve``.
    """
    values: dict[str, Any] = {}
    for name, words in options.items():
        want = _wanted(cls, name)
        if not words and want is not None:
            raise ConfigError(f"{COMMAND_LINE}: --{name} wants a value: {strict.describe(want)}.")
        value: Any = parse_words(words, want) if words else None
        for part in reversed(name.split(".")):
            value = {part: value}
        values = strict.merge(values, strict.partial(cls, value, where=COMMAND_LINE))
    return values


def parse_words(words: Sequence[str], want: Any) -> Any:
    """Words of a command line as the value that a file would hold; what does not parse stays text, for ``coerce``."""
    origin, args = get_origin(want), get_args(want)
    single = words[0] if len(words) == 1 else None
    if origin in (Union, UnionType):
        return _parse_union(words, args)
    if single and single[0] in "[{" and (origin in (tuple, dict) or is_dataclass(want)):
        return _inline(single)
    if origin is tuple:
        return [parse_words([word], args[0]) for word in words]
    if single is None:
        return list(words)
    if want is bool:
        return {"true": True, "false": False}.get(single.lower(), single)
    if want is int and re.fullmatch(r"[+-]?\d+", single):
        return int(single)
    if want is float:
        try:
            return float(single)
        except ValueError:
            return single
    return single


def _parse_union(words: Sequence[str], options: Sequence[Any]) -> Any:
    if type(None) in options and list(words) == ["none"]:
        return None
    for option in options:
        if get_origin(option) is Literal and len(words) == 1 and words[0] in get_args(option):
            return words[0]
    return parse_words(words, [option for option in options if option is not type(None)][-1])


def _inline(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            return text


def _wanted(cls: type[Any], name: str) -> Any:
    """Type of a dotted key; None where there is none, which ``strict.partial`` then reports."""
    want: Any = cls
    for part in name.split("."):
        if is_dataclass(want):
            want = strict.types_of(want).get(part)  # type: ignore[arg-type]
        elif get_origin(want) is dict:
            want = get_args(want)[1]
        else:
            return None
    return want
