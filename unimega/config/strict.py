"""From plain values to dataclasses, strictly: unknown keys and wrong types are one-line errors."""

import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unimega.errors import ConfigError

T = TypeVar("T")
WORDS = {bool: "true or false", int: "int", float: "float", str: "str", type(None): "nothing"}


def types_of(cls: type[Any]) -> dict[str, Any]:
    """Type of each field of a dataclass."""
    return get_type_hints(cls)


def dotted(cls: type[Any], *, prefix: str = "") -> list[str]:
    """Every key below a dataclass, tables before their own keys."""
    keys = []
    for name, want in types_of(cls).items():
        keys.append(prefix + name)
        if is_dataclass(want):
            keys += dotted(want, prefix=f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def describe(want: Any) -> str:
    """A type in the words of an error message."""
    origin, args = get_origin(want), get_args(want)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args if option is not type(None))
    if origin is tuple:
        item = "tables" if is_dataclass(args[0]) else describe(args[0])
        return f"a list of {item}" if args[1] is ... else f"a list of {len(args)} {item}"
    if origin is dict or is_dataclass(want):
        return "a table"
    return WORDS[want]


def coerce(value: Any, want: Any, *, key: str, where: str) -> Any:
    """The value as the type that is wanted: ints pass for floats and lists for tuples, nothing else is converted.

    Raises:
        ConfigError: it is of another type, or not among the choices.
    """
    origin, args = get_origin(want), get_args(want)
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, args, want, key=key, where=where)
    if origin is tuple and isinstance(value, list | tuple):
        wants = args[:1] * len(value) if args[1] is ... else args
        if len(wants) == len(value):
            return tuple(
                coerce(item, one, key=f"{key}[{i}]", where=where)
                for i, (item, one) in enumerate(zip(value, wants, strict=True))
            )
    elif origin is dict and isinstance(value, Mapping):
        return {str(name): coerce(item, args[1], key=f"{key}.{name}", where=where) for name, item in value.items()}
    elif is_dataclass(want) and isinstance(value, Mapping):
        checked = partial(want, value, prefix=f"{key}.", where=where)  # type: ignore[arg-type]
        return construct(want, checked, prefix=f"{key}.", where=where)  # type: ignore[arg-type]
    elif origin is Literal and isinstance(value, str) and value in args:
        return value
    elif want is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif want in (bool, int, str) and type(value) is want:
        return value
    raise _wrong_type(value, want, key=key, where=where)


def partial(
    cls: type[Any], values: Mapping[str, Any], *, prefix: str = "", where: str, known: Sequence[str] = ()
) -> dict[str, Any]:
    """Check some of the keys of a dataclass, without asking for the rest.

    Args:
        known: dotted keys of the whole run, for suggestions.

    Returns:
        The values as ``construct`` takes them; nested dataclasses are dicts still, so that files can be merged.
    """
    checked: dict[str, Any] = {}
    wanted = types_of(cls)
    known = known or dotted(cls, prefix=prefix)
    for name, value in values.items():
        key = prefix + name
        if name not in wanted:
            raise ConfigError(f"{where}: unknown key {key!r}. {_suggest(key, known, prefix=prefix, names=wanted)}")
        want = wanted[name]
        if is_dataclass(want):
            if not isinstance(value, Mapping):
                raise _wrong_type(value, want, key=key, where=where)
            checked[name] = partial(want, value, prefix=f"{key}.", where=where, known=known)  # type: ignore[arg-type]
        else:
            checked[name] = coerce(value, want, key=key, where=where)
    return checked


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key, the second one wins; lists are replaced."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def construct(cls: type[T], values: Mapping[str, Any], *, prefix: str = "", where: str) -> T:
    """Build a dataclass, and those inside it, from checked values.

    Raises:
        ConfigError: a key without a default is missing.
    """
    made: dict[str, Any] = {}
    for one in fields(cls):  # type: ignore[arg-type]
        want = types_of(cls)[one.name]
        key = prefix + one.name
        if is_dataclass(want):
            made[one.name] = construct(want, values.get(one.name, {}), prefix=f"{key}.", where=where)  # type: ignore[arg-type]
        elif one.name in values:
            made[one.name] = values[one.name]
        elif _is_required(one):
            raise ConfigError(f"{where}: {key!r} is missing. {_how_to_give(key)}")
    return cls(**made)


def _how_to_give(key: str) -> str:
    if key.startswith("model.") and key not in ("model.preset", "model.codebook"):
        return f"Set it in [model], or name a Hugging Face config.json in model.hf_config (--{key} works too)."
    if "[" in key:
        return "Every table of the list needs it."
    section = key.split(".")[0]
    return f"Set it in [{section}] of a --config file, or with --{key}."


def _first_that_fits(value: Any, options: Sequence[Any], want: Any, *, key: str, where: str) -> Any:
    present = [option for option in options if option is not type(None)]
    if value is None and len(present) < len(options):
        return None
    if len(present) == 1 and isinstance(value, Mapping) and get_origin(present[0]) is dict:
        return coerce(value, present[0], key=key, where=where)  # its complaint names the entry
    for option in present:
        try:
            return coerce(value, option, key=key, where=where)
        except ConfigError:
            continue
    raise _wrong_type(value, want, key=key, where=where)


def _is_required(one: "Field[Any]") -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _wrong_type(value: Any, want: Any, *, key: str, where: str) -> ConfigError:
    found = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return ConfigError(f"{where}: {key!r} wants {describe(want)}, found {found} ({type(value).__name__}).")


def _suggest(key: str, known: Sequence[str], *, prefix: str, names: Mapping[str, Any]) -> str:
    """The known key that was most likely meant: the same name in another section, or the nearest spelling."""
    last = key.removeprefix(prefix)

    def likeness(candidate: str) -> float:
        section, _, name = candidate.rpartition(".")
        away = 0.0 if section == prefix[:-1] else 0.2
        return difflib.SequenceMatcher(None, last, name).ratio() - away

    best = max(known, key=likeness)
    if likeness(best) >= 0.55:
        return f"Did you mean {best!r}?"
    table = f"[{prefix[:-1]}]" if prefix else "a run file"
    return f"Keys of {table}: {', '.join(names)}."
