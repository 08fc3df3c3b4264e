"""Workers: processes that do tasks, one at a time each; one that dies is replaced, and its task tried once more."""

import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

import psutil

from unimega import log
from unimega.data.preparing.plan import Plan
from unimega.data.preparing.task import Delta, Report, Task, Worker
from unimega.errors import DataError, UnimegaError

_log = log.get(__name__)
_RECYCLE_BYTES = 1 << 30
"""A worker that holds more between two tasks is replaced: tokenizers cache words without bound."""
_TICK_SECONDS = 0.5


def run(plan: Plan, tasks: Sequence[Task], report: Report, *, tick: Callable[[], None]) -> None:
    """Do tasks in ``plan.job.workers`` processes.

    Args:
        report: called here with what workers tell.
        tick: called about twice a second, also when nobody tells anything.

    Raises:
        DataError: of a worker, or a task killed two workers.
    """
    waiting, alone = deque(tasks), deque[Task]()
    with _Pool(plan) as pool:
        while waiting or alone or pool.busy:
            while waiting and (worker := pool.free()) is not None:
                worker.give(waiting.popleft())
            if alone and not waiting and not pool.busy and (worker := pool.free()) is not None:
                worker.give(alone.popleft(), last=True)
            for event in pool.wait(_TICK_SECONDS):
                if isinstance(event, Delta):
                    report(event)
                elif isinstance(event, Task):
                    _log.warning(
                        "a worker died in %s: its task is tried once more, alone",
                        plan.describe(event.file, event.block),
                    )
                    alone.append(event)
            tick()


class _Process:
    """One worker as its parent sees it."""

    def __init__(self, plan: Plan) -> None:
        context = get_context("spawn")
        self.connection, far = context.Pipe()
        self.process = context.Process(target=_main, args=(far, plan), daemon=True)
        self.process.start()
        far.close()
        self.task: Task | None = None
        self.last = False

    def give(self, task: Task, *, last: bool = False) -> None:
        """Start a task; ``last``: there is no further try."""
        self.task, self.last = task, last
        try:
            self.connection.send(task)
        except OSError:  # it died while it was idle: wait() sees the end of its pipe
            return


class _Pool:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._workers: list[_Process] = []

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    @property
    def busy(self) -> bool:
        return any(worker.task is not None for worker in self._workers)

    def free(self) -> _Process | None:
        """A worker without a task, a new one if there may be more."""
        idle = next((worker for worker in self._workers if worker.task is None), None)
        if idle is None and len(self._workers) < self._plan.job.workers:
            idle = _Process(self._plan)
            self._workers.append(idle)
        return idle

    def wait(self, seconds: float) -> list[Delta | Task]:
        """What workers told: deltas, and tasks whose worker died."""
        events: list[Delta | Task] = []
        for ready in wait([worker.connection for worker in self._workers], timeout=seconds):
            worker = next(worker for worker in self._workers if worker.connection is ready)
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                events += self._buried(worker)
                continue
            if isinstance(message, Delta):
                events.append(message)
            elif isinstance(message, UnimegaError):
                raise message
            elif isinstance(message, str):
                raise RuntimeError(f"a worker failed:\n{message}")
            else:
                worker.task = None
                if message > _RECYCLE_BYTES:
                    self._dismiss(worker)
        return events

    def _dismiss(self, worker: _Process) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join()

    def _buried(self, worker: _Process) -> list[Delta | Task]:
        task, last = worker.task, worker.last
        self._dismiss(worker)
        if task is None:
            return []
        if last:
            code = worker.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"status {code}"
            why = " Out of memory? Lower --max-row-mb or --workers." if code == -signal.SIGKILL else ""
            raise DataError(f"{self._plan.describe(task.file, task.block)}: two workers died there ({how}).{why}")
        return [task]


def _main(connection: Connection, plan: Plan) -> None:
    """A worker: tasks come through the pipe, and its end is the worker's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
    inbox: deque[Task] = deque()
    arrived = threading.Semaphore(0)

    def listen() -> None:
        while True:
            try:
                inbox.append(connection.recv())
            except (EOFError, OSError):
                os._exit(1)  # the parent is gone, also in the middle of a task
            arrived.release()

    threading.Thread(target=listen, daemon=True).start()
    try:
        worker = Worker(plan)
        while True:
            arrived.acquire()
            worker.run(inbox.popleft(), connection.send)
            connection.send(psutil.Process().memory_info().rss)
    except UnimegaError as error:
        connection.send(error)
    except MemoryError:
        connection.send(DataError("out of memory. Lower --max-row-mb or --workers, or free memory."))
    except BaseException:
        connection.send(traceback.format_exc())
