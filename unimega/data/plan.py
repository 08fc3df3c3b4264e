"""The order of a run: which tokens lie in pack g, for any g, as a pure function of seed and corpora.

Global packs are numbered 0, 1, 2, ...; step s of G packs takes [s G, (s + 1) G). Ranks, micro-batches and workers only
choose which of them to build. Every rank computes the same plan; there is no cache and no barrier.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from unimega import log
from unimega.batch import Microbatch
from unimega.config.vocabulary import Vocabulary
from unimega.data import checks, templates
from unimega.data.assemble import Assembler
from unimega.data.collate import Rank, collate
from unimega.data.corpus import Corpus, Ints, Source, Stored
from unimega.data.draft import Draft, Filling, OutOfPlace, find_stray
from unimega.data.mixture import Cursor, Mixture, Window
from unimega.data.pieces import LITERAL, PAD, Pieces
from unimega.data.tokenize import TextTokenizer
from unimega.errors import DataError

_log = log.get(__name__)
EVALUATION_SEED = 0
"""Evaluation reads the same packs in every run."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How stored documents become packs; the keys of `[data]`."""

    pack_length: int
    t2i_ratio: float = 0.5
    unconditional_ratio: float = 0.1
    mask_instructions: bool = True
    row_separator: int = 0
    templates: str = "default"
    tokenizer: str = ""
    """Folder; absent: the one recorded beside the corpora, loaded only where prompts have to be tokenised."""
    window_tokens: int = 1 << 28
    overlong: str = "error"
    seed: int = 1


@dataclass(frozen=True)
class Pack:
    """One pack in input order; all arrays [T], T the pack length."""

    tokens: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    document: npt.NDArray[np.int32]
    """1, 2, ... in order; 0 for pads."""
    labels: npt.NDArray[np.int32]
    """The next token of the same document; the pad id where there is none."""
    mask: npt.NDArray[np.bool_]
    """Whether the label is a target."""


