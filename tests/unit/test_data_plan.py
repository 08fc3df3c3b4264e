"""The order of a run: shares, epochs, independence of ranks, evaluation, prefetching."""

import collections
import json
import logging
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpora import EOS, FIRST_WORD, VOCABULARY, facts, pair, random_documents, write
from unimega.data import format as layout
from unimega.data import native
from unimega.data.corpus import vision_ids
from unimega.data.loader import Loader, Place, step_batch
from unimega.data.mixture import Cursor, interleaved
from unimega.data.plan import DataPlan, Recipe, Source
from unimega.errors import ConfigError, DataError


def recipe(**changes) -> Recipe:
    return Recipe(**({"pack_length": 96, "templates": "none", "window_tokens": 1 << 13} | changes))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "text": write(folder / "text", random_documents(300, 1, kinds="t")),
        "pairs": write(folder / "pairs", random_documents(200, 2, kinds="p")),
        "mixed": write(folder / "mixed", random_documents(70, 3, kinds="i")),
    }


def sources_of(corpora, **weights):
    return [Source(path=corpora[name], weight=weight) for name, weight in weights.items()]


MIX = {"text": 35.0, "pairs": 50.0, "mixed": 15.0}


@pytest.fixture(scope="module")
def plan(corpora):
    return DataPlan(sources_of(corpora, **MIX), VOCABULARY, recipe())


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), weights=st.tuples(*[st.floats(0.05, 1)] * 3), windows=st.integers(1, 6))
def test_shares_and_epochs(corpora, seed, weights, windows):
    """Each document once per epoch, epoch after epoch, and each corpus within a document of its share of tokens."""
    plan = DataPlan(sources_of(corpora, **dict(zip(MIX, weights, strict=True))), VOCABULARY, recipe(seed=seed))
    cursors, first = tuple(Cursor() for _ in weights), 0
    seen = [collections.Counter(), collections.Counter(), collections.Counter()]
    total = sum(plan.mixture.weights)
    for number in range(windows):
        window = plan.mixture.window(number, first, cursors)
        for index, weight in enumerate(plan.mixture.weights):
            mine = window.corpus == index
            seen[index].update(zip(window.epoch[mine].tolist(), window.document[mine].tolist(), strict=True))
            after = window.after[index]
            goal = (number + 1) * plan.recipe.window_tokens * weight // total
            assert goal <= after.tokens < goal + window.length[mine].max(), "what is too much is settled later"
            assert after.documents == seen[index].total()
            assert after.tokens - cursors[index].tokens == window.length[mine].sum()
        cursors, first = window.after, window.next_pack
    for corpus, found in zip(plan.corpora, seen, strict=True):
        assert set(found.values()) == {1}
        whole, rest = divmod(len(found), corpus.num_documents)
        per_epoch = collections.Counter(epoch for epoch, _ in found)
        assert per_epoch == dict.fromkeys(range(whole), corpus.num_documents) | ({whole: rest} if rest else {})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=60), min_size=1, max_size=4).filter(any))
def test_in_any_prefix_every_list_is_near_its_share(lists):
    lengths = [np.asarray(values, dtype=np.int64) for values in lists]
    turn = interleaved(lengths)
    origin = np.repeat(np.arange(len(lists)), [len(values) for values in lists])[turn]
    length = np.concatenate(lengths)[turn]
    assert all((np.diff(turn[origin == index]) > 0).all() for index in range(len(lists)))
    running = np.stack([np.cumsum(length * (origin == index)) for index in range(len(lists))])
    shares = running[:, -1] / running[:, -1].sum()
    assert np.abs(running - shares[:, None] * running.sum(axis=0)).max() <= len(lists) * length.max()


def test_every_document_lies_in_one_pack(plan):
    window = plan.window_of(0)
    sums = np.add.reduceat(window.length, window.starts[:-1])
    assert sums.max() <= 96 and window.starts[-1] == len(window.document)
    assert [(plan.pack(n).document > 0).sum() for n in range(window.next_pack)] == sums.tolist()


