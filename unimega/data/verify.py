"""Whether the files of a corpus are whole: structure, sums, ids, and what the sidecar says about them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimega.data import format as layout
from unimega.data.reader import IndexedCorpus
from unimega.data.scan import MODALITIES, pieces
from unimega.errors import DataError


@dataclass(frozen=True)
class Verdict:
    """What was found out about one corpus."""

    prefix: str
    problems: tuple[str, ...]
    """A line each; the first ones are the ones to look at."""
    documents: int = 0
    bytes: int = 0
    """Of `.bin`."""
    has_sums: bool = False
    """Whether a sidecar was there: without one a flipped bit shows only where it leaves the vocabulary."""


def verify(
    prefix: str | Path,
    *,
    megatron: bool = False,
    text_size: int | None = None,
    tokenizer_sha256: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Check a corpus from end to end, in bounded memory.

    Args:
        prefix: path of its files without their endings.
        megatron: Megatron-LM wrote it: no sidecar, text only.
        text_size: one more than the largest text id that is allowed; absent: the sidecar's.
        tokenizer_sha256: of the tokenizer that the corpus must have been made with; absent: any.
        progress: hears the bytes of `.bin` that are done, and of all that have to be read.

    A damaged index ends the check, for nothing behind it can be found; of `.bin` every damaged block is listed, and the
    first id of each modality that is out of range.
    """
    try:
        corpus = IndexedCorpus(prefix, megatron=megatron)
        corpus.check_index()
    except DataError as error:
        return Verdict(str(prefix), (str(error),))
    counted = _Progress(progress, total=_bytes_to_read(corpus))
    problems = [*_other_tokenizer(corpus, tokenizer_sha256), *_counts(corpus), *corpus.damaged_blocks(counted)]
    for modality, limit in enumerate(_limits(corpus, text_size)):
        problems += _stray(corpus, modality, limit, counted)
    highest = int(layout.modality_of(corpus.modes).max(initial=0)) if corpus.has_modes else 0
    if highest >= len(MODALITIES):
        problems.append(f"{corpus.index_path}: a sequence of modality {highest}; known are 0 text, 1 vision.")
    size = corpus.bin_path.stat().st_size
    return Verdict(str(prefix), tuple(problems), corpus.num_documents, size, corpus.sidecar is not None)


def _other_tokenizer(corpus: IndexedCorpus, wanted: str | None) -> Iterator[str]:
    if corpus.sidecar is None or wanted is None:
        return
    said = str(corpus.sidecar["tokenizer"]["sha256"])
    if said != wanted:
        yield f"{corpus.sidecar_path}: made with tokenizer {said[:12]}, the one that is named is {wanted[:12]}."


class _Progress:
    def __init__(self, report: Callable[[int, int], None], *, total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def __call__(self, count: int) -> None:
        self.done += count
        self.report(self.done, self.total)


def _bytes_to_read(corpus: IndexedCorpus) -> int:
    """Sums go once over `.bin`, ids once over all sequences, which may share bytes."""
    summed = corpus.bin_path.stat().st_size if corpus.sidecar is not None else 0
    return summed + int(corpus.lengths.sum(dtype=np.int64)) * corpus.dtype.itemsize


def _limits(corpus: IndexedCorpus, text_size: int | None) -> tuple[int, int]:
    """One more than the largest id of each modality."""
    anything = int(np.iinfo(np.int32).max) + 1  # the loader's ids are int32
    if corpus.sidecar is None:
        return anything if text_size is None else text_size, 0
    return text_size or int(corpus.sidecar["tokenizer"]["size"]), int(corpus.sidecar["vocabulary"]["codebook"] or 0)


def _stray(corpus: IndexedCorpus, modality: int, limit: int, progress: Callable[[int], None]) -> Iterator[str]:
    """The first id of a modality that is out of range."""
    found = False
    for chunk in pieces(corpus, modality):
        progress(int(chunk.length.sum()) * corpus.dtype.itemsize)
        if found:
            continue
        positions = chunk.positions()
        ids = corpus.elements[positions].astype(np.int64)
        if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < limit):
            continue
        found = True
        at = int(np.argmax((ids < 0) | (ids >= limit)))
        piece = int(np.searchsorted(np.cumsum(chunk.length), at, side="right"))
        sequence = int(chunk.sequence[piece])
        document = int(np.searchsorted(corpus.documents, sequence, side="right")) - 1
        place = int(positions[at]) - int(corpus.pointers[sequence]) // corpus.dtype.itemsize
        bound = f"the codebook of {limit}" if modality == layout.VISION else f"the vocabulary of {limit}"
        yield (
            f"{corpus.bin_path}: id {ids[at]} at place {place} of sequence {sequence} (document {document}, "
            f"{MODALITIES[modality]}) is outside {bound}. {layout.DAMAGED}"
        )


def _counts(corpus: IndexedCorpus) -> Iterator[str]:
    """What the sidecar counts and the index counts."""
    if corpus.sidecar is None:
        return
    modality = layout.modality_of(corpus.modes)
    images = int((modality == layout.VISION).sum())
    pairs = [("images", images, corpus.sidecar["counts"]["images"])]
    for number, name in enumerate(MODALITIES):
        said = corpus.sidecar["counts"].get("tokens", {}).get(name)
        found = int(corpus.lengths.sum(dtype=np.int64, where=modality == number))
        pairs.append((f"{name} tokens", found, found if said is None else said))
    for what, found, said in pairs:
        if found != said:
            yield f"{corpus.index_path}: {found} {what}, but {corpus.sidecar_path.name} says {said}. {layout.DAMAGED}"
    yield from _sources(corpus, corpus.sidecar["sources"])


def _sources(corpus: IndexedCorpus, sources: list[dict[str, Any]]) -> Iterator[str]:
    """The first source whose documents do not end where the next one's begin, or the last one's at the end."""
    starts = [*(source["first_document"] for source in sources), corpus.num_documents]
    if sources and starts[0]:
        yield f"{corpus.sidecar_path}: {sources[0]['path']} starts at document {starts[0]}, not at 0. {layout.DAMAGED}"
    for source, start, end in zip(sources, starts[:-1], starts[1:], strict=True):
        documents = source.get("documents", max(0, end - start))
        if start + documents != end:
            yield (
                f"{corpus.sidecar_path}: {source['path']} holds {documents} documents from {start} on, but what "
                f"follows starts at {end}. {layout.DAMAGED}"
            )
            return
