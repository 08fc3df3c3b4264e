"""Stored content to the tokens of a document: direction, prompts, image borders, eos, and which tokens are targets.

Lengths and targets are worked out for all documents of a window at once; building a document must give the same.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.config.vocabulary import Vocabulary
from unimega.data import corpus as corpora
from unimega.data import format as layout
from unimega.data import order
from unimega.data.corpus import Corpus, Ints
from unimega.data.format import Ids
from unimega.data.templates import Templates
from unimega.data.tokenize import SpecialIds
from unimega.errors import DataError

STORED, T2I, UNCONDITIONAL, I2T = range(4)
VARIANTS = ("stored", "t2i", "unconditional", "i2t")
"""How a document is laid out; a variant's number is its place."""
_SLOT_DIRECTION, _SLOT_UNCONDITIONAL, _SLOT_PROMPT = range(3)


@dataclass(frozen=True)
class Choices:
    """What is drawn for n documents, and what follows from it; arrays [n]."""

    variant: npt.NDArray[np.int8]
    prompt: npt.NDArray[np.int16]
    """Number of the T2I prompt; 0 where none is used."""
    length: Ints
    targets: Ints
    """int64 [n, M]: targets per modality of the input token."""
    longest_image: Ints
    """Tokens of the longest image with its borders; 0: none."""


