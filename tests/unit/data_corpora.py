"""Small corpora for the tests of `data/`: ids 0-21 are text as in the digits demo, codes 0-31 follow."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unimega.config.vocabulary import Vocabulary
from unimega.data import format as layout
from unimega.data.writer import CorpusWriter

EOS, PAD, BOI, EOI, UNCONDITIONAL = 1, 2, 3, 4, 5
FIRST_WORD, TEXT, CODEBOOK = 6, 22, 32
VOCABULARY = Vocabulary(
    names=("text", "vision"), starts=(0, TEXT), codes=(TEXT, CODEBOOK), rows=TEXT + CODEBOOK, ids=((), (BOI,))
)
Document = Sequence[tuple[int, Sequence[int]]]


def facts(**changes) -> dict:
    special = {
        "eos": EOS,
        "pad": PAD,
        "vision_start": BOI,
        "vision_end": EOI,
        "unconditional": [UNCONDITIONAL],
    }
    return {
        "tokenizer": {"kind": "hf", "name": "t", "size": TEXT, "eos": EOS, "sha256": "f00d", "special": special},
        "vocabulary": {"text": TEXT, "codebook": CODEBOOK, "codes_per_image": None, "grid": None},
        "sources": [{"path": "rows.jsonl", "first_document": 0, "direction": "both"}],
        "made_by": {"version": "test"},
    } | changes


def write(prefix: Path | str, documents: Sequence[Document], **changes) -> str:
    with CorpusWriter(prefix, overwrite=True) as writer:
        for document in documents:
            writer.add_document([(mode, np.asarray(ids, dtype=np.int32)) for mode, ids in document])
        writer.finish(facts(**changes))
    return str(prefix)


def pair(caption: Sequence[int], codes: Sequence[int]) -> Document:
    return [(layout.MODE_CAPTION, caption), (layout.MODE_IMAGE, codes)]


def random_documents(count: int, seed: int, *, kinds: str = "pti") -> list[Document]:
    """Pairs, texts and interleaved documents; each caption and text starts with words that spell its number."""
    draw = np.random.default_rng(seed)

    def words(most: int) -> list[int]:
        return draw.integers(FIRST_WORD, TEXT, draw.integers(1, most)).tolist()

    def codes(number: int = 16) -> list[int]:
        return draw.integers(0, CODEBOOK, number).tolist()

    result: list[Document] = []
    for _ in range(count):
        kind = kinds[draw.integers(len(kinds))]
        if kind == "p":
            result.append(pair(words(8), codes()))
        elif kind == "t":
            result.append([(layout.MODE_TEXT, words(30))])
        else:
            result.append([(layout.MODE_TEXT, words(6)), (layout.MODE_IMAGE, codes(9)), (layout.MODE_TEXT, words(6))])
    return result


def read(prefix: str) -> list[list[tuple[int, list[int]]]]:
    from unimega.data.reader import IndexedCorpus

    corpus = IndexedCorpus(prefix)
    corpus.check()
    return [
        [
            (int(corpus.modes[s]), corpus.sequence(s).tolist())
            for s in range(corpus.documents[d], corpus.documents[d + 1])
        ]
        for d in range(corpus.num_documents)
    ]