def test_another_corpus_moves_nobody(corpora):
    alone = DataPlan(sources_of(corpora, pairs=1.0), VOCABULARY, recipe())
    joined = DataPlan(sources_of(corpora, text=1.0, pairs=1.0), VOCABULARY, recipe())
    one, two = (plan.mixture.window(0, 0, [Cursor()] * len(plan.corpora)) for plan in (alone, joined))
    mine = two.corpus == 1
    drawn = {
        (epoch, document): length
        for epoch, document, length in zip(one.epoch.tolist(), one.document.tolist(), one.length.tolist(), strict=True)
    }
    assert mine.sum() > 100
    for epoch, document, length in zip(
        two.epoch[mine].tolist(), two.document[mine].tolist(), two.length[mine].tolist(), strict=True
    ):
        assert drawn[epoch, document] == length


def test_the_order_follows_the_seed_alone(corpora, plan):
    again = DataPlan(sources_of(corpora, **MIX), VOCABULARY, recipe())
    last = plan.window_of(0).next_pack + 3
    assert plan.hash() == again.hash() and equal(plan.pack(5), again.pack(5))
    late = again.pack(last)  # asked for out of order
    assert equal(plan.pack(last), late) and equal(plan.pack(0), again.pack(0))
    other = DataPlan(sources_of(corpora, **MIX), VOCABULARY, recipe(seed=2))
    assert other.hash() != plan.hash() and not equal(other.pack(0), plan.pack(0))


def test_far_packs_need_two_windows_in_memory(corpora):
    plan = DataPlan(sources_of(corpora, **MIX), VOCABULARY, recipe())
    plan.pack(600)
    assert len(plan._first_packs) > 4 and len(plan._windows) <= 2
    assert plan.pack(0).mask.any() and len(plan._windows) <= 2


def test_a_plan_begins_at_any_window(corpora, plan):
    """From a few integers: what comes is what would have come, and what was is still there."""
    far = plan.window_of(0).next_pack * 5 // 2
    state = json.loads(json.dumps(plan.state(far)))
    later = DataPlan(sources_of(corpora, **MIX), VOCABULARY, recipe())
    later.start_at(state)
    assert later.hash(far) == plan.hash(far) and len(later._first_packs) == 2
    assert all(equal(later.pack(n), plan.pack(n)) for n in (far, far + 400))
    assert equal(later.pack(3), plan.pack(3)) and equal(later.pack(far + 1), plan.pack(far + 1))
    with pytest.raises(DataError, match=r"of the corpora text, pairs, mixed, the run's are text\."):
        DataPlan(sources_of(corpora, text=1), VOCABULARY, recipe()).start_at(state)


def test_epochs_instead_of_weights(corpora):
    sources = [Source(path=corpora[name], epochs=epochs) for name, epochs in (("text", 1.0), ("pairs", 3.0))]
    plan = DataPlan(sources, VOCABULARY, recipe())
    packs = plan.packs_of_epochs()
    assert f"all epochs take {packs} packs" in plan.describe()
    read = collections.Counter(document for number in range(packs) for document in plan.documents(number))
    assert {name for name, _ in read} == {"text", "pairs"}
    text = [read["text", document] for document in range(300)]
    pairs = [read["pairs", document] for document in range(200)]
    # how full packs are is taken from the first window; windows of 8,192 tokens differ by some per cent
    assert np.mean(text) == pytest.approx(1, abs=0.05) and np.mean(pairs) == pytest.approx(3, abs=0.15)
    assert max(text) <= 2 and min(pairs) >= 2
    assert DataPlan(sources_of(corpora, text=1), VOCABULARY, recipe()).packs_of_epochs() is None