class DataPlan:
    """All packs of a run, or of an evaluation."""

    def __init__(
        self, sources: Sequence[Source], vocabulary: Vocabulary, recipe: Recipe, *, evaluation: bool = False
    ) -> None:
        """Open the corpora and plan the first window.

        Args:
            sources: corpora with weights and directions.
            vocabulary: of the model.
            recipe: how documents become packs.
            evaluation: one epoch of everything with a seed of its own; packs past the end are pads only.

        Raises:
            ConfigError: two corpora of one name, or no tokenizer.
            DataError: a corpus is missing, damaged, or made for another vocabulary or tokenizer.
        """
        self.recipe, self.vocabulary, self.evaluation = recipe, vocabulary, evaluation
        self.corpora = tuple(Corpus(source) for source in sources)
        checks.names(self.corpora)
        tokenizer = self._tokenizer()
        self.special = checks.special_ids(self.corpora, vocabulary, tokenizer)
        seed = EVALUATION_SEED if evaluation else recipe.seed
        self.assembler = Assembler(
            vocabulary,
            self.special,
            templates.load(recipe.templates, tokenizer),
            seed=seed,
            t2i_ratio=recipe.t2i_ratio,
            unconditional_ratio=recipe.unconditional_ratio,
            mask_instructions=recipe.mask_instructions,
            row_separator=recipe.row_separator,
        )
        self.mixture = Mixture(
            self.corpora,
            self.assembler,
            seed=seed,
            pack_length=recipe.pack_length,
            window_tokens=recipe.window_tokens,
            overlong=recipe.overlong,
        )
        self.filling = Filling(
            elements=[corpus.reader.elements for corpus in self.corpora],
            literals=self.assembler.literals,
            vocabulary=vocabulary,
            pad=self.special.pad,
            row_separator=recipe.row_separator,
            separator=self.special.vision_pad or 0,
        )
        self._lock = threading.Lock()
        self._windows: dict[int, Window] = {}
        self._start(0, 0, [Cursor()] * len(self.corpora))
        if evaluation:
            self._windows[0] = self.mixture.epoch()
            self._report_overlong(self._windows[0], self._cursors[0])
        _log.info("%s", self.describe())

    @property
    def num_packs(self) -> int | None:
        """Packs of an evaluation; None for training, which never ends."""
        return self._windows[0].num_packs if self.evaluation else None

    def num_steps(self, global_batch_packs: int) -> int:
        """Steps that show every pack of an evaluation; the last one is filled with pads."""
        if self.num_packs is None:
            raise ValueError("training data never ends")
        return -(-self.num_packs // global_batch_packs)

    def draft(self, packs: Sequence[int]) -> Draft:
        """The pieces of some packs, in this order: a few numpy calls for all of them together."""
        found = [self.window_of(number) for number in packs]
        none = np.zeros(0, dtype=np.int64)
        places = [
            none if window is None else np.arange(*window.starts[number - window.first_pack :][:2].tolist())
            for window, number in zip(found, packs, strict=True)
        ]
        counts = np.asarray([len(place) for place in places])
        windows = {window.number: window for window in found if window is not None}
        which = np.repeat([-1 if window is None else window.number for window in found], counts)
        items = np.concatenate(places)

        def column(name: str) -> Ints:
            values = np.empty(len(items), dtype=np.int64)
            for number, window in windows.items():
                mine = which == number
                values[mine] = getattr(window, name)[items[mine]]
            return values

        corpus, document, epoch = column("corpus"), column("document"), column("epoch")
        length = column("length")
        pieces, rows = self._laid_out(corpus, document, epoch)
        if any(window.has_parts for window in windows.values()):
            pieces = pieces.clip(column("begin")[rows], length[rows])
        if not np.array_equal(pieces.totals(), length[rows]):
            self._refuse_lengths(pieces.totals(), length[rows], corpus[rows], document[rows])
        sums = np.concatenate(([0], np.cumsum(length)))
        borders = np.concatenate(([0], np.cumsum(counts)))
        room = self.recipe.pack_length - np.diff(sums[borders])
        pieces = _with_pads(pieces, room[room > 0])
        turn = np.empty(len(items), dtype=np.int64)
        turn[rows] = np.arange(len(items))
        padded = np.flatnonzero(room)
        turn = np.insert(turn, borders[padded + 1], len(items) + np.arange(len(padded)))
        starts = borders + np.concatenate(([0], np.cumsum(room > 0)))
        return Draft(pieces.take(turn), starts)

    def read_ahead(self, draft: Draft) -> None:
        """Ask the operating system for what a draft will read."""
        pieces = draft.pieces
        stored = (pieces.flags & LITERAL) == 0
        for number, corpus in enumerate(self.corpora):
            mine = stored & (pieces.corpus == number)
            corpus.read_ahead(pieces.address[mine], pieces.length[mine])

    def collate(
        self,
        draft: Draft,
        packs: Sequence[int],
        *,
        scale: npt.NDArray[np.float32],
        step_tokens: int,
        rank: Rank | None = None,
    ) -> Microbatch:
        """One micro-batch of all packs of a draft.

        Args:
            packs: their numbers.
            scale: [M] weight of a target per modality of its input token.
            step_tokens: tokens of the global batch without pads.

        Raises:
            DataError: a stored id is not of its modality.
        """
        try:
            return collate(
                draft,
                self.filling,
                pack_length=self.recipe.pack_length,
                scale=scale,
                step_tokens=step_tokens,
                rank=rank or Rank(),
            )
        except OutOfPlace:
            self._refuse_ids(draft, packs)

    def pack(self, number: int) -> Pack:
        """Global pack ``number``."""
        modalities = len(self.vocabulary.names)
        draft, scale = self.draft([number]), np.ones(modalities, dtype=np.float32)
        batch = self.collate(draft, [number], scale=scale, step_tokens=0)  # no router sees it
        order = batch.order
        modality = np.repeat(np.arange(modalities, dtype=np.uint8), order.counts)[order.inverse]
        document = order.document[order.inverse] + np.int32(1)
        document[self.recipe.pack_length - order.pads :] = 0
        tokens, labels = batch.tokens[order.inverse], batch.labels[order.inverse]
        return Pack(tokens, modality, document, labels, batch.loss_weights[order.inverse] > 0)

    def documents(self, pack: int) -> list[tuple[str, int]]:
        """(name of the corpus, number of the document) of all that a pack holds; each part of a split one counts."""
        window = self.window_of(pack)
        if window is None:
            return []
        items = slice(*window.starts[pack - window.first_pack :][:2].tolist())
        pairs = zip(window.corpus[items].tolist(), window.document[items].tolist(), strict=True)
        return [(self.corpora[corpus].name, document) for corpus, document in pairs]

    def targets(self, step: int, *, global_batch_packs: int) -> Ints:
        """int64 [M]: targets per modality of the input token in all packs of a step; none has to be built for it."""
        total = np.zeros(len(self.vocabulary.names), dtype=np.int64)
        for window, first, stop in self._parts_of(step, global_batch_packs):
            total += window.pack_targets[first:stop].sum(axis=0)
        return total

    def tokens(self, step: int, *, global_batch_packs: int) -> int:
        """Tokens in all packs of a step, pads left out; none has to be built for it."""
        parts = self._parts_of(step, global_batch_packs)
        return sum(
            int(window.length[window.starts[first] : window.starts[stop]].sum()) for window, first, stop in parts
        )

    def _parts_of(self, step: int, global_batch_packs: int) -> Iterator[tuple[Window, int, int]]:
        """The windows that packs of a step lie in, each with its first pack of them and the one after the last."""
        number, stop = step * global_batch_packs, (step + 1) * global_batch_packs
        while number < stop and (window := self.window_of(number)) is not None:
            until = min(stop, window.next_pack)
            yield window, number - window.first_pack, until - window.first_pack
            number = until

    def hash(self, pack: int = 0) -> str:
        """16 hex digits of the window that holds a pack; equal on all ranks, and after a resume."""
        window = self.window_of(pack)
        return window.hash() if window is not None else ""

    def describe(self) -> str:
        """One line for the log: what the corpora hold, and how full the packs of the first window are."""
        window = self.window_of(0)
        assert window is not None
        weights, total = self.mixture.weights, sum(self.mixture.weights)
        used = int(window.length.sum())
        room = max(1, window.num_packs * self.recipe.pack_length)
        kind, extent = ("evaluation", "All") if self.evaluation else ("training", "First window")
        shares = zip(self.corpora, weights, strict=True)
        parts = [f"{c.name} {c.num_documents} documents {100 * weight / total:.2f} %" for c, weight in shares]
        line = (
            f"{kind} data: {'; '.join(parts)}. "
            f"{extent}: {len(window.document)} items, {used} tokens in "
            f"{window.num_packs} packs of {self.recipe.pack_length}, "
            f"padding {100 * (1 - used / room):.2f} %, plan {window.hash()}"
        )
        if self.mixture.epoch_tokens and not self.evaluation:
            line += f", all epochs take {self.packs_of_epochs()} packs"
        return line

    def packs_of_epochs(self) -> int | None:
        """About how many packs hold the epochs that the sources ask for; None where they have weights instead."""
        if self.mixture.epoch_tokens is None:
            return None
        window = self.window_of(0)
        assert window is not None
        return -(-sum(self.mixture.weights) * window.num_packs // max(1, int(window.length.sum())))

    def state(self, pack: int) -> dict[str, Any]:
        """Where the window begins that holds a pack: a few integers, from which ``start_at`` plans it again."""
        window = self.window_of(pack)
        assert window is not None
        with self._lock:
            cursors = self._cursors[window.number - self._first_window]
        return {
            "window": window.number,
            "first_pack": window.first_pack,
            "cursors": {corpus.name: asdict(cursor) for corpus, cursor in zip(self.corpora, cursors, strict=True)},
        }

    def start_at(self, state: Mapping[str, Any]) -> None:
        """Begin at a window instead of planning all before it; the order is the same, if ``hash`` of a pack is.

        Raises:
            DataError: the state is of other corpora.
        """
        if set(state["cursors"]) != {corpus.name for corpus in self.corpora}:
            now = ", ".join(corpus.name for corpus in self.corpora)
            raise DataError(f"the saved order is of the corpora {', '.join(state['cursors'])}, the run's are {now}.")
        cursors = [Cursor(**state["cursors"][corpus.name]) for corpus in self.corpora]
        with self._lock:
            self._start(state["window"], state["first_pack"], cursors)

    def window_of(self, pack: int) -> Window | None:
        """The window that holds a pack, planned on demand; None past the end of an evaluation."""
        with self._lock:
            if self.evaluation:
                window = self._windows[0]
                return window if pack < window.next_pack else None
            if pack < self._first_packs[0]:
                self._start(0, 0, [Cursor()] * len(self.corpora))
            while True:
                number = bisect_right(self._first_packs, pack) - 1
                window = self._plan(self._first_window + number)
                if pack < window.next_pack:
                    return window

    def _start(self, window: int, first_pack: int, cursors: Sequence[Cursor]) -> None:
        """Know of no window but this one."""
        self._windows.clear()
        self._first_window, self._first_packs, self._cursors = window, [first_pack], [tuple(cursors)]

    def _plan(self, number: int) -> Window:
        window = self._windows.get(number)
        at = number - self._first_window
        if window is None:
            window = self.mixture.window(number, self._first_packs[at], self._cursors[at])
            for old in sorted(self._windows)[:-1]:  # a prefetching thread runs ahead: two windows are in use at most
                del self._windows[old]
            self._windows[number] = window
            self._report_overlong(window, self._cursors[at])
        if at + 1 == len(self._first_packs):
            self._first_packs.append(window.next_pack)
            self._cursors.append(window.after)
        return window

    def _report_overlong(self, window: Window, before: Sequence[Cursor]) -> None:
        """What the policy did to this window: nothing is left out in silence."""
        for corpus, old, new in zip(self.corpora, before, window.after, strict=True):
            if new.dropped > old.dropped or new.splits > old.splits:
                _log.info(
                    "%s, packs %d to %d: %d tokens in documents longer than a pack left out, %d cuts in such texts",
                    corpus.name,
                    window.first_pack,
                    window.next_pack,
                    new.dropped - old.dropped,
                    new.splits - old.splits,
                )

    def _tokenizer(self) -> TextTokenizer | None:
        """The one that the recipe names; where prompts need one, else the one that a corpus was written with."""
        if self.recipe.tokenizer:
            return TextTokenizer(self.recipe.tokenizer)
        folders = [corpus.tokenizer_folder for corpus in self.corpora] if self.recipe.templates != "none" else []
        return next((TextTokenizer(folder) for folder in folders if folder is not None), None)

    def _laid_out(self, corpus: Ints, document: Ints, epoch: Ints) -> tuple[Pieces, Ints]:
        """Pieces of documents, corpus by corpus, and which of the documents each of them is."""
        rows, parts = [], []
        for number in np.unique(corpus).tolist():
            mine = np.flatnonzero(corpus == number)
            rows.append(mine)
            parts.append(self.corpora[number].gather(epoch[mine], document[mine], eos=self.special.eos, number=number))
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            rows, parts = [none], [self.corpora[0].gather(none, none, eos=self.special.eos)]
        return self.assembler.lay_out(Stored.joined(parts)), np.concatenate(rows)

    def _refuse_lengths(self, found: Ints, planned: Ints, corpus: Ints, document: Ints) -> NoReturn:
        at = int(np.argmax(found != planned))
        owner = self.corpora[corpus[at]]
        raise DataError(
            f"{owner.name} document {document[at]} ({owner.source_of(int(document[at]))}): {found[at]} tokens, planned "
            f"were {planned[at]}. The files changed while they were in use."
        )

    def _refuse_ids(self, draft: Draft, packs: Sequence[int]) -> NoReturn:
        """An id outside the embedding would read foreign memory on a device: a flipped bit in `.bin` must stop here."""
        stray = find_stray(draft, self.filling)
        assert stray is not None
        number = packs[stray.pack]
        name, document = self.documents(number)[stray.document]
        corpus = next(corpus for corpus in self.corpora if corpus.name == name)
        names, limit = self.vocabulary.names, self.vocabulary.starts[-1] + self.vocabulary.codes[-1]
        what = f"is outside the vocabulary of {limit}"
        if 0 <= stray.id < limit:
            found = names[int(self.vocabulary.modality_of(np.asarray([stray.id]))[0])]
            what = f"stands in {'an image' if stray.in_image else 'text'}, and is {found} in the model's vocabulary"
        raise DataError(
            f"pack {number}: {name} document {document} ({corpus.source_of(document)}): id {stray.id} at position "
            f"{stray.position} of the pack {what}. The .bin is damaged or not what it says; write the corpus again."
        )


def _with_pads(pieces: Pieces, room: Ints) -> Pieces:
    """More documents, each a piece of so many pads."""
    zeros = np.zeros(len(room), dtype=np.int64)
    return Pieces(
        np.concatenate((pieces.starts, pieces.starts[-1] + 1 + np.arange(len(room)))),
        np.concatenate((pieces.address, zeros)),
        np.concatenate((pieces.length, room)),
        np.concatenate((pieces.flags, np.full(len(room), PAD | LITERAL, dtype=np.uint8))),
        np.concatenate((pieces.corpus, zeros.astype(np.int16))),
    )
