"""Prompts that are added at load time: TOML files, ours or the user's."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimega.data.format import Ids
from unimega.data.tokenize import TextTokenizer
from unimega.errors import ConfigError

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Templates:
    """Tokenised prompts; an empty list: nothing is added there. One of a list is drawn wherever it is used."""

    t2i: tuple[Ids, ...] = ()
    """Between the caption and the image of a T2I document."""
    i2t: tuple[Ids, ...] = ()
    """Between the image and the caption of an I2T document."""
    describe: tuple[Ids, ...] = ()
    """In place of a question that an image came without."""
    turn: tuple[Ids, ...] = ()
    """Before each turn of a conversation but its first."""


def load(name: str, tokenizer: TextTokenizer | None) -> Templates:
    """The prompts called ``none``, ``default``, ``chinese`` or lying in a TOML file of that path.

    Raises:
        ConfigError: no such file, unknown keys, a prompt that would melt into its neighbours, or no tokenizer.
    """
    if name == "none":
        return Templates()
    path = _FOLDER / f"{name}.toml" if "/" not in name and not name.endswith(".toml") else Path(name)
    shipped = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.toml")))
    if not path.is_file():
        raise ConfigError(
            f"data.templates='{name}' is wrong. There is no such file. Use none, {shipped}, or the path of a TOML file."
        )
    if tokenizer is None:
        raise ConfigError(
            f"data.templates='{name}' has to be tokenised, but data.tokenizer is absent and the folder that the corpus "
            "records is not there. Name the tokenizer's folder."
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not TOML ({error}).") from error
    if unknown := sorted(set(values) - set(_KEYS)):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}. Known: {', '.join(_KEYS)} (lists of strings).")
    return Templates(**{key: _encoded(path, values.get(key, []), tokenizer) for key in _KEYS})


_KEYS = tuple(Templates.__dataclass_fields__)


def _encoded(path: Path, texts: Any, tokenizer: TextTokenizer) -> tuple[Ids, ...]:
    """A string or a list of them, tokenised one by one: stored texts are tokenised alone as well."""
    texts = texts if isinstance(texts, list) else [texts]
    for text in texts:
        if not isinstance(text, str) or not text[:1].isspace():
            raise ConfigError(
                f"{path}: {text!r} is not a prompt. It must be a string that starts with a space or newline, "
                "else its letters melt into those before it."
            )
    return tuple(tokenizer.encode(texts)) if texts else ()
