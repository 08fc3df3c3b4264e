"""Documents as the model sees them: layouts, targets, and that labels stay inside a document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpora import (
    BOI,
    CODEBOOK,
    EOI,
    EOS,
    PAD,
    TEXT,
    UNCONDITIONAL,
    VOCABULARY,
    pair,
    random_documents,
    write,
)
from tests.unit.test_data_preprocess import make_tokenizer
from unimega.config.vocabulary import Vocabulary
from unimega.data import format as layout
from unimega.data import templates
from unimega.data.plan import DataPlan, Pack, Recipe, Source
from unimega.data.tokenize import TextTokenizer
from unimega.errors import ConfigError, DataError

IMAGE = [0, 31, 7]
CODES = [TEXT + code for code in IMAGE]


def plan_of(tmp_path, documents, *, direction="both", vocabulary=VOCABULARY, evaluation=True, changes=None, **recipe):
    prefix = write(tmp_path / "a", documents, **(changes or {}))
    values = {"pack_length": 96, "templates": "none", "window_tokens": 1 << 12} | recipe
    return DataPlan([Source(path=prefix, direction=direction)], vocabulary, Recipe(**values), evaluation=evaluation)


def shown(pack: Pack) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each document."""
    result = []
    for number in range(1, int(pack.document.max(initial=0)) + 1):
        rows = pack.document == number
        result.append((pack.tokens[rows].tolist(), pack.labels[rows & pack.mask].tolist()))
    return result


def only(plan: DataPlan) -> tuple[list[int], list[int]]:
    (document,) = shown(plan.pack(0))
    return document


def test_t2i(tmp_path):
    plan = plan_of(tmp_path, [pair([8, 9], IMAGE)], direction="t2i", unconditional_ratio=0.0)
    assert only(plan) == ([8, 9, BOI, *CODES, EOI, EOS], [*CODES, EOI, EOS])
    assert plan.targets(0, global_batch_packs=1).tolist() == [1, 4]


def test_unconditional(tmp_path):
    plan = plan_of(tmp_path, [pair([8, 9], IMAGE)], direction="t2i", unconditional_ratio=1.0)
    assert only(plan) == ([UNCONDITIONAL, BOI, *CODES, EOI, EOS], [*CODES, EOI, EOS])


def test_i2t(tmp_path):
    plan = plan_of(tmp_path, [pair([8, 9], IMAGE)], direction="i2t")
    assert only(plan) == ([BOI, *CODES, EOI, 8, 9, EOS], [8, 9, EOS])
    assert plan.targets(0, global_batch_packs=1).tolist() == [3, 0]


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_without_masking_all_but_the_first_token_is_a_target(tmp_path, direction):
    plan = plan_of(
        tmp_path, [pair([8, 9], IMAGE)], direction=direction, mask_instructions=False, unconditional_ratio=0.0
    )
    ids, targets = only(plan)
    assert targets == ids[1:]
    assert plan.targets(0, global_batch_packs=1).tolist() == [len(ids) - 1 - 4, 4]


def test_an_image_stored_before_its_caption_is_a_pair_too(tmp_path):
    plan = plan_of(tmp_path, [list(reversed(pair([8, 9], IMAGE)))], direction="t2i", unconditional_ratio=0.0)
    assert only(plan)[0] == [8, 9, BOI, *CODES, EOI, EOS]


def test_a_caption_that_holds_eos_does_not_end_the_document(tmp_path):
    document = list(reversed(pair([8, EOS], IMAGE)))
    plan = plan_of(tmp_path, [document], direction="t2i", unconditional_ratio=0.0)
    assert only(plan)[0] == [8, EOS, BOI, *CODES, EOI, EOS]


