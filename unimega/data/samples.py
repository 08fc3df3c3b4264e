"""Documents of a corpus for people to read: as they are stored, or as the model sees them."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.config.vocabulary import Vocabulary
from unimega.data import corpus as corpora
from unimega.data import format as layout
from unimega.data import templates
from unimega.data.assemble import Assembler
from unimega.data.corpus import Corpus
from unimega.data.pieces import LITERAL, VISION, WANTED
from unimega.data.reader import IndexedCorpus
from unimega.data.scan import MODALITIES
from unimega.data.tokenize import SpecialIds, TextTokenizer, locate
from unimega.errors import DataError

ADDED, STORED = "added", "stored"
"""Labels of runs as the model sees them: put there at load time, or from the files."""


@dataclass(frozen=True)
class Run:
    """Tokens in a row that are alike."""

    label: str
    """Its role as stored; as the model sees it, whether a file holds it or it was added."""
    modality: str
    is_target: bool
    """Whether the model is asked for these tokens."""
    ids: tuple[int, ...]
    """Codes of an image without the offset."""
    text: str | None
    """What the ids say; None for codes, and without a tokenizer."""


@dataclass(frozen=True)
class Sample:
    """One document."""

    corpus: str
    document: int
    source: str
    """The file its row came from."""
    row: int
    """Its number among the good rows of that file."""
    form: str
    """How its runs are laid out."""
    runs: tuple[Run, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(run.ids) for run in self.runs)

    @property
    def targets(self) -> int:
        """Number of targets."""
        return sum(len(run.ids) for run in self.runs if run.is_target)

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        runs = [
            {
                "label": run.label,
                "modality": run.modality,
                "loss": run.is_target,
                "ids": list(run.ids),
                "text": run.text,
            }
            for run in self.runs
        ]
        return {
            "corpus": self.corpus,
            "document": self.document,
            "source": self.source,
            "row": self.row,
            "form": self.form,
            "tokens": self.tokens,
            "targets": self.targets,
            "runs": runs,
        }


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How documents are laid out: the keys of `[data]` that decide it."""

    seed: int = 1
    epoch: int = 0
    templates: str = "default"
    t2i_ratio: float = 0.5
    unconditional_ratio: float = 0.1
    mask_instructions: bool = True
    row_separator: int = 0
    direction: str = "both"
    name: str = ""
    """Of the corpus in the run; absent: the last part of its path."""


def choose(corpus: IndexedCorpus, documents: Sequence[int], *, random: int, seed: int) -> list[int]:
    """The numbers asked for (below 0 they count from the end), then ``random`` others that follow from ``seed``.

    Raises:
        DataError: there is no such document.
    """
    size = corpus.num_documents
    for number in documents:
        if not -size <= number < size:
            raise DataError(f"document {number} is not in {corpus.prefix}. It has documents 0 to {size - 1}.")
    drawn = np.random.default_rng(seed).choice(size, min(random, size), replace=False) if random else np.zeros(0, int)
    return [number % size for number in documents] + [int(number) for number in drawn]


def tokenizer_of(corpus: IndexedCorpus, folder: str | None) -> TextTokenizer | None:
    """The tokenizer in a folder; absent: the one recorded beside the corpus, None where that is gone.

    Raises:
        DataError: no tokenizer in the folder, or not the one that the corpus was made with.
    """
    said = corpus.sidecar["tokenizer"] if corpus.sidecar is not None else {}
    if folder is None:
        beside = corpus.index_path.parent / str(said["path"]) if "path" in said else None
        return TextTokenizer(beside) if beside is not None and locate(beside) is not None else None
    tokenizer = TextTokenizer(folder)
    if said and tokenizer.sha256 != said["sha256"]:
        raise DataError(
            f"{corpus.sidecar_path}: made with tokenizer {said['sha256'][:12]}, that of '{folder}' is "
            f"{tokenizer.sha256[:12]}. Its ids would say something else; name the tokenizer of the corpus."
        )
    return tokenizer


def stored(corpus: IndexedCorpus, document: int, tokenizer: TextTokenizer | None, *, mask_instructions: bool) -> Sample:
    """A document as the files hold it; what carries loss follows from its context bits alone."""
    runs = []
    for sequence in range(int(corpus.documents[document]), int(corpus.documents[document + 1])):
        mode = corpus.modes[sequence : sequence + 1]
        role = layout.ROLES[int(layout.role_of(mode)[0])]
        is_context = bool(layout.is_context(mode)[0])
        modality = int(layout.modality_of(mode)[0])
        is_target = not (is_context and mask_instructions)
        label = role + "/context" * is_context
        ids = corpus.sequence(sequence)
        runs.append(_run(label, modality, is_target, ids, tokenizer, are_codes=modality != layout.TEXT))
    return _sample(corpus, document, "as stored", runs)


