"""Processes that a stage starts, kept on file: those of a killed demo would go on writing beside the next one's."""

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from stages import read_json, write_json


class Family:
    """A process that was started and its children, by number and birth time, in ``OUTPUT/stages/processes.json``."""

    def __init__(self, process: "subprocess.Popen[Any]", output: Path) -> None:
        self.process, self.path = process, recorded(output)
        self.members: dict[int, float] = {}
        self.update()

    def update(self) -> None:
        """Look for children that have come since."""
        known = len(self.members)
        with suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            for member in (parent, *parent.children(recursive=True)):
                with suppress(psutil.Error):
                    self.members.setdefault(member.pid, member.create_time())
        if len(self.members) > known:
            write_json(self.path, {str(pid): born for pid, born in self.members.items()})

    def stop(self, grace_seconds: float = 0) -> None:
        """End all: SIGTERM, which torchrun passes on to its ranks; what is left after the grace is killed."""
        self.update()
        try:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also on a second Ctrl-C
            end_recorded(self.path)
            self.process.wait()


def recorded(output: Path) -> Path:
    """Where a family of this folder is written down."""
    return output / "stages" / "processes.json"


def end_recorded(path: Path) -> None:
    """Kill those of a recorded family that still run, and forget it."""
    found = []
    for pid, born in (read_json(path) or {}).items():
        with suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if process.create_time() == born:  # else the number is someone else's by now
                found += [process, *process.children(recursive=True)]
    for process in found:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=10)
    path.unlink(missing_ok=True)