def test_text_and_interleaved(tmp_path):
    document = [(layout.MODE_TEXT, [8]), (layout.MODE_IMAGE, IMAGE), (layout.MODE_IMAGE, [1]), (layout.MODE_TEXT, [9])]
    ids, targets = only(plan_of(tmp_path, [document]))
    assert ids == [8, BOI, *CODES, EOI, BOI, TEXT + 1, EOI, 9, EOS] and targets == ids[1:]
    assert only(plan_of(tmp_path, [[(layout.MODE_TEXT, [8, 9])]])) == ([8, 9, EOS], [9, EOS])
    assert only(plan_of(tmp_path, [[(layout.MODE_TEXT, [8])]])) == ([8, EOS], [EOS])
    assert only(plan_of(tmp_path, [[(layout.MODE_TEXT, [])]])) == ([EOS], [])


def test_questions_carry_no_loss_and_every_answer_ends_in_eos(tmp_path):
    image = (layout.mode(layout.VISION, context=True), IMAGE)
    document = [
        image,
        (layout.MODE_QUESTION, [8]),
        (layout.MODE_ANSWER, [9, 10]),
        (layout.MODE_QUESTION, [11]),
        (layout.MODE_ANSWER, [12]),
    ]
    ids, targets = only(plan_of(tmp_path, [document]))
    assert ids == [BOI, *CODES, EOI, 8, 9, 10, EOS, 11, 12, EOS] and targets == [9, 10, EOS, 12, EOS]
    ids, targets = only(plan_of(tmp_path, [document], mask_instructions=False))
    assert targets == ids[1:]


def test_eos_is_not_doubled(tmp_path):
    document = [(layout.MODE_TEXT, [8, EOS])]
    assert only(plan_of(tmp_path, [document]))[0] == [8, EOS]
    assert only(plan_of(tmp_path, [document], changes={"counts": {"text_documents_with_eos": 1}}))[0] == [8, EOS]


def test_positions_pads_and_borders(tmp_path):
    plan = plan_of(tmp_path, random_documents(40, 3))
    for number in range(plan.num_packs):
        pack = plan.pack(number)
        used = int((pack.document > 0).sum())
        assert (pack.tokens[used:] == PAD).all() and not pack.modality[used:].any() and not pack.mask[used:].any()
        last = np.flatnonzero(np.diff(pack.document, append=0) != 0)
        assert not pack.mask[last].any() and (pack.labels[last] == PAD).all()
        inner = np.setdiff1d(np.arange(used), last)
        assert np.array_equal(pack.labels[inner], pack.tokens[inner + 1])
        assert (pack.tokens[last[pack.document[last] > 0]] == EOS).all()
        scale = np.asarray([2.0, 0.5], dtype=np.float32)
        batch = plan.collate(plan.draft([number]), [number], scale=scale, step_tokens=used)
        order = batch.order
        assert np.array_equal(batch.tokens[order.inverse], pack.tokens)
        assert sum(order.counts) == 96 and order.pads == 96 - used
        weights = batch.loss_weights[order.inverse]
        assert np.array_equal(
            weights, np.where(pack.mask, np.where(pack.modality == 1, 0.5, 2.0), 0).astype(np.float32)
        )
        starts = np.concatenate(([0], last[last < used] + 1))
        expected = np.arange(used) - np.repeat(starts[:-1], np.diff(starts))
        assert np.array_equal(order.positions[order.inverse][:used], expected)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    t2i=st.sampled_from([0.0, 0.3, 1.0]),
    unconditional=st.sampled_from([0.0, 0.5]),
    masked=st.booleans(),
)
def test_each_stored_token_once_and_targets_as_planned(tmp_path_factory, seed, t2i, unconditional, masked):
    documents = random_documents(30, seed)
    plan = plan_of(
        tmp_path_factory.mktemp("a"),
        documents,
        t2i_ratio=t2i,
        unconditional_ratio=unconditional,
        mask_instructions=masked,
    )
    found, targets = [], np.zeros(2, dtype=np.int64)
    for number in range(plan.num_packs):
        pack = plan.pack(number)
        targets += np.bincount(pack.modality[pack.mask], minlength=2)
        found += [tuple(t for t in ids if t not in (BOI, EOI, EOS)) for ids, _ in shown(pack)]

    def possible(document):
        text, codes = [[i + TEXT * (m == 1) for i in ids] for m, ids in document][:2] if len(document) > 1 else ([], [])
        if len(document) != 2:
            return [tuple(i + TEXT * (m == 1) for m, ids in document for i in ids)]
        return [(*text, *codes), (*codes, *text), (UNCONDITIONAL, *codes)]

    expected = [possible(document) for document in documents]
    assert len(found) == len(expected)
    for ids in found:
        match = next((options for options in expected if ids in options), None)
        assert match is not None
        expected.remove(match)
    assert np.array_equal(targets, plan.targets(0, global_batch_packs=plan.num_packs))


