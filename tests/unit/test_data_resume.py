"""The packs of a run do not depend on who builds them, from where, or how often it was stopped."""

import concurrent.futures
import hashlib
import json
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpora import VOCABULARY, random_documents, write
from unimega.data import native
from unimega.data.corpus import Source
from unimega.data.loader import Loader, Place
from unimega.data.plan import DataPlan, Recipe

LENGTH, STEPS = 96, 50


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return [write(folder / name, random_documents(90, n, kinds=name)) for n, name in enumerate(("t", "p", "ti"))]


def made(corpora, **changes):
    values = {"pack_length": LENGTH, "templates": "none", "window_tokens": 1 << 13, "overlong": "split_text"}
    return DataPlan([Source(path=path) for path in corpora], VOCABULARY, Recipe(**values | changes))


def digests(plan, place, steps):
    """A digest of each pack by its number: ids, labels, targets, who sees whom; and the denominators of the steps."""
    found, denominators = {}, {}
    for batch in Loader(plan, place, [4.0, 1.0], first_step=steps.start, last_step=steps.stop):
        denominators[batch.step] = batch.denominator
        packs = iter(place.packs(batch.step))
        for micro in batch.microbatches:
            order = micro.order
            columns = [
                micro.tokens,
                micro.labels,
                micro.loss_weights * np.float32(batch.denominator) > 0.5,
                order.positions,
            ]
            rows = [column[order.inverse].reshape(place.micro_batch_packs, LENGTH) for column in columns]
            for i in range(place.micro_batch_packs):
                found[next(packs)] = hashlib.sha1(b"".join(row[i].tobytes() for row in rows)).hexdigest()
    return found, denominators


@pytest.fixture(scope="module")
def undisturbed(corpora):
    """50 steps of 8 packs, in one process that never stops."""
    return digests(made(corpora), Place(global_batch_packs=8, micro_batch_packs=1), range(STEPS))


@settings(max_examples=25, deadline=None)
@given(
    stop=st.integers(1, STEPS - 1),
    dp=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    total=st.sampled_from([4, 8, 16]),
)
def test_stopping_anywhere_changes_nothing(corpora, undisturbed, stop, dp, micro, total):
    """What the checkpoint holds is JSON; the run goes on with another dp, micro-batch and global batch."""
    if dp * micro > total or stop * 8 % total:
        total = 8
        micro = 1
    packs, denominators = undisturbed
    state = json.loads(json.dumps(made(corpora).state(stop * 8 - 1)))
    first = stop * 8 // total
    steps = range(first, min(first + 3, STEPS * 8 // total))
    found = {}
    for rank in range(dp):
        plan = made(corpora)
        plan.start_at(state)
        place = Place(global_batch_packs=total, micro_batch_packs=micro, dp_rank=rank, dp=dp)
        mine, sums = digests(plan, place, steps)
        assert not found.keys() & mine.keys()
        found |= mine
        assert total != 8 or sums == {step: denominators[step] for step in steps}
    assert found == {number: packs[number] for number in range(steps.start * total, steps.stop * total)}


def in_a_process(corpora, dp, rank, first, helper):
    if not helper:
        native.helper = None
    place = Place(global_batch_packs=8, micro_batch_packs=2, dp_rank=rank, dp=dp)
    return digests(made(corpora), place, range(first, first + 6))[0]


def test_ranks_in_processes_of_their_own(corpora, undisturbed):
    """dp 1, 2 and 4, each rank a new interpreter; some without the C++ helper, some late."""
    jobs = [(dp, rank, first) for dp, first in ((1, 0), (2, 6), (4, 11)) for rank in range(dp)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(in_a_process, corpora, *job, number % 2 == 0) for number, job in enumerate(jobs)]
        results = [future.result() for future in futures]
    for dp, first in ((1, 0), (2, 6), (4, 11)):
        mine = [result for result, job in zip(results, jobs, strict=True) if job[0] == dp]
        assert sum(map(len, mine)) == 48
        together = {number: digest for result in mine for number, digest in result.items()}
        assert together == {number: undisturbed[0][number] for number in range(first * 8, first * 8 + 48)}


def test_another_seed_is_another_order(corpora, undisturbed):
    other, _ = digests(made(corpora, seed=2), Place(global_batch_packs=8, micro_batch_packs=1), range(5))
    assert not set(other.values()) & set(undisturbed[0].values())
