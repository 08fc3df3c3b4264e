"""How much host memory a piece of work takes beyond what was held before."""

import threading
from types import TracebackType

import psutil

_INTERVAL_SECONDS = 0.005


class HostPeak:
    """Samples the resident memory of this process while a ``with`` block runs: ``bytes`` is the most above the start.

    The system's own high-water mark cannot be used: it is of the whole life of the process, and the metrics report it.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._start = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "HostPeak":
        self._start = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        assert self._thread is not None
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)
            if self._done.wait(_INTERVAL_SECONDS):
                return