def test_epochs_of_a_large_corpus_are_estimated_from_its_first_documents(corpora, monkeypatch):
    exact = DataPlan([Source(path=corpora["text"], epochs=1.0)], VOCABULARY, recipe()).mixture.epoch_tokens
    monkeypatch.setattr("unimega.data.mixture._SAMPLED_DOCUMENTS", 150)
    about = DataPlan([Source(path=corpora["text"], epochs=1.0)], VOCABULARY, recipe()).mixture.epoch_tokens
    assert exact != about and about[0] == pytest.approx(exact[0], rel=0.1)


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_and_microbatches_only_share_the_packs_out(plan, dp, micro):
    border = plan.window_of(0).next_pack // 8  # a step that crosses windows
    for step in (0, border):
        by_pack = {}
        tokens = sum(int(np.count_nonzero(plan.pack(step * 8 + number).document)) for number in range(8))
        for rank in range(dp):
            place = Place(global_batch_packs=8, micro_batch_packs=micro, dp_rank=rank, dp=dp)
            batch = step_batch(plan, step, place, [4.0, 1.0])
            for accumulation, micro_batch in enumerate(batch.microbatches):
                rows = micro_batch.tokens[micro_batch.order.inverse].reshape(micro, 96)
                weights = micro_batch.loss_weights[micro_batch.order.inverse].reshape(micro, 96)
                assert micro_batch.step_tokens == tokens  # what losses of routers are divided by
                for i in range(micro):
                    by_pack[(accumulation * dp + rank) * micro + i] = rows[i], weights[i]
        assert sorted(by_pack) == list(range(8))
        for number, (ids, weights) in by_pack.items():
            pack = plan.pack(step * 8 + number)
            assert np.array_equal(ids, pack.tokens)
            assert np.array_equal(weights > 0, pack.mask)
        total = sum(float(weights.astype(np.float64).sum()) for _, weights in by_pack.values())
        assert total == pytest.approx(1.0, rel=1e-5)
        assert batch.denominator == 4.0 * batch.targets[0] + batch.targets[1]


def test_targets_are_what_the_packs_hold(plan):
    for step in range(0, 40, 7):
        packs = [plan.pack(step * 8 + number) for number in range(8)]
        found = sum(np.bincount(pack.modality[pack.mask], minlength=2) for pack in packs)
        assert np.array_equal(plan.targets(step, global_batch_packs=8), found)


def test_tensor_parallel_ranks_get_their_rows(plan):
    for rank in range(2):
        place = Place(global_batch_packs=1, micro_batch_packs=1, tp_rank=rank, tp=2, sequence_parallel=True)
        (batch,) = step_batch(plan, 0, place, [1, 1]).microbatches
        assert sum(batch.order.local_counts) == 48


def test_evaluation_shows_everything_once_and_then_pads(corpora):
    plan = DataPlan(sources_of(corpora, text=1.0, pairs=1.0), VOCABULARY, recipe(seed=9), evaluation=True)
    same = DataPlan(sources_of(corpora, text=5.0, pairs=1.0), VOCABULARY, recipe(seed=7), evaluation=True)
    assert plan.hash() == same.hash()
    documents = sum(int(plan.pack(n).document.max()) for n in range(plan.num_packs))
    assert documents == 500
    steps = plan.num_steps(64)
    assert (steps - 1) * 64 < plan.num_packs <= steps * 64
    last = step_batch(plan, steps - 1, Place(global_batch_packs=64, micro_batch_packs=1), [1.0, 1.0])
    assert last.microbatches[-1].order.pads == 96 and not len(last.microbatches[-1].loss_rows)
    beyond = step_batch(plan, plan.num_packs, Place(global_batch_packs=2, micro_batch_packs=2), [1.0, 1.0])
    assert beyond.targets == (0, 0) and beyond.denominator == 0.0 and not beyond.microbatches[0].loss_weights.any()
    assert beyond.microbatches[0].step_tokens == 0


def test_over_long_documents(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="unimega.data.plan")
    documents = [[(layout.MODE_TEXT, [FIRST_WORD + n % 9] * n)] for n in (10, 96, 95, 30)]
    prefix = write(tmp_path / "a", documents)
    with pytest.raises(
        DataError, match=r"a document 1 \(rows.jsonl\): 97 tokens, data.pack_length is 96; .* Raise it to >= 128 or set"
    ):
        DataPlan([Source(path=prefix)], VOCABULARY, recipe(), evaluation=True)
    plan = DataPlan([Source(path=prefix)], VOCABULARY, recipe(overlong="drop", window_tokens=1 << 12))
    window = plan.window_of(0)
    (cursor,) = window.after
    drawn = collections.Counter(plan.corpora[0].stream(1, 0, cursor.documents)[1].tolist())
    assert cursor.dropped == 97 * drawn[1] and cursor.tokens == window.length.sum() >= 1 << 12
    assert cursor.tokens == sum((plan.pack(n).document > 0).sum() for n in range(window.next_pack))
    assert 1 not in window.document
    plan.pack(window.next_pack)
    told = [record.getMessage() for record in caplog.records if "longer than a pack left out" in record.getMessage()]
    left_out = f"{cursor.dropped} tokens in documents longer than a pack left out, 0 cuts in such texts"
    assert told[0] == f"a, packs 0 to {window.next_pack}: {left_out}"
    assert len(told) == 2, "each window tells"
    whole = DataPlan([Source(path=prefix)], VOCABULARY, recipe(overlong="drop"), evaluation=True)
    assert sorted(whole.window_of(0).document.tolist()) == [0, 2, 3]
    image = write(tmp_path / "image", [pair([8], [0] * 95)])
    with pytest.raises(DataError, match=r"image document 0 .*: image of 97 tokens, data.pack_length is 96"):
        DataPlan([Source(path=image)], VOCABULARY, recipe(overlong="drop"))
    giant = write(tmp_path / "giant", documents[1:2])
    with pytest.raises(DataError, match=r"giant: every document is longer than data.pack_length=96"):
        DataPlan([Source(path=giant)], VOCABULARY, recipe(overlong="drop"))


