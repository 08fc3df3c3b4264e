"""Whether the corpora of a run go together, and with its model and tokenizer."""

from collections.abc import Sequence

from unimega.config.vocabulary import Vocabulary
from unimega.data.corpus import Corpus
from unimega.data.tokenize import SpecialIds, TextTokenizer
from unimega.errors import ConfigError, DataError


def names(corpora: Sequence[Corpus]) -> None:
    """Refuse equal names.

    Raises:
        ConfigError: two corpora of one name.
    """
    seen: dict[str, Corpus] = {}
    for corpus in corpora:
        if corpus.name in seen:
            raise ConfigError(
                f"data.train: '{seen[corpus.name].source.path}' and '{corpus.source.path}' are both named "
                f"'{corpus.name}'. The name seeds the order; rename one."
            )
        seen[corpus.name] = corpus


def special_ids(corpora: Sequence[Corpus], vocabulary: Vocabulary, tokenizer: TextTokenizer | None) -> SpecialIds:
    """Compare what the corpora were made with to each other and to the model; returns their special ids.

    Raises:
        ConfigError: nothing names eos.
        DataError: a corpus was made for another tokenizer or vocabulary.
    """
    special = tokenizer.special if tokenizer else None
    print_of, origin = (tokenizer.sha256, "data.tokenizer") if tokenizer else (None, "")
    offset = vocabulary.starts[1] if len(vocabulary.starts) > 1 else vocabulary.rows
    for corpus in corpora:
        if corpus.special is None or corpus.vocabulary is None:
            continue
        path = corpus.reader.sidecar_path
        if print_of is not None and corpus.fingerprint != print_of:
            raise DataError(
                f"{path}: made with tokenizer {str(corpus.fingerprint)[:12]}, {origin} has {print_of[:12]}. "
                "All corpora of a run need one tokenizer."
            )
        print_of, origin = corpus.fingerprint, corpus.name
        special = special or corpus.special
        size = int(corpus.vocabulary["size"])
        if size > offset:
            raise DataError(f"{path}: its tokenizer has {size} ids, model.vision_offset is {offset}. Raise it.")
        if corpus.has_images:
            codes = vocabulary.codes[1] if len(vocabulary.codes) > 1 else 0
            if corpus.vocabulary["codebook"] != codes:
                raise DataError(
                    f"{path}: codebook {corpus.vocabulary['codebook']}, model.codebook is {codes}. They must be equal."
                )
            if special.vision_start is None or special.vision_end is None:
                raise DataError(
                    f"{path}: holds images, but its tokenizer has no <|vision_start|> or no <|vision_end|>. "
                    "Write the corpus again with a tokenizer that has both."
                )
    if special is None:
        raise ConfigError(
            "data.tokenizer is absent, and no corpus has a sidecar that names eos. Name the tokenizer's folder."
        )
    return special