class Assembler:
    """Lays out the documents of a run."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        special: SpecialIds,
        templates: Templates,
        *,
        seed: int,
        t2i_ratio: float,
        unconditional_ratio: float,
        mask_instructions: bool,
    ) -> None:
        """Take the ids and the recipe of a run.

        Raises:
            DataError: begin of image is not vision, or end of image or eos not text, in the vocabulary.
        """
        self.vocabulary, self.special, self.templates = vocabulary, special, templates
        self.seed, self.t2i_ratio, self.unconditional_ratio = seed, t2i_ratio, unconditional_ratio
        self.mask_instructions = mask_instructions
        self.modalities = len(vocabulary.names)
        self.offset = vocabulary.starts[layout.VISION] if self.modalities > layout.VISION else 0
        self._unconditional = np.asarray(special.unconditional, dtype=np.int32)
        self._prompts = templates.t2i or (np.zeros(0, dtype=np.int32),)
        self._answer = templates.i2t if templates.i2t is not None else np.zeros(0, dtype=np.int32)
        self._check_specials()

    def choose(self, corpus: Corpus, epochs: Ints, documents: Ints) -> Choices:
        """Draw the variants of documents in their epochs and work out lengths and targets."""
        shapes = corpus.shapes(documents, eos=self.special.eos, mask_instructions=self.mask_instructions)

        def uniform(slot: int) -> npt.NDArray[np.float64]:
            return order.uniform(self.seed, corpus.key, epochs, documents, slot)

        free = uniform(_SLOT_DIRECTION) < self.t2i_ratio
        to_image = (shapes.direction == corpora.T2I_ONLY) | ((shapes.direction == corpora.BOTH) & free)
        dropped = uniform(_SLOT_UNCONDITIONAL) < self.unconditional_ratio
        variant = np.where(to_image, np.where(dropped, UNCONDITIONAL, T2I), I2T)
        variant = np.where(shapes.is_pair, variant, STORED).astype(np.int8)
        prompt = np.zeros(len(documents), dtype=np.int16)
        if len(self._prompts) > 1:
            prompt = np.where(variant == T2I, uniform(_SLOT_PROMPT) * len(self._prompts), 0).astype(np.int16)

        prompt_lengths = np.asarray([len(ids) for ids in self._prompts], dtype=np.int64)
        before = np.where(variant == UNCONDITIONAL, len(self._unconditional), shapes.caption + prompt_lengths[prompt])
        after = len(self._answer) + shapes.caption
        image = shapes.codes + 2
        length = np.where(variant == I2T, image + after + 1, before + image + 1)
        if self.mask_instructions:
            text = np.where(variant == I2T, shapes.caption + 1, 1)
            vision = np.where(variant == I2T, 0, shapes.codes + 1)
        else:
            text = np.where(variant == I2T, after, before) + 1
            vision = shapes.codes + 1
        stored = variant == STORED
        targets = np.zeros((len(documents), self.modalities), dtype=np.int64)
        targets[:, layout.TEXT] = np.where(stored, shapes.targets[0], text)
        if self.modalities > layout.VISION:
            targets[:, layout.VISION] = np.where(stored, shapes.targets[1], vision)
        return Choices(
            variant=variant,
            prompt=prompt,
            length=np.where(stored, shapes.tokens, length),
            targets=targets,
            longest_image=shapes.longest_image + 2 * (shapes.longest_image > 0),
        )

    def build(
        self, corpus: Corpus, document: int, variant: int, prompt: int, tokens: Ids, wanted: npt.NDArray[np.bool_]
    ) -> None:
        """Write one document into ``tokens`` and its targets into ``wanted``, both of the planned length.

        Raises:
            DataError: the stored sequences do not give that length.
        """
        reader = corpus.reader
        first, stop = int(reader.documents[document]), int(reader.documents[document + 1])
        page = _Page(tokens, wanted)
        if variant == STORED:
            self._build_stored(corpus, first, stop, page)
        else:
            caption, image = (first, first + 1) if reader.modes[first] == layout.MODE_CAPTION else (first + 1, first)
            told = not self.mask_instructions
            if variant == I2T:
                self._image(reader.sequence(image), page, told)
                page.put(self._answer, told)
                page.put(reader.sequence(caption), True)
            else:
                if variant == UNCONDITIONAL:
                    page.put(self._unconditional, told)
                else:
                    page.put(reader.sequence(caption), told)
                    page.put(self._prompts[prompt], told)
                self._image(reader.sequence(image), page, True, begin=told)
            page.put_one(self.special.eos, True)
        if page.place != len(tokens):
            raise DataError(
                f"{corpus.name} document {document} ({corpus.source_of(document)}): {page.place} tokens, planned were "
                f"{len(tokens)}. The files changed while they were in use."
            )
        wanted[:1] = False

    def _build_stored(self, corpus: Corpus, first: int, stop: int, page: "_Page") -> None:
        reader = corpus.reader
        for sequence in range(first, stop):
            mode = int(reader.modes[sequence])
            told = not (self.mask_instructions and mode & layout.CONTEXT_BIT)
            ids = reader.sequence(sequence)
            if mode & layout.MODALITY_BITS == layout.VISION:
                self._image(ids, page, told)
            else:
                page.put(ids, told)
            if (mode & layout.ROLE_BITS) >> layout.ROLE_SHIFT == layout.ANSWER:
                page.put_one(self.special.eos, told)
        if page.place < len(page.tokens):
            page.put_one(self.special.eos, True)

    def _image(self, codes: Ids, page: "_Page", told: bool, *, begin: bool | None = None) -> None:
        assert self.special.vision_start is not None and self.special.vision_end is not None
        page.put_one(self.special.vision_start, told if begin is None else begin)
        page.put(codes, told, offset=self.offset)
        page.put_one(self.special.vision_end, told)

    def _check_specials(self) -> None:
        special = self.special
        wanted = [("eos", special.eos, layout.TEXT), ("<|vision_end|>", special.vision_end, layout.TEXT)]
        if self.modalities > layout.VISION:
            wanted.append(("<|vision_start|>", special.vision_start, layout.VISION))
        for name, number, modality in wanted:
            if number is None:
                continue
            found = int(self.vocabulary.modality_of(np.asarray([number]))[0])
            if found != modality:
                names = self.vocabulary.names
                raise DataError(
                    f"{name} has id {number}, {names[found]} in the model's vocabulary, not {names[modality]}. "
                    f"model.vision_offset is {self.offset}; model.vision_ids lists the ids below it that are vision."
                )


class _Page:
    """Where the next token of a document goes; what does not fit is counted, not written."""

    def __init__(self, tokens: Ids, wanted: npt.NDArray[np.bool_]) -> None:
        self.tokens, self.wanted, self.place = tokens, wanted, 0

    def put(self, ids: Ids, wanted: bool, *, offset: int = 0) -> None:
        stop = self.place + len(ids)
        if stop <= len(self.tokens):
            self.tokens[self.place : stop] = ids
            if offset:
                self.tokens[self.place : stop] += offset
            self.wanted[self.place : stop] = wanted
        self.place = stop

    def put_one(self, number: int, wanted: bool) -> None:
        if self.place < len(self.tokens):
            self.tokens[self.place] = number
            self.wanted[self.place] = wanted
        self.place += 1
