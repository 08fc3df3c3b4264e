"""Micro-batches out of pieces: equal to what ``make_microbatch`` makes of the same tokens."""

import re
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpora import BOI, EOI, EOS, PAD, TEXT, VOCABULARY, facts, pair, random_documents, write
from unimega.batch import make_microbatch
from unimega.data import format as layout
from unimega.data import native, rows
from unimega.data.collate import Rank
from unimega.data.corpus import Source
from unimega.data.loader import Loader, Place, step_batch
from unimega.data.plan import DataPlan, Recipe

LENGTH = 96
SCALE = np.asarray([2.0, 0.5], dtype=np.float32)
STEP_TOKENS = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Corpora of all kinds of documents, one without a sidecar in unsigned 16-bit integers."""
    folder = tmp_path_factory.mktemp("corpora")
    answers = [
        [(layout.mode(layout.VISION, context=True), [1, 2]), (layout.MODE_QUESTION, [8]), (layout.MODE_ANSWER, [9] * n)]
        for n in range(1, 30)
    ]
    write(folder / "mixed", random_documents(150, 1))
    write(folder / "answers", answers)
    write(folder / "long", [[(layout.MODE_TEXT, [8] * 95)], [(layout.MODE_TEXT, [9] * 80)]])
    texts = [[8 + n % 9] * n for n in range(1, 40)]
    lengths = np.asarray([len(text) for text in texts], dtype=np.int32)
    index = bytearray(b"".join(layout.index_parts(lengths, np.arange(40), np.zeros(39, dtype=np.int8))[:-1]))
    pointers = slice(34 + 4 * 39, 34 + 12 * 39)
    index[17], index[pointers] = 8, (np.frombuffer(bytes(index[pointers]), "<i8") // 2).tobytes()
    (folder / "plain.idx").write_bytes(index)
    (folder / "plain.bin").write_bytes(np.concatenate(texts).astype("<u2").tobytes())
    return folder


NAMES = ("mixed", "answers", "long", "plain")


def plan_of(folder, names=NAMES, **changes):
    values = {"pack_length": LENGTH, "templates": "none", "window_tokens": 1 << 13} | changes
    return DataPlan([Source(path=str(folder / name)) for name in names], VOCABULARY, Recipe(**values))


@pytest.fixture(scope="module")
def plan(folder):
    return plan_of(folder)


def assert_equal(one, other, name="batch"):
    if is_dataclass(one):
        for field in fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name), f"{name}.{field.name}")
    elif isinstance(one, tuple) and any(is_dataclass(item) for item in one):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b, name)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)
    else:
        assert one == other, name


def said_directly(plan, packs, rank):
    """The tokens of packs, one after another, through the function that defines the order."""
    parts = [plan.pack(number) for number in packs]
    modality = np.concatenate([part.modality for part in parts])
    return make_microbatch(
        np.concatenate([part.tokens for part in parts]),
        modality=modality,
        document=np.concatenate([part.document for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        loss_weights=SCALE[modality] * np.concatenate([part.mask for part in parts]),
        modalities=2,
        step_tokens=STEP_TOKENS,
        pack_length=LENGTH,
        tp_rank=rank.tp_rank,
        tp=rank.tp,
        sequence_parallel=rank.sequence_parallel,
        cross_document=rank.cross_document,
    )


@settings(max_examples=60, deadline=None)
@given(
    packs=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    cross=st.booleans(),
    tp_rank=st.integers(0, 1),
    sequence_parallel=st.booleans(),
)
def test_collating_pieces_is_making_a_microbatch(plan, packs, cross, tp_rank, sequence_parallel):
    rank = Rank(tp_rank=tp_rank, tp=2, sequence_parallel=sequence_parallel, cross_document=cross)
    batch = plan.collate(plan.draft(packs), packs, scale=SCALE, step_tokens=STEP_TOKENS, rank=rank)
    assert_equal(batch, said_directly(plan, packs, rank))


@pytest.fixture(scope="module")
def with_separators(folder):
    """<|vision_pad|> is the id 2 of the small vocabulary, and vision; images have 2, 9 and 16 codes."""
    vocabulary = replace(VOCABULARY, ids=((), (PAD, BOI)))
    special = facts()["tokenizer"]["special"] | {"pad": EOS, "vision_pad": PAD}
    tokenizer = facts()["tokenizer"] | {"special": special}
    last = pair([8], [31] * 16)  # a separator behind the last code of `.bin`
    path = write(folder / "rows", [*random_documents(80, 2, kinds="pi"), last], tokenizer=tokenizer)
    return {
        n: DataPlan(
            [Source(path=path)],
            vocabulary,
            Recipe(pack_length=40, templates="none", row_separator=n, window_tokens=1 << 12, overlong="split_text"),
        )
        for n in (1, 3, 4, 16, 17)
    }


@settings(max_examples=40, deadline=None)
@given(packs=st.lists(st.integers(0, 100), min_size=1, max_size=4), cross=st.booleans(), data=st.data())
def test_the_helper_fills_rows_as_its_twin_does(plan, with_separators, packs, cross, data):
    if native.helper is None:
        pytest.skip("unimega._data_index is not compiled: it needs a C++ compiler, then `make setup`")
    some = data.draw(st.sampled_from([plan, *with_separators.values()]))
    scale = np.asarray(data.draw(st.sampled_from([(2.0, 0.5), (0.0, 1.0), (0.0, 0.0)])), dtype=np.float32)
    options = {"pack_length": some.recipe.pack_length, "scale": scale, "cross_document": cross}
    draft = some.draft(packs)
    assert_equal(rows.rows(draft, some.filling, **options), rows.rows_python(draft, some.filling, **options))


def test_separators_end_the_rows_of_an_image(with_separators):
    seen = 0
    for n, plan in with_separators.items():
        for number in range(30):
            pack = plan.pack(number)
            assert (pack.modality[pack.tokens == PAD] == 1).all()
            text = " ".join(map(str, pack.tokens.tolist()))
            for image in re.findall(rf"\b{BOI} ([\d ]*?) {EOI}\b", text):
                ids = [int(one) for one in image.split()]
                codes = [one for one in ids if one >= TEXT]
                assert len(ids) == len(codes) + len(codes) // n
                assert [place for place, one in enumerate(ids) if one == PAD] == list(range(n, len(ids), n + 1))
                seen += PAD in ids
    assert seen > 50


def test_full_packs_and_pads_between_documents_occur(plan):
    pads = [plan.collate(plan.draft([n]), [n], scale=SCALE, step_tokens=STEP_TOKENS).order.pads for n in range(120)]
    assert 0 in pads and max(pads) > 3, "the test above has not seen all cases"


def test_packs_of_pads_alone(tmp_path):
    prefix = write(tmp_path / "a", [pair([8], [1, 2])])
    plan = DataPlan([Source(path=prefix)], VOCABULARY, Recipe(pack_length=LENGTH, templates="none"), evaluation=True)
    for packs in ([5], [5, 6], [5, 0, 6]):
        for cross in (False, True):
            rank = Rank(cross_document=cross)
            batch = plan.collate(plan.draft(packs), packs, scale=SCALE, step_tokens=STEP_TOKENS, rank=rank)
            assert_equal(batch, said_directly(plan, packs, rank))
    assert batch.order.pads == 3 * LENGTH - 6


def test_no_text_in_a_corpus_of_a_text_model(tmp_path):
    """One modality: no vision anywhere."""
    words = VOCABULARY.__class__(names=("text",), starts=(0,), codes=(22,), rows=22, ids=((),))
    prefix = write(tmp_path / "a", random_documents(20, 4, kinds="t"))
    plan = DataPlan([Source(path=prefix)], words, Recipe(pack_length=LENGTH, templates="none"))
    (batch,) = step_batch(plan, 0, Place(global_batch_packs=2, micro_batch_packs=2), [3.0]).microbatches
    assert batch.order.counts == (2 * LENGTH,) and batch.loss_counts == (len(batch.loss_rows),)
    assert batch.loss_weights.sum() == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(
    total=st.sampled_from([4, 8, 16]),
    first=st.integers(0, 60),
    count=st.integers(1, 40),
    prefetch=st.integers(1, 3),
    data=st.data(),
)
def test_any_layout_any_start_any_prefetch_gives_the_same_packs(plan, total, first, count, prefetch, data):
    """By formula: the loaders of all ranks together give packs s G .. (s + 1) G of every step, whenever they start."""
    dp = data.draw(st.sampled_from([d for d in (1, 2, 4, 8) if total % d == 0]))
    micro = data.draw(st.sampled_from([m for m in (1, 2, 4) if total % (dp * m) == 0]))
    steps = range(first, first + min(count, 64 // total))
    loaders = [
        Loader(
            plan,
            Place(global_batch_packs=total, micro_batch_packs=micro, dp_rank=rank, dp=dp),
            [1.0, 1.0],
            first_step=first,
            last_step=steps.stop,
            prefetch_steps=prefetch,
        )
        for rank in range(dp)
    ]
    for step in steps:
        found = {}
        for rank, loader in enumerate(loaders):
            batch = next(loader)
            assert batch.step == step
            for accumulation, one in enumerate(batch.microbatches):
                tokens = one.tokens[one.order.inverse].reshape(micro, LENGTH)
                for i in range(micro):
                    found[(accumulation * dp + rank) * micro + i] = tokens[i]
        assert sorted(found) == list(range(total))
        for place, tokens in found.items():
            assert np.array_equal(tokens, plan.pack(step * total + place).tokens)
    assert all(next(loader, None) is None for loader in loaders)


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_blocks_change_nothing(plan, monkeypatch, block):
    monkeypatch.setattr("unimega.data.loader.BLOCK_PACKS", block)
    place = Place(global_batch_packs=4, micro_batch_packs=2)
    for batch in Loader(plan, place, [4.0, 1.0], first_step=2, last_step=40):
        assert_equal(batch, step_batch(plan, batch.step, place, [4.0, 1.0]))


def test_begin_of_image_is_vision_and_its_end_is_text(plan):
    packs = list(range(20))
    batch = plan.collate(plan.draft(packs), packs, scale=SCALE, step_tokens=STEP_TOKENS)
    at = np.flatnonzero(batch.tokens == BOI)
    assert len(at) and (at >= batch.order.counts[0]).all()
