"""Stages of the demo: kept while nothing they stand on has changed, gone on with when stopped, never mixed up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.examples import DIGITS, example
from unimega.errors import ConfigError, UnimegaError

stages, training, demo, processes = (example(name) for name in ("stages", "training", "demo", "processes"))


class Work:
    """Two stages, the second made of what the first wrote; counts how often each one works."""

    def __init__(self, folder):
        self.folder, self.done, self.started = folder, [], []

    def write(self, name, content, *, stop=False):
        def work(started):
            self.started.append(started)
            self.done.append(name)
            if stop:
                raise KeyboardInterrupt
            (self.folder / name).write_text(content)
            return [self.folder / name]

        return work

    def run(self, *, settings=1, code=(), content="a", stop=False):
        self.done.clear()
        self.started.clear()
        line = stages.Stages(self.folder)
        line.run("first", self.write("one", content), settings={"n": settings}, code=code)
        line.run("second", self.write("two", "b", stop=stop), settings={})
        return line


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_finished_stages_are_kept_and_say_so(work, capsys):
    first = work.run()
    assert work.done == ["one", "two"]
    capsys.readouterr()
    second = work.run()
    assert work.done == []
    assert second.wall_s == first.wall_s
    assert capsys.readouterr().out.count("kept, made in") == 2


def test_other_settings_or_code_run_the_stage_and_all_behind_it(work, tmp_path):
    code = tmp_path / "code.py"
    code.write_text("1")
    work.run(code=[code])
    work.run(settings=2, code=[code])
    assert work.done == ["one", "two"]
    code.write_text("2")
    work.run(settings=2, code=[code])
    assert work.done == ["one", "two"]
    work.run(settings=2, code=[code])
    assert work.done == []


def test_a_stage_whose_results_came_out_otherwise_runs_the_next_again(work):
    work.run()
    (work.folder / "one").unlink()
    work.run(content="another")
    assert work.done == ["one", "two"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damaged_files_are_made_again(work, harm):
    work.run()
    path = work.folder / "two"
    if harm == "remove":
        path.unlink()
    else:
        path.write_text({"flip": "c", "truncate": ""}[harm])
    work.run()
    assert work.done == ["two"]
    assert path.read_text() == "b"


def test_a_stopped_stage_is_told_so_if_its_inputs_are_the_same(work):
    with pytest.raises(KeyboardInterrupt):
        work.run(stop=True)
    marker = work.folder / "stages" / "second.json"
    stopped = json.loads(marker.read_text())
    assert "files" not in stopped
    marker.write_text(json.dumps(stopped | {"wall_s": 100.0}))
    line = work.run()
    assert work.done == ["two"]
    assert [started.again for started in work.started] == [True]
    assert line.wall_s["second"] >= 100  # what was spent before counts
    with pytest.raises(KeyboardInterrupt):
        work.run(settings=2, stop=True)
    work.run(settings=3)
    assert work.done == ["one", "two"]
    assert [started.again for started in work.started] == [False, False]


def test_half_a_marker_is_no_marker(work):
    work.run()
    marker = work.folder / "stages" / "second.json"
    marker.write_text(marker.read_text()[:50])
    work.run()
    assert work.done == ["two"]


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path):
    with stages.alone_in(tmp_path / "demo"):
        other = f"import stages, pathlib; stages.alone_in(pathlib.Path({str(tmp_path / 'demo')!r})).__enter__()"
        found = subprocess.run([sys.executable, "-c", other], cwd=DIGITS, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "is in use: another demo runs there" in found.stderr
    with stages.alone_in(tmp_path / "demo"):
        pass


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def test_ranks_of_a_killed_demo_are_ended_and_nobody_else(tmp_path):
    """A parent in the place of torchrun, a child in a session of its own as its ranks are; both outlive the demo."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        rank = psutil.Process(int(process.stdout.readline()))
        family = processes.Family(process, tmp_path)
        family.update()
        members = json.loads(family.path.read_text())
        assert members.keys() == {str(process.pid), str(rank.pid)}
        members[str(bystander.pid)] = psutil.Process(bystander.pid).create_time() - 1  # its number was used before
        family.path.write_text(json.dumps(members))
        os.kill(process.pid, signal.SIGKILL)  # torchrun is gone, its rank is still there
        process.wait()
        assert rank.is_running()
        processes.end_recorded(family.path)
        assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
        assert bystander.poll() is None
        assert not family.path.exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_ctrl_c_lets_ranks_save(tmp_path):
    """SIGTERM first, and time to act on it."""
    code = (
        "import signal, sys, time, pathlib\n"
        "def save(*_): pathlib.Path('saved').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    start = time.monotonic()
    processes.Family(process, tmp_path).stop(30)
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - start < 20


def test_the_projection_names_a_way_out_only_when_it_is_slow():
    assert "--training.steps 1000" not in training.projection(350, 100)
    assert "--training.steps 1000" in training.projection(370, 100)


def test_what_went_wrong_is_the_engines_own_line():
    log = "W1121 torchrun\nunimega: data.train='x' is missing. Name another.\nTraceback\nValueError: other\n"
    assert training.reason(log) == "data.train='x' is missing. Name another."
    assert training.reason("a\n[rank1]: RuntimeError: gloo\n  more") == "[rank1]: RuntimeError: gloo"
    assert training.reason("") == "it wrote nothing."


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--split", "-1"], "--split=-1 is too small"),
        (["--steps", "0"], "--steps=0 is too small"),
        (["--ranks", "0"], "--ranks=0 is too small"),
    ],
)
def test_mistakes_on_the_command_line(arguments, line, tmp_path):
    with pytest.raises(ConfigError, match=line):
        demo.main([*arguments, "--output", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(ConfigError, match="holds 'logs' and is no demo's"):
        demo.main(["--output", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        demo.main(["--output", str(tmp_path / "file")])


def test_wrong_settings_of_the_training_throw_nothing_away(tmp_path):
    run = training.Run(tmp_path, 1500, 2, ("--training.stepps", "3"))
    with pytest.raises(UnimegaError, match="stepps"):
        training.check(run)
    with pytest.raises(UnimegaError, match="micro_batch_packs"):
        training.check(training.Run(tmp_path, 1500, 8, ()))
    assert Path(tmp_path / "pretrain.toml").is_file()
