"""Small tokenizers of every kind, trained here."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unimega.data.tokenize import words

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<unconditional>"]
ORDINARY = ["<tool_call>", "</tool_call>", "im_start"]
CORPUS = [
    "The quick brown fox doesn't jump over 1234 lazy dogs, they're 5678 sleeping!!\n\n  And it's here.\r\n",
    "def f(x, y=None):\n    return x ** 2 + self.value[0]  # it's a note\n\n\nclass A:\n\tpass\n" * 2,
    "caf\u00e9 na\u00efve \u00fcber \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u4e2d\u6587\u6587\u672c\u3002 \u65e5\u672c\u8a9e \ud55c\uae00 \u1112\u1161\u11ab",
    "aaa aaaa aaaaa abab ababab <|x|> <|endoftext|> <pad> <pad> <pad> --> === ...",
    "\U0001f600\U0001f600 \U0001f468\u200d\U0001f469 \u0e44\u0e17\u0e22 \u0627\u0644\u0639 \u0939\u093f\u0928\u094d",
]
PATTERNS = {
    "gpt2": None,
    "qwen2": words.QWEN2,
    "qwen35": words.QWEN35,
    "llama3": words.LLAMA3,
    "cl100k": words.CL100K,
    "o200k": words.O200K,
}


def byte_level(pattern: str, *, nfc: bool = True, inside: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE with the split of ``PATTERNS``; ``inside``: special tokens are in its vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    regex = PATTERNS[pattern]
    if regex is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS if inside else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ORDINARY])
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    """The folder, with this tokenizer in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
