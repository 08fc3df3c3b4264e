"""What a stock Qwen folder becomes when it starts a model with images: its ``[model]``, layers and rows. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimega.config import expert_keys, model_rules
from unimega.config.presets import model_spec
from unimega.config.schema import ModelConfig
from unimega.config.strict import partial
from unimega.data.tokenize import TextTokenizer, locate
from unimega.errors import CheckpointError, ConfigError
from unimega.hf.folder import in_its_words
from unimega.hf.layout import Layout
from unimega.hf.read import Source, describe

KEYS = (
    "preset",
    "encode_layers",
    "decode_layers",
    "skip_from",
    "vision_ffn_width",
    "shared_ffn_width",
    "split_every",
    "output_projection",
    "vision_offset",
    "codebook",
    "vocabulary_rows",
    "vision_ids",
    "init_vision",
)
"""Keys of ``[model]`` that a start may be asked for; all others are the folder's."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model with images, and how it comes out of one of text."""

    source: Source
    """The new model. Its config.json is the old one."""
    base: Source
    """What the folder holds."""
    copies_text: bool
    """Weights of vision start as those of text; else they are drawn."""
    kept_rows: int
    """Rows of embedding and head that are copied; later ones are the mean of those in use."""
    rows_in_use: int
    """Rows that the tokenizer has ids for: those behind were never trained."""
    vision_start: int | None
    """Id of ``<|vision_start|>``, if the tokenizer is known and has one."""


def describe_start(
    config: Mapping[str, Any],
    *,
    folder: Path,
    keys: Mapping[str, Any],
    tokenizer: Path | None,
    separator_ids: Sequence[int] | None = None,
) -> Start:
    """Plan the start.

    Args:
        config: the folder's config.json.
        folder: where it lies.
        keys: those of ``KEYS`` that are given.
        tokenizer: folder of the tokenizer; None: not known, all rows count as used.
        separator_ids: separators, which are vision beside ``<|vision_start|>``.

    Raises:
        CheckpointError: the folder has images already, or codes do not fit behind its ids.
        ConfigError: keys that are wrong or at odds with each other or with the folder.
        DataError: the tokenizer cannot be used.
    """
    base = describe(config, folder=folder)
    if base.layout.family not in ("qwen", "mixtral", "unimoe"):
        raise CheckpointError(
            f"--preset={keys['preset']!r}: {str(folder)!r} holds a {base.architecture}, split already. "
            "Leave out --preset and what belongs to it."
        )
    _check_experts(base, str(keys["preset"]))
    known = TextTokenizer(tokenizer) if tokenizer else None
    vocabulary = _vocabulary(base, keys, known)
    vocabulary["vision_ids"] = _vision_ids(base, keys, known, separator_ids)
    given = {name: value for name, value in keys.items() if value is not None}
    try:
        model = replace(base.model, **partial(ModelConfig, given | vocabulary, where="command line"))
        model_rules.check(model)
    except ConfigError as error:
        raise ConfigError(_as_options(str(error), config)) from error
    copies_text = model.init_vision == "text"
    model = replace(model, init_vision="random")  # of a run without a checkpoint to start from
    text_rows, old_rows = base.model.vision_offset, base.spec.vocabulary.rows
    layout = base.layout if model.preset in expert_keys.PRESETS else _layout(model)
    source = Source(model=model, spec=model_spec(model), layout=layout, architecture=base.architecture)
    return Start(
        source=source,
        base=base,
        copies_text=copies_text,
        kept_rows=old_rows if base.model.codebook else min(old_rows, model.vision_offset),
        rows_in_use=min(text_rows, model.vision_offset, known.size if known else text_rows),
        vision_start=known.special.vision_start if known else None,
    )


def _check_experts(base: Source, preset: str) -> None:
    """Routed experts neither come nor go."""
    has, wants = (name in expert_keys.PRESETS for name in (base.model.preset, preset))
    if wants and not has:
        raise CheckpointError(
            f"--preset={preset!r}: a {base.architecture} has no routed experts. "
            "Import it with --preset dense, then make experts of its FFNs with tools/upcycle.py."
        )
    if has and not wants:
        raise CheckpointError(f"--preset={preset!r}: a {base.architecture} has routed experts. Use --preset moe.")


def _as_options(text: str, config: Mapping[str, Any]) -> str:
    """A line about keys of ``[model]`` in the words of the command, or of config.json where they are not asked for."""

    def name(found: re.Match[str]) -> str:
        if found[1] in KEYS:
            return f"--{found[1].replace('_', '-')}"
        return in_its_words(found[0], config, of="config.json's ")

    text = re.sub(r"\bmodel\.(\w+)", name, text)
    return text.replace(": set it in [model].", ".")


def find_tokenizer(folder: Path, named: Path | None) -> Path | None:
    """The folder whose tokenizer.json belongs to the model: the one named, or the model's own; None: neither.

    Raises:
        CheckpointError: the one named holds no tokenizer.
    """
    if named is not None and locate(named) is None:
        raise CheckpointError(
            f"--tokenizer={str(named)!r} holds no tokenizer.json and no sentencepiece model. Name a folder that does."
        )
    return named or (folder if (folder / "tokenizer.json").is_file() else None)


def _vocabulary(base: Source, keys: Mapping[str, Any], tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Where codes lie: behind the rows of the folder, unless it has codes or another place is asked for."""
    model, codes = base.model, keys.get("codebook")
    if model.codebook:
        for name in ("codebook", "vision_offset", "vocabulary_rows"):
            if keys.get(name) not in (None, getattr(model, name)):
                raise CheckpointError(
                    f"--{name.replace('_', '-')}={keys[name]}: the folder has codes already, with {name}="
                    f"{getattr(model, name)}. Leave the option out."
                )
        return {"codebook": model.codebook}
    if not codes:
        found = " is missing" if codes is None else "=0 leaves nothing to learn for vision"
        raise CheckpointError(f"--codebook{found}. Give the number of VQ codes, e.g. --codebook 8192.")
    size = tokenizer.size if tokenizer else 0
    offset = keys.get("vision_offset")
    if offset is None:
        offset = max(model.vision_offset, size)
    if offset < size:
        raise CheckpointError(
            f"--vision-offset={offset}: the tokenizer has ids up to {size - 1}, which would be codes. "
            f"Give at least {size}."
        )
    return {"codebook": codes, "vision_offset": offset, "vocabulary_rows": keys.get("vocabulary_rows")}


def _vision_ids(
    base: Source, keys: Mapping[str, Any], tokenizer: TextTokenizer | None, separators: Sequence[int] | None
) -> tuple[int, ...] | None:
    """``<|vision_start|>`` and separators; None: the run's tokenizer tells."""
    ids = keys.get("vision_ids")
    if ids is None and base.model.codebook:
        ids = base.model.vision_ids
    if ids is None and tokenizer and tokenizer.special.vision_start is not None:
        ids = (tokenizer.special.vision_start,)
    if separators is None:
        return None if ids is None else tuple(ids)
    if ids is None:
        raise CheckpointError(
            "--separator-ids: no tokenizer tells the id of <|vision_start|>, which is vision too. "
            "Give all ids with --vision-ids, or --tokenizer."
        )
    return tuple(sorted({*ids, *separators}))


def _layout(model: ModelConfig) -> Layout:
    """The original names of such layers, for gradients and exports."""
    if model.preset in ("unix", "share"):
        return Layout(family="x", encode=model.encode_layers or 0)
    return {"dense": Layout(family="qwen"), "moe_hard": Layout(family="moe"), "mot": Layout(family="mot")}[model.preset]
