"""What a rank says of itself and of others, without ranks: places of a stack, blame, spread, live line, signals."""

import io
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from unimega import log
from unimega.errors import UnimegaError, run_cli
from unimega.training.engine import StepResult
from unimega.training.guard import Guard
from unimega.training.signals import Signals, held
from unimega.training.spread import Spread
from unimega.training.watch import Beat, Watch, blame, place

C10D = ("/x/torch/distributed/distributed_c10d.py", "all_reduce")
RUN = ("/x/unimega/training/run.py", "_advance")


@pytest.mark.parametrize(
    "frames, expected",
    [
        ([C10D, ("/x/megatron/core/optimizer/clip_grads.py", "get_grad_norm_fp32")], ("the gradient norm", True)),
        (
            [("/x/megatron/core/distributed/param_and_grad_buffer.py", "finish_grad_sync")],
            ("the reduction of gradients", True),
        ),
        (
            [C10D, ("/x/megatron/core/distributed/param_and_grad_buffer.py", "finish_param_sync")],
            ("the gather of parameters", True),
        ),
        (
            [C10D, ("/x/megatron/core/pipeline_parallel/p2p_communication.py", "recv_forward")],
            ("a transfer between pipeline stages", True),
        ),
        ([C10D, ("/x/unimega/parallel/linear.py", "forward")], ("an exchange between tensor-parallel ranks", True)),
        ([("/x/unimega/parallel/linear.py", "forward")], ("forward or backward", False)),
        ([("/x/python/queue.py", "get"), ("/x/unimega/data/loader.py", "__next__"), RUN], ("the data", False)),
        ([C10D, ("/x/unimega/training/engine.py", "save"), RUN], ("the save of a checkpoint", True)),
        ([C10D, RUN], ("its own code", True)),
        ([RUN], ("its own code", False)),
    ],
)
def test_places(frames: list[tuple[str, str]], expected: tuple[str, bool]) -> None:
    assert place([*frames, RUN]) == expected


def test_every_named_place_is_there() -> None:
    """Files and functions that ``PLACES`` names exist: a rename would make the line vaguer without a word."""
    import importlib.util
    from pathlib import Path

    from unimega.training import watch

    for part, name, _ in watch.PLACES:
        package, _, rest = part.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        found = Path(spec.submodule_search_locations[0]) / rest
        files = [found.with_suffix(".py")] if found.with_suffix(".py").exists() else list(found.glob("*.py"))
        assert files, part
        assert any(f"def {name}" in file.read_text() or name in file.read_text() for file in files), (part, name)


def test_the_silent_are_blamed_before_those_behind_and_those_elsewhere() -> None:
    def said(**beats: Beat) -> dict[int, Beat]:
        return {int(name[1:]): beat for name, beat in beats.items()}

    waiting = Beat(8, 5, "the gradient norm", True)
    before = said(r0=waiting, r1=waiting, r2=Beat(8, 4, "the data", False))
    after = said(r0=waiting._replace(beats=9), r1=waiting, r2=Beat(9, 4, "the data", False))
    assert blame(before, after, own=0) == "rank 1 does not answer: last seen in the gradient norm at step 5."
    after[1] = waiting._replace(beats=9)
    assert blame(before, after, own=0) == "rank 2 is behind: last seen in the data at step 4."
    after[2] = Beat(9, 5, "the data", False)
    assert blame(before, after, own=0) == "rank 2 did not arrive: last seen in the data at step 5."
    after[2] = waiting._replace(beats=9)
    assert blame(before, after, own=0).startswith("All ranks answer: rank 1 in the gradient norm, rank 2 in")
    assert blame({}, {}, own=0).startswith("The store with the other ranks' whereabouts")
    many = {rank: waiting for rank in range(9)}
    assert blame(many, many, own=0).endswith("; and 4 more.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 500ms for recv operation to complete", "waited"),
        ("Application timeout caused pair closure", "waited"),  # the others that were pending then
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321", "lost the connection"),
        ("CUDA out of memory", ""),
    ],
)
def test_errors_of_collectives_are_explained(text: str, words: str) -> None:
    watch = Watch(dist.HashStore(), rank=0, world=2, timeout=0.5, tells=False)
    try:
        told = watch.explain(RuntimeError(text))
    finally:
        watch.close()
    assert str(told).startswith(f"rank 0 {words}") if words else told is None


