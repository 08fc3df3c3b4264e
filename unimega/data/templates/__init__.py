"""Prompts that are added at load time: TOML files, ours or the user's."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from unimega.data.format import Ids
from unimega.data.tokenize import TextTokenizer
from unimega.errors import ConfigError

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Templates:
    """Tokenised prompts; empty: captions alone."""

    t2i: tuple[Ids, ...] = ()
    """One is drawn for each T2I document and follows the caption."""
    i2t: Ids | None = None
    """Precedes the caption of an I2T document."""


def load(name: str, tokenizer: TextTokenizer | None) -> Templates:
    """The prompts called ``none``, ``default``, ``chinese`` or lying in a TOML file of that path.

    Raises:
        ConfigError: no such file, unknown keys, a prompt that would melt into the caption, or no tokenizer.
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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error}).") from error
    if unknown := sorted(set(values) - {"t2i", "i2t"}):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}. Known: t2i (list of strings), i2t (string).")
    prompts, answer = values.get("t2i", []), values.get("i2t")
    texts = [*prompts, *([answer] if answer is not None else [])] if isinstance(prompts, list) else [prompts]
    for text in texts:
        if not isinstance(text, str) or not text[:1].isspace():
            raise ConfigError(
                f"{path}: {text!r} is not a prompt. It must be a string that starts with a space or newline, "
                "else its letters melt into the caption's."
            )
    encoded = tokenizer.encode(texts)
    return Templates(t2i=tuple(encoded[: len(prompts)]), i2t=encoded[-1] if answer is not None else None)