class AsSeen:
    """Documents of one corpus as a run lays them out: the same draws, if seed, epoch and name are its own."""

    def __init__(self, prefix: str, tokenizer: TextTokenizer | None, recipe: Recipe, *, megatron: bool = False) -> None:
        """Open the corpus and take the recipe.

        Raises:
            ConfigError: a recipe that needs a tokenizer or that the corpus does not allow.
            DataError: the corpus is missing or damaged, or nothing names eos.
        """
        self.tokenizer, self.recipe = tokenizer, recipe
        self.corpus = Corpus(
            corpora.Source(path=prefix, direction=recipe.direction, name=recipe.name, megatron=megatron)
        )
        special = self.corpus.special or (tokenizer.special if tokenizer else None)
        if special is None:
            raise DataError(f"{prefix}: no sidecar names eos. Name the tokenizer's folder: --tokenizer DIR.")
        self.special = special
        self.vocabulary = vocabulary_of(self.corpus.reader, special, tokenizer)
        self.assembler = Assembler(
            self.vocabulary,
            special,
            templates.load(recipe.templates, tokenizer),
            seed=recipe.seed,
            t2i_ratio=recipe.t2i_ratio,
            unconditional_ratio=recipe.unconditional_ratio,
            mask_instructions=recipe.mask_instructions,
            row_separator=recipe.row_separator,
        )

    def sample(self, document: int) -> Sample:
        """A document in the epoch of the recipe."""
        epoch, number = np.asarray([self.recipe.epoch]), np.asarray([document])
        pieces = self.assembler.lay_out(self.corpus.gather(epoch, number, eos=self.special.eos))
        elements, runs = self.corpus.reader.elements, list[Run]()
        for start, length, flags in zip(
            pieces.address.tolist(), pieces.length.tolist(), pieces.flags.tolist(), strict=True
        ):
            modality, is_target = int(bool(flags & VISION)), bool(flags & WANTED)
            if flags & LITERAL:
                ids = self.assembler.literals[start : start + length]
                runs.append(_run(ADDED, modality, is_target, ids, self.tokenizer))
            elif modality:
                runs += self._image(elements[start : start + length], length, is_target)
            else:
                runs.append(_run(STORED, modality, is_target, elements[start : start + length], self.tokenizer))
        form = f"{self._form(document, pieces.flags)}, epoch {self.recipe.epoch}"
        return _sample(self.corpus.reader, document, form, _without_first(runs, self.tokenizer))

    def _image(self, found: layout.Ids, length: int, is_target: bool) -> Iterator[Run]:
        """The codes of an image of ``length`` tokens, with the end of each row where rows are separated."""
        row = self.recipe.row_separator
        if not row:
            yield _run(STORED, layout.VISION, is_target, found, self.tokenizer, are_codes=True)
            return
        codes = found[: length - length // (row + 1)]
        for begin in range(0, len(codes), row):
            part = codes[begin : begin + row]
            yield _run(STORED, layout.VISION, is_target, part, self.tokenizer, are_codes=True)
            if len(part) == row:
                separator = np.asarray([self.special.vision_pad])
                yield _run(ADDED, layout.VISION, is_target, separator, self.tokenizer)

    def _form(self, document: int, flags: npt.NDArray[np.uint8]) -> str:
        reader = self.corpus.reader
        modes = reader.modes[int(reader.documents[document]) : int(reader.documents[document + 1])]
        if sorted(modes.tolist()) != [layout.MODE_IMAGE, layout.MODE_CAPTION]:
            return "in the stored order"
        if flags[0] & VISION:
            return "image to text"
        return "image without its caption" if flags[0] & LITERAL else "text to image"


def vocabulary_of(corpus: IndexedCorpus, special: SpecialIds, tokenizer: TextTokenizer | None) -> Vocabulary:
    """The ids that the sidecar's vocabulary gives: text, then codes; begin of image and row ends count as vision."""
    text = tokenizer.padded_size() if tokenizer else 0
    codebook = None
    if corpus.sidecar is not None:
        text, codebook = int(corpus.sidecar["vocabulary"]["text"]), corpus.sidecar["vocabulary"]["codebook"]
    if not codebook:
        return Vocabulary(names=MODALITIES[:1], starts=(0,), codes=(text,), rows=text, ids=((),))
    marks = tuple(sorted(number for number in (special.vision_start, special.vision_pad) if number is not None))
    return Vocabulary(names=MODALITIES, starts=(0, text), codes=(text, codebook), rows=text + codebook, ids=((), marks))


def _run(
    label: str,
    modality: int,
    is_target: bool,
    ids: npt.NDArray[np.integer[Any]],
    tokenizer: TextTokenizer | None,
    *,
    are_codes: bool = False,
) -> Run:
    numbers = tuple(ids.tolist())
    text = None if are_codes or tokenizer is None else tokenizer.decode(numbers)
    name = MODALITIES[modality] if modality < len(MODALITIES) else f"modality {modality}"
    return Run(label, name, is_target, numbers, text)


def _without_first(runs: list[Run], tokenizer: TextTokenizer | None) -> list[Run]:
    """The first token of a document is nobody's target: nothing stands before it."""
    if not runs or not runs[0].is_target:
        return runs
    first = runs[0]
    are_codes = first.text is None
    number = MODALITIES.index(first.modality)
    ids = np.asarray(first.ids)
    parts = [_run(first.label, number, False, ids[:1], tokenizer, are_codes=are_codes)]
    if len(ids) > 1:
        parts.append(_run(first.label, number, True, ids[1:], tokenizer, are_codes=are_codes))
    return parts + runs[1:]


def _sample(corpus: IndexedCorpus, document: int, form: str, runs: Sequence[Run]) -> Sample:
    source, row = corpus.bin_path.name, document
    if corpus.sidecar is not None and corpus.sidecar["sources"]:
        sources = corpus.sidecar["sources"]
        at = max(0, bisect_right([item["first_document"] for item in sources], document) - 1)
        source = str(sources[at]["path"])
        while at > 0 and sources[at - 1]["path"] == source:  # a file has an entry for each run of equal directions
            at -= 1
        row = document - int(sources[at]["first_document"])
    return Sample(corpus.prefix, document, source, row, form, tuple(runs))