def test_the_ratios_are_met(tmp_path):
    plan = plan_of(tmp_path, random_documents(2000, 5, kinds="p"), t2i_ratio=0.7, unconditional_ratio=0.2)
    first = [ids[0] for number in range(plan.num_packs) for ids, _ in shown(plan.pack(number))]
    assert len(first) == 2000
    shares = first.count(BOI) / 2000, first.count(UNCONDITIONAL) / 2000
    assert np.allclose(shares, [0.3, 0.7 * 0.2], atol=0.035)


def test_direction_of_the_rows(tmp_path):
    sources = [
        {"path": "a.jsonl", "first_document": 0, "direction": "t2i"},
        {"path": "b.jsonl", "first_document": 5, "direction": "i2t"},
        {"path": "c.jsonl", "first_document": 10, "direction": "both"},
    ]
    documents = [pair([6 + n], IMAGE) for n in range(15)]
    plan = plan_of(tmp_path, documents, changes={"sources": sources}, unconditional_ratio=0.0)
    packs = [document for number in range(plan.num_packs) for document in shown(plan.pack(number))]
    first = {next(t for t in ids if 6 <= t < TEXT) - 6: ids[0] == BOI for ids, _ in packs}
    assert not any(first[n] for n in range(5)) and all(first[n] for n in range(5, 10))
    with pytest.raises(ConfigError, match=r"direction='t2i' of a is wrong. Rows of .*a.json are i2t only"):
        plan_of(tmp_path, documents, changes={"sources": sources}, direction="t2i")


def test_prompts_come_from_a_file(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "own.toml").write_text('t2i = [" draw it", " paint"]\ni2t = " the caption"\n')
    tokenizer = TextTokenizer(folder)
    tokens = tokenizer.describe(beside=tmp_path / "a")
    draw_it, paint, caption = (ids.tolist() for ids in tokenizer.encode([" draw it", " paint", " the caption"]))
    vocabulary = Vocabulary(
        names=("text", "vision"),
        starts=(0, tokenizer.size),
        codes=(tokenizer.size, CODEBOOK),
        rows=tokenizer.size + CODEBOOK,
        ids=((), (tokenizer.special.vision_start,)),
    )
    documents = [pair([20 + n], IMAGE) for n in range(40)]
    for recorded in ("", str(folder)):
        plan = plan_of(
            tmp_path,
            documents,
            vocabulary=vocabulary,
            changes={"tokenizer": tokens},
            templates=str(tmp_path / "own.toml"),
            tokenizer=recorded,
            unconditional_ratio=0.0,
        )
        seen = set()
        for number in range(plan.num_packs):
            for ids, targets in shown(plan.pack(number)):
                start, end = ids.index(tokenizer.special.vision_start), ids.index(tokenizer.special.vision_end)
                if start:
                    seen.add(tuple(ids[1:start]))
                    assert targets == ids[start + 1 :]
                else:
                    assert ids[end + 1 : -2] == caption and targets == ids[-2:]
                    seen.add("i2t")
        assert seen == {tuple(draw_it), tuple(paint), "i2t"}


