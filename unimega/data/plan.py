"""The order of a run: which tokens lie in pack g, for any g, as a pure function of seed and corpora.

Global packs are numbered 0, 1, 2, ...; step s of G packs takes [s G, (s + 1) G). Ranks, micro-batches and workers only
choose which of them to build. Every rank computes the same plan; there is no cache and no barrier.
"""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unimega import log
from unimega.batch import Microbatch, make_microbatch
from unimega.config.vocabulary import Vocabulary
from unimega.data import format as layout
from unimega.data import templates
from unimega.data.assemble import Assembler
from unimega.data.corpus import Corpus, Source
from unimega.data.mixture import Cursor, Mixture, Window
from unimega.data.tokenize import SpecialIds, TextTokenizer
from unimega.errors import ConfigError, DataError

_log = log.get(__name__)
_MANY_EPOCHS, _WIDE_WINDOW_TOKENS = 1000, 1 << 22
EVALUATION_SEED = 0
"""Evaluation reads the same packs in every run."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How stored documents become packs; the keys of `[data]`."""

    pack_length: int
    t2i_ratio: float = 0.5
    unconditional_ratio: float = 0.1
    mask_instructions: bool = True
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
        _refuse_equal_names(self.corpora)
        tokenizer = self._tokenizer()
        self.special = _check_corpora(self.corpora, vocabulary, tokenizer)
        seed = EVALUATION_SEED if evaluation else recipe.seed
        self.assembler = Assembler(
            vocabulary,
            self.special,
            templates.load(recipe.templates, tokenizer),
            seed=seed,
            t2i_ratio=recipe.t2i_ratio,
            unconditional_ratio=recipe.unconditional_ratio,
            mask_instructions=recipe.mask_instructions,
        )
        self.mixture = Mixture(
            self.corpora,
            self.assembler,
            seed=seed,
            pack_length=recipe.pack_length,
            window_tokens=recipe.window_tokens,
            overlong=recipe.overlong,
        )
        self._lock = threading.Lock()
        self._first_packs = [0]
        self._cursors = [tuple(Cursor() for _ in self.corpora)]
        self._windows: dict[int, Window] = {}
        if evaluation:
            self._windows[0] = self.mixture.epoch()
        else:
            self._warn_of_wide_window()
        _log.info("%s", self.describe())

    @property
    def num_packs(self) -> int | None:
        """Packs of an evaluation; None for training, which never ends."""
        return self._windows[0].packs.num_packs if self.evaluation else None

    def num_steps(self, global_batch_packs: int) -> int:
        """Steps that show every pack of an evaluation; the last one is filled with pads."""
        if self.num_packs is None:
            raise ValueError("training data never ends")
        return -(-self.num_packs // global_batch_packs)

    def pack(self, number: int) -> Pack:
        """Global pack ``number``."""
        length, pad = self.recipe.pack_length, self.special.pad
        tokens = np.full(length, pad, dtype=np.int32)
        document = np.zeros(length, dtype=np.int32)
        wanted = np.zeros(length + 1, dtype=np.bool_)
        window = self._window_of(number)
        items = np.zeros(0, dtype=np.int64)
        expected = np.zeros(len(self.vocabulary.names), dtype=np.int64)
        if window is not None:
            at = number - window.first_pack
            items = window.packs.items[window.packs.starts[at] : window.packs.starts[at + 1]]
            expected = window.pack_targets[at]
        place = 0
        for count, item in enumerate(items.tolist(), start=1):
            assert window is not None
            stop = place + int(window.choices.length[item])
            self.assembler.build(
                self.corpora[window.corpus[item]],
                int(window.document[item]),
                int(window.choices.variant[item]),
                int(window.choices.prompt[item]),
                tokens[place:stop],
                wanted[place:stop],
            )
            document[place:stop] = count
            place = stop
        self._check_range(number, tokens, place)
        modality = self.vocabulary.modality_of(tokens)
        modality[place:] = layout.TEXT
        inside = np.zeros(length, dtype=np.bool_)
        inside[:-1] = (document[1:] == document[:-1]) & (document[1:] > 0)
        labels = np.full(length, pad, dtype=np.int32)
        labels[:-1][inside[:-1]] = tokens[1:][inside[:-1]]
        mask = wanted[1:] & inside
        if not np.array_equal(np.bincount(modality[mask], minlength=len(expected)), expected):
            self._refuse_pack(number, window, items, modality, mask, expected)
        return Pack(tokens, modality, document, labels, mask)

    def documents(self, pack: int) -> list[tuple[str, int]]:
        """(name of the corpus, number of the document) of all that a pack holds."""
        window = self._window_of(pack)
        if window is None:
            return []
        at = pack - window.first_pack
        items = window.packs.items[window.packs.starts[at] : window.packs.starts[at + 1]]
        return [(self.corpora[window.corpus[item]].name, int(window.document[item])) for item in items.tolist()]

    def targets(self, step: int, *, global_batch_packs: int) -> npt.NDArray[np.int64]:
        """int64 [M]: targets per modality of the input token in all packs of a step; none has to be built for it."""
        total = np.zeros(len(self.vocabulary.names), dtype=np.int64)
        number, stop = step * global_batch_packs, (step + 1) * global_batch_packs
        while number < stop:
            window = self._window_of(number)
            if window is None:
                break
            until = min(stop, window.next_pack)
            total += window.pack_targets[number - window.first_pack : until - window.first_pack].sum(axis=0)
            number = until
        return total

    def microbatches(
        self,
        step: int,
        *,
        global_batch_packs: int,
        micro_batch_packs: int,
        loss_scale: Sequence[float],
        dp_rank: int = 0,
        dp: int = 1,
        tp_rank: int = 0,
        tp: int = 1,
        sequence_parallel: bool = False,
        cross_document: bool = False,
    ) -> list[Microbatch]:
        """This rank's micro-batches of a step: pack i of micro-batch a is global pack ``s G + (a dp + r) m + i``.

        Args:
            global_batch_packs: a multiple of dp x micro_batch_packs, as ``config.rules`` has checked.
            loss_scale: weight of a target per modality of its input token, divided by the step's denominator already.

        Raises:
            DataError: a document cannot be read as planned.
        """
        scale = np.asarray(loss_scale, dtype=np.float64).astype(np.float32)
        result = []
        for accumulation in range(global_batch_packs // (dp * micro_batch_packs)):
            first = step * global_batch_packs + (accumulation * dp + dp_rank) * micro_batch_packs
            packs = [self.pack(number) for number in range(first, first + micro_batch_packs)]
            modality = np.concatenate([pack.modality for pack in packs])
            mask = np.concatenate([pack.mask for pack in packs])
            result.append(
                make_microbatch(
                    np.concatenate([pack.tokens for pack in packs]),
                    modality=modality,
                    document=np.concatenate([pack.document for pack in packs]),
                    labels=np.concatenate([pack.labels for pack in packs]),
                    loss_weights=scale[modality] * mask,
                    modalities=len(self.vocabulary.names),
                    pack_length=self.recipe.pack_length,
                    cross_document=cross_document,
                    tp_rank=tp_rank,
                    tp=tp,
                    sequence_parallel=sequence_parallel,
                )
            )
        return result

    def hash(self, pack: int = 0) -> str:
        """16 hex digits of the window that holds a pack; equal on all ranks, and after a resume."""
        window = self._window_of(pack)
        return window.hash() if window is not None else ""

    def describe(self) -> str:
        """One line for the log: what the corpora hold, and how full the packs of the first window are."""
        window = self._window_of(0)
        assert window is not None
        total = max(1, sum(corpus.weight for corpus in self.corpora))
        used = int(window.choices.length.sum())
        room = window.packs.num_packs * self.recipe.pack_length
        kind, extent = ("evaluation", "All") if self.evaluation else ("training", "First window")
        parts = [f"{c.name} {c.num_documents} documents {100 * c.weight / total:.2f} %" for c in self.corpora]
        dropped = sum(cursor.dropped for cursor in window.after)
        line = (
            f"{kind} data: {'; '.join(parts)}. "
            f"{extent}: {len(window.document)} documents, {used} tokens in "
            f"{window.packs.num_packs} packs of {self.recipe.pack_length}, "
            f"padding {100 * (1 - used / max(1, room)):.2f} %, plan {window.hash()}"
        )
        return line + (f", {dropped} tokens dropped (longer than a pack)" if dropped else "")

    def _warn_of_wide_window(self) -> None:
        total = sum(corpus.weight for corpus in self.corpora)
        for corpus in self.corpora:
            stored = int(corpus.reader.lengths.sum(dtype=np.int64))
            epochs = self.recipe.window_tokens * corpus.weight / total / max(1, stored)
            if epochs > _MANY_EPOCHS and self.recipe.window_tokens > _WIDE_WINDOW_TOKENS:
                _log.warning(
                    "data.window_tokens=%d plans about %d epochs of %s at once: time and memory at the start. "
                    "Set less, such as %d.",
                    self.recipe.window_tokens,
                    epochs,
                    corpus.name,
                    _WIDE_WINDOW_TOKENS,
                )

    def _tokenizer(self) -> TextTokenizer | None:
        """The one that the recipe names; where prompts need one, else the one that a corpus was written with."""
        if self.recipe.tokenizer:
            return TextTokenizer(self.recipe.tokenizer)
        folders = [corpus.tokenizer_folder for corpus in self.corpora] if self.recipe.templates != "none" else []
        return next((TextTokenizer(folder) for folder in folders if folder is not None), None)

    def _window_of(self, pack: int) -> Window | None:
        """The window that holds a pack, planned on demand; None past the end of an evaluation."""
        with self._lock:
            if self.evaluation:
                window = self._windows[0]
                return window if pack < window.next_pack else None
            while True:
                number = bisect_right(self._first_packs, pack) - 1
                window = self._plan(number)
                if pack < window.next_pack:
                    return window

    def _plan(self, number: int) -> Window:
        window = self._windows.get(number)
        if window is None:
            window = self.mixture.window(number, self._first_packs[number], self._cursors[number])
            for old in sorted(self._windows)[:-1]:  # a prefetching thread runs ahead: two windows are in use at most
                del self._windows[old]
            self._windows[number] = window
        if number + 1 == len(self._first_packs):
            self._first_packs.append(window.next_pack)
            self._cursors.append(window.after)
        return window

    def _check_range(self, number: int, tokens: npt.NDArray[np.int32], used: int) -> None:
        """An id outside the embedding would read foreign memory on a device: a flipped bit in `.bin` must stop here."""
        limit = self.vocabulary.starts[-1] + self.vocabulary.codes[-1]
        bad = (tokens[:used] < 0) | (tokens[:used] >= limit)
        if bad.any():
            at = int(np.argmax(bad))
            names = ", ".join(corpus.name for corpus in self.corpora)
            raise DataError(
                f"pack {number} of {names}: id {tokens[at]} at position {at} is outside the vocabulary of {limit}. "
                "The .bin is damaged; write the corpus again."
            )

    def _refuse_pack(
        self,
        number: int,
        window: Window | None,
        items: npt.NDArray[np.int64],
        modality: npt.NDArray[np.uint8],
        mask: npt.NDArray[np.bool_],
        expected: npt.NDArray[np.int64],
    ) -> None:
        found = np.bincount(modality[mask], minlength=len(expected)).tolist()
        names = ""
        if window is not None:
            names = ", ".join(f"{self.corpora[window.corpus[i]].name} {window.document[i]}" for i in items[:8].tolist())
        raise DataError(
            f"pack {number} (documents {names}): targets per modality are {found}, planned were {expected.tolist()}. "
            "A text holds ids that the model counts as vision, or the files changed or are damaged."
        )


def _refuse_equal_names(corpora: Sequence[Corpus]) -> None:
    seen: dict[str, Corpus] = {}
    for corpus in corpora:
        if corpus.name in seen:
            raise ConfigError(
                f"data.train: '{seen[corpus.name].source.path}' and '{corpus.source.path}' are both named "
                f"'{corpus.name}'. The name seeds the order; rename one."
            )
        seen[corpus.name] = corpus


def _check_corpora(corpora: Sequence[Corpus], vocabulary: Vocabulary, tokenizer: TextTokenizer | None) -> SpecialIds:
    """Compare what the corpora were made with to each other and to the model; returns their special ids."""
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
    if special is None:
        raise ConfigError(
            "data.tokenizer is absent, and no corpus has a sidecar that names eos. Name the tokenizer's folder."
        )
    return special
