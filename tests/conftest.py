"""What holds for every test: one thread per process, a watchdog, no process left behind, GPU tests only with a GPU.

The time limit of a test is ``timeout`` in pyproject.toml (pytest-timeout); ``faulthandler_timeout``, a little shorter,
prints where every thread stands. ``@pytest.mark.timeout(seconds)`` overrides it.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports numpy or torch, and inherited by the ranks that tests start.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
if not os.path.exists("/dev/nvidiactl"):  # no GPU: Triton's kernels run in its interpreter, chosen at its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The first draw of a fresh clone builds tables of Unicode, which counts as slow. The same examples on every machine: a
# change is what fails, not the day; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("same"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs devices that are not here."""
    needs = {"gpu": 1, "multi_gpu": 2}
    wanted = [(item, count) for item in items for name, count in needs.items() if item.get_closest_marker(name)]
    if not wanted:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item, count in wanted:
        if found < count:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {count} CUDA device(s), {found} found: run on a GPU machine")
            )


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """A hung rank of a failed test would hold memory and a core for the rest of the run."""
    yield
    for process in multiprocessing.active_children():
        process.terminate()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the calls of ops that were held to a definition: op x implementation x case x dtype."""
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            place, _, name = report.nodeid.partition("::")
            if name.startswith("test_matches_definition["):
                counts.setdefault(outcome, Counter())[place.removeprefix("tests/")] += 1
    if counts:
        terminalreporter.section("ops held to their definitions: op x implementation x case x dtype")
    for outcome, places in counts.items():
        told = ", ".join(f"{place} {number}" for place, number in sorted(places.items()))
        terminalreporter.write_line(f"{outcome:7} {places.total():5}   ({told})")
