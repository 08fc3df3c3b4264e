"""Stored content to the tokens of a document: direction, prompts, image borders, eos, and which tokens are targets.

All of it follows from (seed, corpus, epoch, document). Windows are planned from the same pieces that packs are filled
from, so a planned length cannot differ from a built one.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega.config.vocabulary import Vocabulary
from unimega.data import corpus as corpora
from unimega.data import format as layout
from unimega.data import order
from unimega.data.corpus import Ints, Stored
from unimega.data.format import Ids
from unimega.data.pieces import LITERAL, VISION, WANTED, Pieces
from unimega.data.templates import Templates
from unimega.data.tokenize import SpecialIds
from unimega.errors import ConfigError, DataError

STORED, T2I, UNCONDITIONAL, I2T = range(4)
VARIANTS = ("stored", "t2i", "unconditional", "i2t")
"""How a document is laid out; a variant's number is its place."""
_SLOT_DIRECTION, _SLOT_UNCONDITIONAL, _SLOT_PROMPT, _SLOT_QUESTION, _SLOT_TURN = range(5)
_BEFORE, _BODY, _AFTER = range(3)


class _Literals:
    """Runs of ids that are not stored, one after another in ``ids``."""

    def __init__(self) -> None:
        self.ids: Ids = np.zeros(0, dtype=np.int32)

    def add(self, *runs: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Append runs; where each starts and how long it is."""
        parts = [np.asarray(run, dtype=np.int32) for run in runs]
        lengths = np.asarray([len(part) for part in parts], dtype=np.int64)
        starts = len(self.ids) + np.cumsum(lengths) - lengths
        self.ids = np.concatenate([self.ids, *parts])
        return starts, lengths


@dataclass
class _Slots:
    """Three places per sequence, before, at and after what is stored; arrays [S, 3]."""

    address: Ints
    length: Ints
    flags: npt.NDArray[np.uint8]

    def put(self, sequences: Ints, slot: int, literal: tuple[Ints, Ints], wanted: bool | npt.NDArray[np.bool_]) -> None:
        """A literal (or one for each of the sequences) in a slot."""
        self.address[sequences, slot], self.length[sequences, slot] = literal
        self.flags[sequences, slot] = LITERAL
        self.want(sequences, slot, wanted)

    def want(self, sequences: Ints, slot: int, wanted: bool | npt.NDArray[np.bool_]) -> None:
        """Whether the tokens of a slot are targets."""
        flags = self.flags[sequences, slot] & np.uint8(~WANTED & 0xFF)
        self.flags[sequences, slot] = flags | np.where(wanted, np.uint8(WANTED), np.uint8(0))


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
        row_separator: int = 0,
    ) -> None:
        """Take the ids and the recipe of a run.

        Raises:
            ConfigError: rows are to be separated, but the tokenizer has no id for it.
            DataError: begin of image or the row separator is not vision, or end of image or eos not text.
        """
        self.vocabulary, self.special = vocabulary, special
        self.seed, self.t2i_ratio, self.unconditional_ratio = seed, t2i_ratio, unconditional_ratio
        self.mask_instructions, self.row_separator = mask_instructions, row_separator
        self.modalities = len(vocabulary.names)
        self.offset = vocabulary.starts[layout.VISION] if self.modalities > layout.VISION else 0
        self._check_specials()
        table = _Literals()
        self._begin, self._end = table.add([special.vision_start or 0]), table.add([special.vision_end or 0])
        self._eos = table.add([special.eos])
        self._end_of_answer = table.add([special.vision_end or 0, special.eos])
        self._unconditional = table.add(special.unconditional)
        self._prompts = table.add(*(templates.t2i or ([],)))
        self._answers = table.add(*(templates.i2t or ([],)))
        self._questions = table.add(*(templates.describe or ([],)))
        self._turns = table.add(*(templates.turn or ([],)))
        self.literals = table.ids
        """int32: what literal pieces are taken from."""

    def lay_out(self, stored: Stored) -> Pieces:
        """The pieces of documents in their epochs."""
        stored, pairs, variant = self._directed(stored)
        image = layout.modality_of(stored.mode) == layout.VISION
        told = np.ones(len(image), dtype=np.bool_)
        if self.mask_instructions:
            told = ~layout.is_context(stored.mode)
        slots = self._slots(stored, image, told)
        ended = stored.ended
        if len(pairs):
            ended = ended.copy()
            ended[pairs] = False
            self._pairs(stored, pairs, variant, slots)
        if (layout.role_of(stored.mode) >= layout.QUESTION).any():
            self._turns_of(stored, image, told, slots)
        return self._flat(stored, slots, ended)

    def _directed(self, stored: Stored) -> tuple[Stored, Ints, npt.NDArray[np.int8]]:
        """Which documents are pairs, their variants, and their sequences in the order of those."""
        two = np.flatnonzero(np.diff(stored.starts) == 2)
        first, second = stored.mode[stored.starts[two]], stored.mode[stored.starts[two] + 1]

        def is_image(mode: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
            return np.asarray((layout.modality_of(mode) == layout.VISION) & ~layout.is_context(mode))

        caption_first = (first == layout.MODE_CAPTION) & is_image(second)
        chosen = caption_first | (is_image(first) & (second == layout.MODE_CAPTION))
        pairs, caption_first = two[chosen], caption_first[chosen]
        free = self._uniform(stored, pairs, _SLOT_DIRECTION) < self.t2i_ratio
        direction = stored.direction[pairs]
        to_image = (direction == corpora.T2I_ONLY) | ((direction == corpora.BOTH) & free)
        dropped = self._uniform(stored, pairs, _SLOT_UNCONDITIONAL) < self.unconditional_ratio
        variant = np.where(to_image, np.where(dropped, UNCONDITIONAL, T2I), I2T).astype(np.int8)
        swapped = stored.starts[pairs[caption_first != to_image]]
        if not len(swapped):
            return stored, pairs, variant
        turn = np.arange(len(stored.mode))
        turn[swapped], turn[swapped + 1] = swapped + 1, swapped
        columns = {name: getattr(stored, name) for name in Stored.__dataclass_fields__}
        columns |= {name: columns[name][turn] for name in ("address", "length", "mode")}
        return Stored(**columns), pairs, variant

    def _slots(self, stored: Stored, image: npt.NDArray[np.bool_], told: npt.NDArray[np.bool_]) -> _Slots:
        """Sequences in their stored order: images in their borders, an eos behind each answer."""
        shape = (len(image), 3)
        slots = _Slots(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.uint8))
        slots.address[:, _BODY], slots.length[:, _BODY] = stored.address, stored.length
        slots.flags[:, _BODY] = told * np.uint8(WANTED) | image * np.uint8(VISION)
        pictures = np.flatnonzero(image)
        if len(pictures):
            if self.row_separator:
                slots.length[pictures, _BODY] += stored.length[pictures] // self.row_separator
            slots.put(pictures, _BEFORE, self._begin, told[pictures])
            slots.flags[pictures, _BEFORE] |= VISION
            slots.put(pictures, _AFTER, self._end, told[pictures])
        answer = layout.role_of(stored.mode) == layout.ANSWER
        for chosen, literal in ((answer & ~image, self._eos), (answer & image, self._end_of_answer)):
            answers = np.flatnonzero(chosen)
            slots.put(answers, _AFTER, literal, told[answers])
        return slots

    def _pairs(self, stored: Stored, pairs: Ints, variant: npt.NDArray[np.int8], slots: _Slots) -> None:
        """Captions with what stands in for them or beside them, and which parts are given."""
        given = not self.mask_instructions  # what is given is a target only where nothing is masked
        first = stored.starts[pairs]
        captions = first[variant != I2T]
        slots.want(captions, _BODY, given)
        slots.want(captions + 1, _BEFORE, given)
        slots.put(first[variant == UNCONDITIONAL], _BODY, self._unconditional, given)
        drawn = pairs[variant == T2I]
        slots.put(stored.starts[drawn], _AFTER, self._drawn(self._prompts, stored, drawn, _SLOT_PROMPT), given)
        drawn = pairs[variant == I2T]
        for slot in (_BEFORE, _BODY, _AFTER):
            slots.want(stored.starts[drawn], slot, given)
        answer = self._drawn(self._answers, stored, drawn, _SLOT_PROMPT)
        slots.put(stored.starts[drawn] + 1, _BEFORE, answer, given)

    def _turns_of(
        self, stored: Stored, image: npt.NDArray[np.bool_], told: npt.NDArray[np.bool_], slots: _Slots
    ) -> None:
        """Separators before all turns but a document's first, and questions for images that came without one."""
        owner = np.repeat(np.arange(len(stored.key)), np.diff(stored.starts))
        place = np.arange(len(owner)) - stored.starts[owner]
        role = layout.role_of(stored.mode)
        given = not self.mask_instructions
        pictures = np.bincount(owner, weights=image, minlength=len(stored.key))
        mute = (role == layout.QUESTION) & ~image & (stored.length == 0) & (pictures[owner] > 0)
        later = np.flatnonzero((role >= layout.QUESTION) & ~image & ~mute & (place > 0))
        slots.put(later, _BEFORE, self._drawn(self._turns, stored, owner[later], _SLOT_TURN, place[later]), given)
        asked = np.flatnonzero(mute)
        question = self._drawn(self._questions, stored, owner[asked], _SLOT_QUESTION, place[asked])
        slots.put(asked, _BODY, question, told[asked])

    def _flat(self, stored: Stored, slots: _Slots, ended: npt.NDArray[np.bool_]) -> Pieces:
        """All slots in order, each document's eos behind its own, the empty ones left out."""
        documents = len(ended)
        owner = np.repeat(np.arange(documents), np.diff(stored.starts))
        at = (3 * np.arange(len(owner)) + owner)[:, None] + np.arange(3)
        last = 3 * stored.starts[1:] + np.arange(documents)
        total = 3 * len(owner) + documents
        length = np.empty(total, dtype=np.int64)
        length[at], length[last] = slots.length, ~ended
        keep = np.flatnonzero(length)
        address, flags = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.uint8)
        address[at], address[last] = slots.address, self._eos[0]
        flags[at], flags[last] = slots.flags, LITERAL | WANTED
        corpus = np.repeat(stored.corpus, 3 * np.diff(stored.starts) + 1)
        borders = np.concatenate(([0], last + 1))
        return Pieces(np.searchsorted(keep, borders), address[keep], length[keep], flags[keep], corpus[keep])

    def _uniform(self, stored: Stored, rows: Ints, slot: int, *words: Ints) -> npt.NDArray[np.float64]:
        return order.uniform(self.seed, stored.key[rows], stored.epoch[rows], stored.document[rows], slot, *words)

    def _drawn(self, runs: tuple[Ints, Ints], stored: Stored, rows: Ints, slot: int, *words: Ints) -> tuple[Ints, Ints]:
        """One of the literals for each of these documents."""
        starts, lengths = runs
        if len(starts) == 1:
            return runs
        number = (self._uniform(stored, rows, slot, *words) * len(starts)).astype(np.int64)
        return starts[number], lengths[number]

    def _check_specials(self) -> None:
        special = self.special
        wanted = [("eos", special.eos, layout.TEXT), ("<|vision_end|>", special.vision_end, layout.TEXT)]
        if self.modalities > layout.VISION:
            wanted.append(("<|vision_start|>", special.vision_start, layout.VISION))
        if self.row_separator:
            if special.vision_pad is None:
                raise ConfigError(
                    f"data.row_separator={self.row_separator} needs <|vision_pad|>, and the tokenizer has none. "
                    "Set data.row_separator = 0, or name a tokenizer that has it."
                )
            wanted.append(("<|vision_pad|>", special.vision_pad, layout.VISION))
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