def spans(plan):
    """(document, begin, tokens) of all items of an evaluation."""
    window = plan.window_of(0)
    return sorted(zip(window.document.tolist(), window.begin.tolist(), window.length.tolist(), strict=True))


def test_texts_are_split_and_images_are_not(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="unimega.data.plan")
    image = (layout.MODE_IMAGE, [1] * 30)
    documents = [
        [(layout.MODE_TEXT, [FIRST_WORD + n % 9 for n in range(200)])],
        [(layout.MODE_TEXT, [8] * 80), image, (layout.MODE_TEXT, [9] * 60)],
        [image, image, image, image],
        pair([8] * 120, [2] * 20),
        [(layout.MODE_TEXT, [8] * 30)],
    ]
    prefix = write(tmp_path / "a", documents)
    plan = DataPlan(
        [Source(path=prefix, direction="t2i")],
        VOCABULARY,
        recipe(overlong="split_text", unconditional_ratio=0.0),
        evaluation=True,
    )
    found = spans(plan)
    assert found[:3] == [(0, 0, 96), (0, 96, 96), (0, 192, 9)]
    assert found[3:5] == [(1, 0, 80), (1, 80, 93)], "the image that would be cut starts the next part"
    assert found[5:7] == [(2, 0, 96), (2, 96, 33)], "a cut between two images"
    assert found[7:9] == [(3, 0, 96), (3, 96, 47)] and found[9] == (4, 0, 31)
    (cursor,) = plan.window_of(0).after
    assert cursor.splits == 5 and cursor.dropped == 0
    assert "0 tokens in documents longer than a pack left out, 5 cuts in such texts" in caplog.text
    seen = {}
    for number in range(plan.num_packs):
        pack = plan.pack(number)
        window = plan.window_of(0)
        items = range(*window.starts[number : number + 2])
        for place, item in enumerate(items, start=1):
            rows = np.flatnonzero(pack.document == place)
            assert not pack.mask[rows[-1]]
            seen[int(window.document[item]), int(window.begin[item])] = pack.tokens[rows].tolist()
    whole = seen[0, 0] + seen[0, 96] + seen[0, 192]
    assert whole == [FIRST_WORD + n % 9 for n in range(200)] + [EOS]
    assert seen[3, 0] == [8] * 96 and seen[3, 96] == [8] * 24 + [3] + [24] * 20 + [4, EOS]
    total = sum(np.bincount(pack.modality[pack.mask], minlength=2) for pack in map(plan.pack, range(plan.num_packs)))
    assert np.array_equal(total, plan.targets(0, global_batch_packs=plan.num_packs))
    too_long = write(tmp_path / "image", [pair([8], [0] * 95)])
    with pytest.raises(DataError, match=r"image of 97 tokens, data.pack_length is 96"):
        DataPlan([Source(path=too_long)], VOCABULARY, recipe(overlong="split_text"))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(20, 60),
    policy=st.sampled_from(["drop", "split_text"]),
    masked=st.booleans(),
)
def test_tokens_in_are_tokens_placed_and_tokens_dropped(tmp_path_factory, seed, length, policy, masked):
    """And every token of every document lies in exactly one pack, no image in two."""
    long = [part for document in random_documents(4, seed + 1, kinds="ti") for part in document]
    documents = [*random_documents(25, seed), long]
    prefix = write(tmp_path_factory.mktemp("a") / "a", documents)
    make = {"vocabulary": VOCABULARY, "evaluation": True}
    whole = DataPlan([Source(path=prefix)], recipe=recipe(pack_length=400, mask_instructions=masked), **make)
    plan = DataPlan(
        [Source(path=prefix)], recipe=recipe(pack_length=length, overlong=policy, mask_instructions=masked), **make
    )
    (cursor,), (everything,) = plan.window_of(0).after, whole.window_of(0).after
    assert cursor.tokens + cursor.dropped == everything.tokens and cursor.documents == everything.documents == 26

    def laid_out(plan):
        parts = {}
        for number in range(plan.num_packs):
            pack, window = plan.pack(number), plan.window_of(0)
            for place, item in enumerate(range(*window.starts[number : number + 2]), start=1):
                rows = pack.document == place
                assert rows.sum() == window.length[item]
                ids = pack.tokens[rows].tolist()
                assert ids.count(3) == ids.count(4), "an image was cut"
                parts[int(window.document[item]), int(window.begin[item])] = ids
        joined = collections.defaultdict(list)
        for (document, _), ids in sorted(parts.items()):
            joined[document] += ids
        return joined

    full, got = laid_out(whole), laid_out(plan)
    assert full.keys() == set(range(26))
    kept = {d: ids for d, ids in full.items() if policy == "split_text" or len(ids) <= length}
    assert got == kept
    total = sum(np.bincount(pack.modality[pack.mask], minlength=2) for pack in map(plan.pack, range(plan.num_packs)))
    assert np.array_equal(total, plan.targets(0, global_batch_packs=plan.num_packs))