def test_the_spread_names_the_slowest(caplog: pytest.LogCaptureFixture) -> None:
    ranks = [Spread(rank=rank, world=3) for rank in range(3)]
    shared = [sum(column) for column in zip(*(one.share(100 + n) for n, one in enumerate(ranks)), strict=True)]
    assert ranks[0].record(shared, 1) == {
        "memory_bytes": 102,
        "step_time_min": None,
        "step_time_median": None,
        "step_time_max": None,
        "step_time_slowest_rank": None,
    }
    for one, seconds in zip(ranks, (1.0, 1.25, 2.0), strict=True):
        one.add(seconds - 0.5)
        one.add(seconds + 0.5)
    shared = [sum(column) for column in zip(*(one.share(0) for one in ranks), strict=True)]
    for step in (2, 3):
        record, *others = (one.record(shared, step) for one in ranks)
        assert others == [record, record]
    assert list(record.values())[1:] == [1.0, 1.25, 2.0, 2]
    assert caplog.messages == [
        "step 2  rank 2 takes 2.000 s of its own for a step, the median is 1.250 s: all ranks wait for it"
    ]


def test_the_guard_counts_those_in_a_row() -> None:
    guard = Guard(1, lambda packs: f"{len(packs)} of a")
    good = StepResult(loss=1.0, sums=(), grad_norm=1.0, applied=True)
    bad = StepResult(loss=1.0, sums=(), grad_norm=float("inf"), applied=False)
    for step, result in enumerate((bad, good, bad), start=1):
        guard.look(step, result, range(step))
    assert guard.state() == {"skipped": 2, "in_a_row": 1}
    other = Guard(1, guard.sources)
    other.restore(guard.state())
    with pytest.raises(UnimegaError, match=r"step 4: gradient norm inf \(packs 8-11: 4 of a\); 2 steps in a row"):
        other.look(4, bad, range(8, 12))
    with pytest.raises(UnimegaError, match=r"\(packs 0-0: 1 of a\); training.max_skipped_steps=0"):
        Guard(0, guard.sources).look(1, bad, range(1))


def test_signals_are_remembered_and_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Signals().listening() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked and signals.name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_processes_started_in_a_save_do_not_hear_signals() -> None:
    with Signals().listening() as signals:
        with held():
            child = subprocess.Popen([sys.executable, "-c", "input(); print('alive')"], stdin=-1, stdout=-1)
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert child.communicate(b"\n")[0] == b"alive\n"
        assert signals.asked
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_cli(interrupted, [])
    assert ended.value.code == 130 and capsys.readouterr().err == "unimega: interrupted.\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, live", [(Terminal(), True), (io.StringIO(), False)])
def test_a_live_line_stays_below_the_records(stream: io.StringIO, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    logger = logging.getLogger("unimega")
    kept = logger.handlers[:], logger.propagate, logger.level
    try:
        log.setup()
        logger.handlers[0].setFormatter(logging.Formatter("%(message)s"))
        log.live("[#..] 1")
        logger.info("saved")
        log.live("[##.] 2")  # too soon after the first
        log.live("")
    finally:
        logger.handlers, logger.propagate = kept[0], kept[1]
        logger.setLevel(kept[2])
    expected = "\r\x1b[K[#..] 1\r\x1b[Ksaved\n\r\x1b[K[#..] 1\r\x1b[K" if live else "saved\n"
    assert stream.getvalue() == expected
