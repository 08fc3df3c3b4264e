"""Run a function on several ranks of a gloo world: forked from a server that has imported everything, met in a file.

No ports, so nothing to retry; results travel as files, because a queue races with the end of a rank.
"""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context: Any = None


def run_dist(
    function: Callable[..., Any], *, world: int, args: tuple[Any, ...] = (), timeout: float = 150
) -> list[Any]:
    """``function(*args)`` on every rank of a new world; what the ranks returned, in order.

    The function and its arguments must pickle (a function of a test module does). Default process group: gloo.
    """
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(["tests.distributed.preload"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_context.Process(target=_rank, args=(rank, world, folder, function, args)) for rank in range(world)]
        for process in ranks:
            process.start()
        results = _collect(ranks, Path(folder), time.monotonic() + timeout)
    failed = [(rank, value) for rank, (ok, value) in sorted(results.items()) if not ok]
    if failed:
        raise AssertionError(f"rank {failed[0][0]} of {world}:\n{failed[0][1]}")
    if len(results) < world:
        raise AssertionError(f"only ranks {sorted(results)} of {world} answered within {timeout} s")
    return [results[rank][1] for rank in range(world)]


def _collect(ranks: list[Any], folder: Path, deadline: float) -> dict[int, tuple[bool, Any]]:
    results: dict[int, tuple[bool, Any]] = {}
    while len(results) < len(ranks) and time.monotonic() < deadline:
        alive = [process.is_alive() for process in ranks]
        for rank in set(range(len(ranks))) - set(results):
            file = folder / f"{rank}.pickle"
            if file.exists():
                results[rank] = pickle.loads(file.read_bytes())
        if not all(ok for ok, _ in results.values()) or not any(alive):
            break
        time.sleep(0.01)
    for process in ranks:
        process.join(2 if len(results) == len(ranks) else 0.2)
        if process.is_alive():
            process.kill()
            process.join()
    return results


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        import torch.distributed as dist

        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
        )
        result: tuple[bool, Any] = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    temporary = Path(folder) / f"{rank}.tmp"
    temporary.write_bytes(pickle.dumps(result))
    temporary.rename(Path(folder) / f"{rank}.pickle")