def test_corpora_that_do_not_go_together(tmp_path, corpora):
    other = facts()["tokenizer"] | {"sha256": "beef"}
    stranger = write(tmp_path / "stranger", random_documents(3, 0), tokenizer=other)
    with pytest.raises(DataError, match=r"stranger.json: made with tokenizer beef, text has f00d"):
        DataPlan([*sources_of(corpora, text=1.0), Source(path=stranger)], VOCABULARY, recipe())
    twin = write(tmp_path / "text", random_documents(3, 0))
    with pytest.raises(ConfigError, match=r"are both named 'text'"):
        DataPlan([*sources_of(corpora, text=1.0), Source(path=twin)], VOCABULARY, recipe())
    DataPlan([*sources_of(corpora, text=1.0), Source(path=twin, name="twin")], VOCABULARY, recipe())
    empty = write(tmp_path / "empty", [])
    with pytest.raises(DataError, match=r"0 documents. A corpus needs at least one"):
        DataPlan([Source(path=empty)], VOCABULARY, recipe())
    audio = write(tmp_path / "audio", [[(layout.mode(2), [1])]])
    with pytest.raises(DataError, match=r"a sequence of modality 2; known are"):
        DataPlan([Source(path=audio)], VOCABULARY, recipe())


def test_megatron_text_joins_ours(tmp_path, corpora):
    prefix = tmp_path / "plain"
    texts = [[8, 9, EOS], [10], [11, 12]]
    lengths = np.asarray([len(t) for t in texts], dtype=np.int32)
    parts = layout.index_parts(lengths, np.arange(4, dtype=np.int64), np.zeros(3, dtype=np.int8))
    (tmp_path / "plain.idx").write_bytes(b"".join(parts[:-1]))
    (tmp_path / "plain.bin").write_bytes(np.asarray([i for ids in texts for i in ids], dtype="<i4").tobytes())
    with pytest.raises(ConfigError, match=r"no corpus has a sidecar that names eos"):
        DataPlan([Source(path=str(prefix))], VOCABULARY, recipe())
    plan = DataPlan([Source(path=str(prefix)), *sources_of(corpora, text=1.0)], VOCABULARY, recipe(), evaluation=True)
    window = plan.window_of(0)
    lengths = dict(zip(window.document[window.corpus == 0], window.length[window.corpus == 0], strict=True))
    assert lengths == {0: 3, 1: 2, 2: 3}
    assert all(plan.pack(n).mask.any() for n in range(plan.num_packs))