def test_turns_are_separated_and_mute_images_are_asked_about(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "own.toml").write_text('turn = ["\\n", "\\n\\n"]\ndescribe = [" what", " tell"]\n')
    tokenizer = TextTokenizer(folder)
    turns = [ids.tolist() for ids in tokenizer.encode(["\n", "\n\n"])]
    asked = [ids.tolist() for ids in tokenizer.encode([" what", " tell"])]
    special = tokenizer.special
    vocabulary = Vocabulary(
        names=("text", "vision"),
        starts=(0, tokenizer.size),
        codes=(tokenizer.size, CODEBOOK),
        rows=tokenizer.size + CODEBOOK,
        ids=((), (special.vision_start,)),
    )
    image = (layout.mode(layout.VISION, context=True), IMAGE)
    picture = [special.vision_start, *(tokenizer.size + code for code in IMAGE), special.vision_end]
    chat = [
        (layout.MODE_QUESTION, [20]),
        (layout.MODE_ANSWER, [21]),
        (layout.MODE_QUESTION, [22]),
        (layout.MODE_ANSWER, [23]),
    ]
    mute = [image, (layout.MODE_QUESTION, []), (layout.MODE_ANSWER, [24, 25])]
    silent = [(layout.MODE_QUESTION, []), (layout.MODE_ANSWER, [26])]
    plan = plan_of(
        tmp_path,
        [chat, mute, silent] * 30,
        vocabulary=vocabulary,
        changes={"tokenizer": tokenizer.describe(beside=tmp_path / "a")},
        templates=str(tmp_path / "own.toml"),
    )
    packs = [document for number in range(plan.num_packs) for document in shown(plan.pack(number))]
    eos = special.eos
    chats = [([20, *a, 21, eos, *b, 22, *c, 23, eos], [21, eos, 23, eos]) for a in turns for b in turns for c in turns]
    mutes = [([*picture, *question, *turn, 24, 25, eos], [24, 25, eos]) for question in asked for turn in turns]
    alone = [([*turn, 26, eos], [26, eos]) for turn in turns]
    assert all(document in [*chats, *mutes, *alone] for document in packs) and len(packs) == 90
    found = [sum(document in packs for document in kind) for kind in (chats, mutes, alone)]
    assert found[0] >= 6 and found[1:] == [4, 2], "what is drawn varies"


def test_an_image_that_is_an_answer_ends_in_eos(tmp_path):
    document = [(layout.MODE_QUESTION, [8]), (layout.mode(layout.VISION, layout.ANSWER), IMAGE)]
    ids, targets = only(plan_of(tmp_path, [document]))
    assert ids == [8, BOI, *CODES, EOI, EOS] and targets == ids[1:]
    ids, targets = only(plan_of(tmp_path, [[*document, (layout.MODE_QUESTION, [9]), (layout.MODE_ANSWER, [10])]]))
    assert ids == [8, BOI, *CODES, EOI, EOS, 9, 10, EOS] and targets == [BOI, *CODES, EOI, EOS, 10, EOS]


def test_draws_follow_seed_epoch_and_document_alone(tmp_path):
    """One corpus, another neighbour, another place in the run: the same document in the same epoch is the same."""
    prefix = write(tmp_path / "a", random_documents(60, 1, kinds="p"))
    other = write(tmp_path / "b", random_documents(60, 2))
    recipe = Recipe(pack_length=96, templates="none", window_tokens=1 << 12)
    found = []
    for sources in ([prefix], [other, prefix]):
        plan = DataPlan([Source(path=path) for path in sources], VOCABULARY, recipe)
        seen = {}
        for number in range(150):
            window = plan.window_of(number)
            at = number - window.first_pack
            items = range(*window.starts[at : at + 2])
            for item, document in zip(items, shown(plan.pack(number)), strict=True):
                if plan.corpora[window.corpus[item]].name == "a":
                    seen[int(window.epoch[item]), int(window.document[item])] = document
        found.append(seen)
    both = found[0].keys() & found[1].keys()
    assert len(both) > 150 and all(found[0][key] == found[1][key] for key in both)
    starts = {
        document: {ids[0] == BOI for (_, d), (ids, _) in found[0].items() if d == document} for document in range(60)
    }
    assert sum(len(kinds) == 2 for kinds in starts.values()) > 30, "another epoch draws again"


