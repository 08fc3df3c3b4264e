"""SIGTERM and SIGUSR1 ask a run to save and end; nothing is done in the handler but to remember it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from unimega import log

STOP = (signal.SIGTERM, signal.SIGUSR1)

logger = log.get(__name__)


class Signals:
    """Whether this process was asked to stop. A second signal changes nothing: schedulers send several.

    Ranks hear of it at different moments, so the loop sums ``asked`` over all of them and stops where all do.
    """

    def __init__(self) -> None:
        self.asked = False
        self.name = ""

    @contextmanager
    def listening(self) -> Iterator["Signals"]:
        """Take the signals over, in the main thread; elsewhere (a run inside another program) they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._remember) for number in STOP}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.asked, self.name = True, self.name or signal.Signals(number).name


@contextmanager
def held() -> Iterator[None]:
    """Keep the signals from processes that are started meanwhile: they inherit the mask.

    A scheduler signals a whole process group: the writers of a checkpoint would die of it and the save with them. This
    process still hears the signal, in another thread or afterwards.
    """
    resource_tracker.ensure_running()  # starting it later would lift the mask (Python 3.11 and 3.12)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