@pytest.mark.parametrize("way", ["compiled", "numpy"])
def test_documents_beyond_4_gib_reach_the_model(tmp_path, corpora, monkeypatch, way):
    """Offsets in bytes and in ids pass 32 bits; the file is a hole but for its ends."""
    if way == "numpy":
        monkeypatch.setattr(native, "helper", None)
    far = 9 << 30  # more than 2^31 ids
    with (tmp_path / "plain.bin").open("wb") as file:
        for offset, ids in ((0, [8, 9]), (far, [10, 11, 12])):
            file.seek(offset)
            file.write(np.asarray(ids, dtype="<i4").tobytes())
    tables = struct.pack("<ii", 2, 3) + struct.pack("<5q", 0, far, 0, 1, 2)
    (tmp_path / "plain.idx").write_bytes(layout.MAGIC + layout.HEADER.pack(1, 4, 2, 3) + tables)
    sources = [Source(path=str(tmp_path / "plain")), *sources_of(corpora, text=1.0)]
    plan = DataPlan(sources, VOCABULARY, recipe(), evaluation=True)
    found = {}
    for number in range(plan.num_packs):
        pack = plan.pack(number)
        for place, (name, document) in enumerate(plan.documents(number), 1):
            if name == "plain":
                found[document] = pack.tokens[pack.document == place].tolist()
    assert found == {0: [8, 9, EOS], 1: [10, 11, 12, EOS]}


def test_vision_ids_of_the_tokenizer(corpora):
    assert vision_ids(list(corpora.values())) == (3,)


def test_a_window_is_no_larger_than_is_needed(tmp_path):
    """Of one token and its eos each, 2^28 tokens would be 10^8 documents."""
    prefix = write(tmp_path / "a", [[(layout.MODE_TEXT, [8])]])
    start = time.process_time()
    plan = DataPlan([Source(path=prefix)], VOCABULARY, recipe(window_tokens=1 << 28))
    assert time.process_time() - start < 5
    assert plan.mixture.window_tokens == 1 << 18 and len(plan.window_of(0).document) == 1 << 17
    wide = write(tmp_path / "wide", [[(layout.MODE_TEXT, [8] * 90)]])
    assert DataPlan([Source(path=wide)], VOCABULARY, recipe()).mixture.window_tokens == 1 << 13


def test_the_loader_keeps_order_and_ends(plan):
    place = Place(global_batch_packs=4, micro_batch_packs=2)
    loader = Loader(plan, place, [1.0, 1.0], first_step=3, last_step=9)
    batches = list(loader)
    assert [batch.step for batch in batches] == list(range(3, 9)) and next(loader, None) is None
    again = step_batch(plan, 5, place, [1.0, 1.0])
    assert np.array_equal(batches[2].microbatches[1].tokens, again.microbatches[1].tokens)
    loader.close()
    assert not loader._thread.is_alive()


def test_an_error_in_the_loader_reaches_the_step_that_needs_it(plan, monkeypatch):
    whole = DataPlan.targets

    def failing(self, step, **arguments):
        if step == 2:
            raise DataError("row 7")
        return whole(self, step, **arguments)

    monkeypatch.setattr(DataPlan, "targets", failing)
    loader = Loader(plan, Place(global_batch_packs=4, micro_batch_packs=2), [1.0, 1.0])
    assert [next(loader).step for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match=r"row 7"):
        next(loader)
    assert next(loader, None) is None


def test_a_loader_that_is_not_read_can_be_closed(plan):
    loader = Loader(plan, Place(global_batch_packs=4, micro_batch_packs=2), [1.0, 1.0], prefetch_steps=1)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 10 and next(loader, None) is None


def test_the_digits_step_is_fast(tmp_path):
    """4 packs of 96 a step: 0.5 ms measured on one busy core, so that 20 ms mean something went wrong."""
    prefix = write(tmp_path / "a", random_documents(500, 4, kinds="p"))
    plan = DataPlan([Source(path=prefix)], VOCABULARY, recipe(window_tokens=1 << 16))
    start = time.process_time()
    for step in range(50):
        step_batch(plan, step, Place(global_batch_packs=4, micro_batch_packs=4), [4.0, 1.0])
    assert (time.process_time() - start) / 50 < 0.02
