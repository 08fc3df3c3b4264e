"""What can go wrong with a step: it is passed over with a line, or the run stops with one; nothing wrong is loaded."""

import errno
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.faults import FAULTS, cut, flip, shard
from tests.distributed.harness import run_dist
from tests.distributed.test_checkpoint_resume import CASES, make_engine, state_of, train
from unimega.config.schema import ParallelConfig

TWO = ParallelConfig(tp=2, sequence_parallel=True)


class Heard(logging.Handler):
    """The warnings of this rank."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("unimega").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken


def on_rank_0(act: Callable[[], object]) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        act()
    dist.barrier()


def fallbacks(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """On two ranks: steps 1 and 2 are saved; each fault befalls a copy of step 2, and the run goes on."""
    from unimega.errors import CheckpointError

    heard, place, model = Heard(), Path(folder), {}
    engine = make_engine(TWO, CASES["fp32"])
    model = {"spec": engine.spec.to_dict()}
    train(engine, 0, 1)
    engine.save(place / "run", 1, model)
    engine.save(place / "only", 1, model)
    want = state_of(engine)
    train(engine, 1, 2)
    engine.save(place / "run", 2, model)
    found: dict[str, Any] = {}

    def attempt(name: str, copy: Path, damage: Callable[[], object]) -> None:
        on_rank_0(damage)
        try:
            resumed = engine.resume(copy)
            got = state_of(engine)
            same = all(torch.equal(want[key], got[key]) for key in want if not key.startswith("group"))
            found[name] = (resumed and resumed.step, heard.take(), same)
        except CheckpointError as error:
            found[name] = (None, heard.take(), str(error))

    for name, (damage, _) in FAULTS.items():
        copy, only = place / name, place / f"{name} only"
        on_rank_0(lambda to=copy: shutil.copytree(place / "run", to))
        on_rank_0(lambda to=only: shutil.copytree(place / "only", to))
        attempt(name, copy, lambda to=copy, damage=damage: damage(to / "step-00000002"))
        attempt(f"{name}, only", only, lambda to=only, damage=damage: damage(to / "step-00000001"))
    for name, damage in LATEST.items():
        copy = place / name
        on_rank_0(lambda to=copy: shutil.copytree(place / "run", to))
        attempt(name, copy, lambda to=copy, damage=damage: damage(to))
    return found, want


def two_damaged(folder: Path) -> None:
    flip(shard(folder / "step-00000002"))
    cut(folder / "step-00000001" / ".metadata")


LATEST: dict[str, Callable[[Path], object]] = {
    "missing latest": lambda folder: (folder / "latest").unlink(),
    "latest of an older step": lambda folder: (folder / "latest").write_text("step-00000001"),
    "latest of no step": lambda folder: (folder / "latest").write_text("step-00000007"),
    "latest is garbage": lambda folder: (folder / "latest").write_bytes(b"\xff\x00../.."),
    "newest step gone": lambda folder: shutil.rmtree(folder / "step-00000002"),
    "all steps gone": lambda folder: [shutil.rmtree(step) for step in folder.glob("step-*")],
    "a killed save": lambda folder: shutil.copytree(folder / "step-00000002", folder / "step-00000003.0a.tmp"),
    "both damaged": two_damaged,
    "newest renamed": lambda folder: (folder / "step-00000002").rename(folder / "step-00000009"),
    "older copied": lambda folder: shutil.copytree(folder / "step-00000001", folder / "step-00000009"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("faults")
    yield [result for result, _ in run_dist(fallbacks, world=2, args=(str(folder),))]
    shutil.rmtree(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_step_is_passed_over_with_one_line(fault: str, found: list[dict[str, Any]]) -> None:
    cause = FAULTS[fault][1]
    for rank, (step, lines, same) in enumerate(each[fault] for each in found):
        assert step == 1 and same is True
        assert len(lines) == (rank == 0), lines
    (line,) = found[0][fault][1]
    assert "step 2 is not used: " in line and "step-00000002/" in line and cause in line
    assert "going on from step 1 (" in line and "\n" not in line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_without_a_whole_step_stops_with_one_line(fault: str, found: list[dict[str, Any]]) -> None:
    for each in found:
        step, lines, error = each[f"{fault}, only"]
        assert step is None and lines == [] and "\n" not in error
        assert "no whole checkpoint is left (step 1 is not used: " in error and FAULTS[fault][1] in error


def test_latest_is_not_trusted(found: list[dict[str, Any]]) -> None:
    def of(name: str) -> tuple[int | None, list[str]]:
        assert found[0][name][0] == found[1][name][0]
        return found[0][name][:2]

    for name, said in (
        ("missing latest", "latest is missing"),
        ("latest of an older step", "latest names 'step-00000001'"),
        ("latest of no step", "latest names 'step-00000007'"),
        ("latest is garbage", "latest names ''"),
    ):
        step, (line,) = of(name)
        assert step == 2 and said in line and "going on from step 2" in line
    step, (line,) = of("newest step gone")
    assert step == 1 and "latest names 'step-00000002'" in line and "going on from step 1" in line
    assert of("a killed save") == (2, [])
    assert "no step is there" in found[0]["all steps gone"][2]
    for name, step, holds in (("newest renamed", 1, 2), ("older copied", 2, 1)):
        goes_on, (line,) = of(name)
        assert goes_on == step and f"training.json is of step {holds}" in line and "step 9 is not used" in line
    both = found[0]["both damaged"][2]
    assert "step 2 is not used" in both and "step 1 is not used" in both and ".metadata has " in both


def named(folder: str) -> dict[str, str]:
    """What loading one step by its name says, for every fault."""
    from unimega.errors import CheckpointError
    from unimega.parallel import groups
    from unimega.training.engine import Engine

    engine = make_engine(ParallelConfig(), CASES["fp32"])
    engine.save(f"{folder}/run", 1, {"spec": engine.spec.to_dict()})
    spec = engine.spec
    engine.close()
    said = {}
    for name, (damage, _) in FAULTS.items():
        copy = Path(folder) / name
        shutil.copytree(f"{folder}/run", copy)
        damage(copy / "step-00000001")
        try:
            Engine(spec, ParallelConfig(), optimizer_config=None, initial=str(copy / "step-00000001"))
            said[name] = "loaded"
        except CheckpointError as error:
            said[name] = str(error)
        groups.destroy()
    return said


def test_a_named_step_that_is_damaged_is_refused(tmp_path: Path) -> None:
    said = run_dist(named, world=1, args=(str(tmp_path),))[0]
    for fault, (_, cause) in FAULTS.items():
        assert cause in said[fault] and "damaged or not whole" in said[fault] and "\n" not in said[fault], fault


def full_disk(folder: str) -> list[tuple[str, int, bool]]:
    """On two ranks: saves during which the disk is full, on one rank or the other, in each phase; what each says."""
    import torch.distributed as dist

    from unimega.errors import CheckpointError

    engine = make_engine(ParallelConfig(), CASES["fp32"])
    model = {"spec": engine.spec.to_dict()}
    train(engine, 0, 1)
    engine.save(folder, 1, model)
    train(engine, 1, 2)
    want = state_of(engine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = []
    for rank, size, asynchronous in ((0, 20000, False), (1, 20000, False), (0, 300, False), (1, 20000, True)):
        error = ""
        if dist.get_rank() == rank:  # the kernel refuses larger files, also to the process that saves
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            engine.save(folder, 2, model, asynchronous=asynchronous)
            engine.finish_saves(wait=True)
        except CheckpointError as cause:
            error = str(cause)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier()
        left = sorted(entry.name for entry in Path(folder).iterdir())
        found.append((error, engine_step(folder), left == ["latest", "step-00000001"]))
    got = state_of(engine)
    same = all(torch.equal(want[key], got[key]) for key in want if not key.startswith("random"))
    engine.save(folder, 2, model)  # there is room again
    found.append(("", engine_step(folder), same))
    return found


def engine_step(folder: str) -> int:
    from unimega.parallel.checkpoint import find_newest

    return int((find_newest(folder) or Path("0-0")).name.partition("-")[2])


def test_a_full_disk_stops_every_rank_with_one_line(tmp_path: Path) -> None:
    first, second = run_dist(full_disk, world=2, args=(str(tmp_path),))
    assert first == second
    *full, last = first
    for number, (error, step, clean) in enumerate(full):
        assert step == 1 and clean, number
        assert error.startswith("step 2 could not be saved: rank ") and "\n" not in error, number
        assert os.strerror(errno.EFBIG) in error and "Earlier checkpoints are as they were." in error, number
    assert last == ("", 2, True)


class Stop(BaseException):
    """A kill, as far as the process itself can act one: nothing catches it."""


def crashes(folder: str, number: int) -> list[tuple[int, int, bool, list[str]]]:
    """Saves of a step, beside steps 1 and 2, that end at the first, second, ... change of the disk; what is left."""
    from unimega.parallel import checkpoint
    from unimega.parallel.step_folder import find_fault

    keys = [f"weight {n}" for n in range(3)]

    def save(place: Path, step: int) -> None:
        tensors = {key: torch.full((40,), float(step)) for key in keys}
        whole = [checkpoint.ShardedTensor.from_rank_offsets(key, value, replica_id=0) for key, value in tensors.items()]
        documents = {"model.json": "{}", "training.json": "{}"}
        checkpoint.Saves().save(checkpoint.Step(place, step, documents, 2), whole)

    found = []
    for last in range(1, 100):
        place = Path(folder) / str(last)
        for step in (1, 2):
            save(place, step)
        calls = [0]
        undo = [(os, name, getattr(os, name)) for name in ("fsync", "replace", "mkdir", "unlink", "rmdir")]
        for module, name, original in undo:
            setattr(module, name, interrupted(original, calls, last))
        try:
            save(place, number)
            done = True
        except Stop:
            done = False
        for module, name, original in undo:
            setattr(module, name, original)
        assert [step for step in place.glob("step-????????") if find_fault(step)] == []
        newest = checkpoint.find_newest(place)
        assert newest is not None
        left = sorted(entry.name for entry in place.iterdir())
        save(place, 4)
        found.append((int(newest.name[-1]), engine_step(str(place)), done, left))
        if done:
            break
    return found


def interrupted(original: Callable[..., Any], calls: list[int], last: int) -> Callable[..., Any]:
    def act(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] >= last:
            raise Stop
        return original(*args, **options)

    return act


@pytest.mark.parametrize(("number", "before"), [(3, 2), (2, 1)], ids=["a new step", "a step that is there"])
def test_a_save_may_be_killed_at_any_change_of_the_disk(number: int, before: int, tmp_path: Path) -> None:
    found = run_dist(crashes, world=1, args=(str(tmp_path), number))[0]
    assert len(found) > 20
    assert {newest for newest, _, _, _ in found} == {before, number}
    for _, after, _, left in found:
        assert after == 4
        assert not [name for name in left if name.endswith(".tmp")], "find_newest removes what is left behind"
    newest, _, done, left = found[-1]
    assert (newest, done, left) == (number, True, ["latest", f"step-{number - 1:08d}", f"step-{number:08d}"])


def killed_writer(folder: str) -> tuple[str, list[str], bool]:
    """A save in the background whose process is killed on rank 1, then one that is not."""
    import torch.distributed as dist

    from unimega.errors import CheckpointError

    engine = make_engine(ParallelConfig(), CASES["fp32"])
    model = {"spec": engine.spec.to_dict()}
    train(engine, 0, 1)
    engine.save(folder, 1, model, asynchronous=True)
    if dist.get_rank() == 1:
        engine.saves._queue.async_calls[0].async_caller.process.kill()
    error = ""
    try:
        engine.finish_saves(wait=True)
    except CheckpointError as cause:
        error = str(cause)
    nothing = engine.resume(folder)
    engine.save(folder, 1, model, asynchronous=True)
    whole = engine.finish_saves(wait=True)
    return error, [path.name for path in whole], nothing is None


def test_a_killed_writer_is_one_line(tmp_path: Path) -> None:
    for error, whole, nothing in run_dist(killed_writer, world=2, args=(str(tmp_path),)):
        # the process may have been done before it was killed: then the step is whole
        assert whole == ["step-00000001"]
        assert (nothing and "rank 1: the process that wrote its file was ended" in error) or not error


def differing(described: list[dict[str, Any]]) -> str:
    import torch.distributed as dist

    from unimega.errors import ConfigError
    from unimega.parallel.agreement import check_equal

    try:
        check_equal(described[dist.get_rank()])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, ""),
        (
            {"optimizer": {"lr": 1e-3, "clip": 1.0}},
            "optimizer.lr differs between ranks: 0.0001 on rank 0, 0.001 on rank 1",
        ),
        ({"model": {"width": 64}}, "model.width differs between ranks: 32 on rank 0, 64 on rank 1"),
        (
            {"kernels": {"swiglu": "reference"}},
            'kernels.swiglu differs between ranks: absent on rank 0, "reference" on',
        ),
        ({"training": {"trainable": ["*_text"]}}, 'training.trainable differs between ranks: ["*"] on rank 0'),
    ],
)
def test_a_run_that_differs_on_one_rank_is_refused(change: dict[str, Any], line: str) -> None:
    run = {
        "model": {"width": 32},
        "optimizer": {"lr": 1e-4, "clip": 1.0},
        "training": {"trainable": ("*",)},
        "kernels": {},
    }
    first, second = run_dist(differing, world=2, args=([run, run | change],))
    assert first == second
    assert first.startswith(line) if line else first == ""
