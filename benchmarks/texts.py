"""Real text without a download: the sources and documentation that a Python installation holds, and a tokenizer of it.

Files are taken in a fixed shuffled order, each once, and cut at line ends into documents of some 2 KB. Where more is
asked than there is, they come again with their longer words changed, so that a corpus never repeats and keeps having
new words, as real ones do.
"""

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unimega.data.tokenize.words import QWEN2
from unimega.errors import DataError

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".html", ".c")
_ROOTS = (f"{sys.prefix}/lib", f"{sys.base_prefix}/lib", "/usr/share", "/usr/include", "/usr/lib/python3")
_DOCUMENT_CHARACTERS = 2200
_LEAST_BYTES = 1_000_000
_LONG_WORD = re.compile(r"[a-z]{7,}")


def documents() -> Iterator[str]:
    """Without end.

    Raises:
        DataError: this machine holds too little text.
    """
    files = sorted({path for root in _ROOTS for path in _files(root)})
    random.Random(0).shuffle(files)
    for turn in count():
        taken, seen = 0, set()
        for path in files:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
            if digest not in seen and len(text) > 64:
                seen.add(digest)
                taken += len(text)
                for document in _cut(text if turn == 0 else _change(text, turn)):
                    # the Megatron tool gives the special id for such text, which is not a question of speed
                    if not any(special in document for special in SPECIALS):
                        yield document
        if taken < _LEAST_BYTES:
            raise DataError(f"{', '.join(_ROOTS)}: {taken} bytes of text. Install more packages.")


def write(path: Path, source: Iterator[str], num_bytes: int) -> tuple[int, int]:
    """Write jsonl of at least so many bytes of plain text; returns the bytes of text and the documents."""
    written = documents = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            text = next(source)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            documents += 1
    return written, documents


def train(folder: Path, vocabulary: int, num_bytes: int) -> None:
    """A byte-level BPE with the split and NFC of Qwen 2, of the first bytes of the text, with its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_first(num_bytes), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _first(num_bytes: int) -> Iterator[str]:
    taken = 0
    for text in documents():
        yield text
        taken += len(text)
        if taken > num_bytes:
            return


def _files(root: str) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        yield from (os.path.join(folder, name) for name in names if name.endswith(_ENDINGS))


def _cut(text: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size > _DOCUMENT_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _change(text: str, turn: int) -> str:
    """Longer words with two letters exchanged, others in each turn."""

    def exchange(found: re.Match[str]) -> str:
        letters: Sequence[str] = found[0]
        place = 1 + turn % (len(letters) - 3)
        return f"{letters[:place]}{letters[place + 2]}{letters[place]}{letters[place + 1 :]}"

    return _LONG_WORD.sub(exchange, text)