def test_row_separators_need_their_id(tmp_path):
    with pytest.raises(ConfigError, match=r"data.row_separator=4 needs <\|vision_pad\|>, and the tokenizer has none"):
        plan_of(tmp_path, [pair([8], IMAGE)], row_separator=4)


@pytest.mark.parametrize("name", ["default", "chinese"])
def test_our_prompts_load(tmp_path, name):
    loaded = templates.load(name, TextTokenizer(make_tokenizer(tmp_path)))
    assert len(loaded.t2i) >= 4 and len(loaded.i2t) == 1 and len(loaded.describe) >= 4 and len(loaded.turn) == 3


REFUSED = {
    "no file": (
        "nothing",
        None,
        r"data.templates='nothing' is wrong. There is no such file. Use none, chinese, default",
    ),
    "not TOML": ("x.toml", "t2i = [", r"x\.toml: not TOML"),
    "unknown key": ("x.toml", 'prompts = [" a"]', r"x\.toml: unknown key 'prompts'. Known: t2i"),
    "melts": (
        "x.toml",
        't2i = ["draw"]',
        r"x\.toml: 'draw' is not a prompt. It must be a string that starts with a space",
    ),
    "number": ("x.toml", "i2t = 3", r"x\.toml: 3 is not a prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_templates(tmp_path, case):
    name, content, line = REFUSED[case]
    if content is not None:
        (tmp_path / name).write_text(content)
        name = str(tmp_path / name)
    with pytest.raises(ConfigError, match=line):
        templates.load(name, TextTokenizer(make_tokenizer(tmp_path)))


def test_templates_without_a_tokenizer(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.templates='default' has to be tokenised, but data.tokenizer is absent"
    ):
        plan_of(tmp_path, [pair([8], IMAGE)], templates="default")


MISMATCHES = {
    "codebook": ({"codes": (TEXT, 64), "rows": 99}, {}, r"codebook 32, model\.codebook is 64"),
    "offset": ({"starts": (0, 20), "codes": (20, 32)}, {}, r"tokenizer has 22 ids, model\.vision_offset is 20"),
    "begin of image": (
        {"ids": ((), ())},
        {},
        r"<\|vision_start\|> has id 3, text in the model's vocabulary, not vision",
    ),
    "end of image": (
        {"ids": ((), (BOI, EOI))},
        {},
        r"<\|vision_end\|> has id 4, vision in the model's vocabulary, not text",
    ),
    "tokenizer": ({}, {"tokenizer": "nowhere"}, r"tokenizer='nowhere' is wrong"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_what_does_not_fit_the_run_is_refused(tmp_path, case):
    vocabulary, recipe, line = MISMATCHES[case]
    values = {name: getattr(VOCABULARY, name) for name in ("names", "starts", "codes", "rows", "ids")} | vocabulary
    with pytest.raises((ConfigError, DataError), match=line):
        plan_of(tmp_path, [pair([8], IMAGE)], vocabulary=Vocabulary(**values), **recipe)


def test_ids_that_are_out_of_place_are_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"pack 0: a document 0 \(rows.jsonl\): id 55 at position 3 of the pack is outside the vocabulary",
    ):
        plan_of(tmp_path, [pair([8], [0, 1, 33])], direction="i2t").pack(0)
    with pytest.raises(
        DataError, match=r"id 30 at position 1 of the pack stands in text, and is vision in the model's"
    ):
        plan_of(tmp_path, [[(layout.MODE_TEXT, [8, 30])]]).pack(0)
