"""What ``bench_<op>.py`` share: contestants timed in turns on equal inputs, floors, memory, and the JSON line of each.

A CPU is timed in processor seconds of this process, the least of the rounds; its ratios are between neighbours of one
round. A GPU is timed by events around a queue of calls, the median of the rounds; inputs are rotated, so that none of
them is still in the last-level cache, and a queue of fills lets the host run ahead of the first call.
"""

import argparse
import ctypes
import dataclasses
import importlib
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import environment

from unimega import backend
from unimega.errors import run_cli
from unimega.kernels import registry
from unimega.training.engine import DTYPES

Tensors = tuple[torch.Tensor, ...]
Function = Callable[[Tensors], Tensors]
"""From leaves to outputs; those that need a gradient are given one."""

CACHE_BYTES = 512 * 2**20
"""No last-level cache of a GPU is larger."""
ROUND_SECONDS = 0.02
"""How long the calls of a round take at least on a GPU."""


@dataclass(frozen=True)
class Floor:
    """What no implementation can go below: memory that must be read or written once, and operations."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Job:
    """One op at one shape: what runs, and what it is held to."""

    op: str
    shape: Mapping[str, Any]
    leaves: Callable[[], Tensors]
    """New random inputs; the floating ones need gradients."""
    contestants: Mapping[str, Function]
    """The first is ours, and what the others are compared with; names of ours are ``unimega-<implementation>``."""
    forward: Floor
    both: Floor
    """Forward and backward."""
    dtype: torch.dtype
    absent: Mapping[str, str] = field(default_factory=dict)
    """Contestants that cannot run here, and why."""
    tolerance: float = 0.05
    """Largest relative difference (Frobenius) to the first contestant, in outputs and gradients; beyond: no record."""
    counters: Mapping[str, Callable[[Function, Tensors], Any]] = field(default_factory=dict)
    """Further fields of a record, from a contestant and leaves."""
    unlike: Mapping[str, Function] = field(default_factory=dict)
    """Contestants whose results are others, by another order of rows or fewer weights: not compared."""
    passes: tuple[str, ...] = ("forward", "both")


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in this run."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float

    def seconds(self, floor: Floor) -> float:
        """The least time that work takes: moved and computed at once."""
        return max(floor.bytes / self.copy_bytes_per_s, floor.flops / self.gemm_flops_per_s)


def ours(op: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The implementations of an op that can run here, best first, as contestants; and why not the others."""
    device = backend.current().device
    made: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for impl in registry.implementations(op):
        reason = registry.why_not(impl, device)
        if reason is None and device.type == "cpu" and impl.name == "triton":
            reason = "its interpreter's times say nothing"
        if reason is None:
            made[f"unimega-{impl.name}"] = registry.resolve(op, device=device, impl=impl.name)
        else:
            absent[f"unimega-{impl.name}"] = reason
    return made, absent


def compiled(function: Any) -> Any:
    """``torch.compile`` of a contestant's inner function, without its recompilation for other sizes."""
    return torch.compile(function, dynamic=False)


def liger(module: str, name: str) -> Any:
    """A name of Liger's, or the reason why there is none (a str)."""
    if backend.current().device.type == "cpu":
        return "liger_kernel runs on GPUs alone"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return getattr(importlib.import_module(f"liger_kernel.{module}"), name)


def add(
    job: dict[str, Function], absent: dict[str, str], name: str, made: Any, wrap: Callable[[Any], Function]
) -> None:
    """Enter a peer, or the reason (a str) why it is missing."""
    if isinstance(made, str):
        absent[name] = made
    else:
        job[name] = wrap(made)


def measure(job: Job, rounds: int) -> Iterator[dict[str, Any]]:
    """A record for each pass and contestant; absent ones get a record with their reason."""
    device = backend.current()
    leaves = job.leaves()
    count = 1 if device.device.type == "cpu" else max(2, math.ceil(2 * CACHE_BYTES / _bytes(leaves)))
    sets = [leaves, *(job.leaves() for _ in range(min(count, 64) - 1))]
    contestants, absent = _able(job, sets[0])
    ceilings = measured_ceilings(job.dtype)
    for name in job.passes:
        floor = job.forward if name == "forward" else job.both
        runs = {who: _call(function, name) for who, function in contestants.items()}
        times = time_rounds(runs, sets, rounds)
        best = min if device.device.type == "cpu" else statistics.median
        first = next(iter(runs))
        for who, seconds in times.items():
            pairs = [b / a for a, b in zip(times[first], seconds, strict=True)]
            yield {
                "op": job.op,
                "shape": dict(job.shape),
                "dtype": str(job.dtype).removeprefix("torch."),
                "pass": name,
                "contestant": who,
                "seconds": best(seconds),
                "clock": "processor" if device.device.type == "cpu" else "event",
                "times_of_first": {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)},
                "floor_bytes": floor.bytes,
                "floor_flops": floor.flops,
                "floor_seconds": ceilings.seconds(floor),
                "fraction_of_floor": ceilings.seconds(floor) / best(seconds),
                "copy_bytes_per_s": ceilings.copy_bytes_per_s,
                "gemm_flops_per_s": ceilings.gemm_flops_per_s,
                "peak_bytes": peak_bytes(runs[who], sets[0]),
                "rounds": rounds,
            } | {key: count(contestants[who], sets[0]) for key, count in job.counters.items()}
    for who, reason in absent.items():
        yield {"op": job.op, "shape": dict(job.shape), "contestant": who, "absent": reason}


def _able(job: Job, leaves: Tensors) -> tuple[dict[str, Function], dict[str, str]]:
    """Contestants that ran once and agree with the first; the reasons of the others. Warms all of them up."""
    able: dict[str, Function] = {}
    absent = dict(job.absent)
    wanted: list[torch.Tensor] = []
    for name, function in job.contestants.items():
        try:
            found = _results(function, leaves)
        except (RuntimeError, NotImplementedError, ImportError) as error:  # a peer's limits are a result of their own
            if not able:
                raise
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        wanted = wanted or found
        apart = max(_difference(a, b) for a, b in zip(found, wanted, strict=True))
        if apart <= job.tolerance:
            able[name] = function
        else:
            absent[name] = f"differs from {next(iter(able))} by {apart:.2g}"
    for name, function in job.unlike.items():
        _results(function, leaves)
        able[name] = function
    return able, absent


def _results(function: Function, leaves: Tensors) -> list[torch.Tensor]:
    outputs = function(leaves)
    return [t.detach().clone() for t in (*outputs, *_gradients(outputs, leaves)) if t is not None]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    wide = b.double()
    return float((a.double() - wide).norm() / wide.norm().clamp(min=1e-30))


def _gradients(outputs: Tensors, leaves: Tensors) -> Tensors:
    """Incoming gradients are the outputs themselves: no two rows alike, and nothing to make."""
    live = [out for out in outputs if out.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not live:
        return ()
    incoming = [torch.ones_like(out) if out.ndim == 0 else out.detach() for out in live]
    return torch.autograd.grad(live, wanted, incoming, allow_unused=True)


def _call(function: Function, name: str) -> Callable[[Tensors], Any]:
    if name == "both":
        return lambda leaves: _gradients(function(leaves), leaves)
    return lambda leaves: function(leaves)


def time_rounds(
    runs: Mapping[str, Callable[[Tensors], Any]], sets: Sequence[Tensors], rounds: int
) -> dict[str, list[float]]:
    """Seconds of one call, by contestant and round; every round starts one contestant further on."""
    names = list(runs)
    clock = _processor_seconds if backend.current().device.type == "cpu" else _event_seconds
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = {name: _calls(run, sets) for name, run in runs.items()}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            times[name].append(clock(runs[name], sets, calls[name]))
    return times


def _calls(run: Callable[[Tensors], Any], sets: Sequence[Tensors]) -> int:
    """Calls of a round: one pass over all sets of inputs, or more where that is too short to time."""
    device = backend.current()
    device.synchronize()
    start = time.perf_counter()
    run(sets[-1])
    device.synchronize()
    return max(len(sets), math.ceil(ROUND_SECONDS / max(time.perf_counter() - start, 1e-6)))


def _processor_seconds(run: Callable[[Tensors], Any], sets: Sequence[Tensors], calls: int) -> float:
    start = time.process_time()
    for leaves in itertools.islice(itertools.cycle(sets), calls):
        run(leaves)
    return (time.process_time() - start) / calls


def _event_seconds(run: Callable[[Tensors], Any], sets: Sequence[Tensors], calls: int) -> float:
    device = backend.current()
    start, stop = device.event(), device.event()
    filler = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device.device)
    for _ in range(10):
        filler.zero_()
    start.record()
    for leaves in itertools.islice(itertools.cycle(sets), calls):
        run(leaves)
    stop.record()
    device.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def peak_bytes(run: Callable[[Tensors], Any], leaves: Tensors) -> int:
    """Memory that one call takes at most beyond its inputs, results included."""
    device = backend.current()
    if device.device.type == "cpu" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is taken now
    device.synchronize()
    before = device.memory_allocated()
    device.reset_memory_peak()
    kept = run(leaves)
    device.synchronize()
    peak = device.memory_peak() - before
    del kept
    return peak


_ceilings: dict[torch.dtype, Ceilings] = {}


def measured_ceilings(dtype: torch.dtype) -> Ceilings:
    """Copy bandwidth (read and write counted) of 512 MiB (a CPU: 64 MiB), and the square GEMM's rate."""
    if dtype not in _ceilings:
        device = backend.current()
        size = 2**26 if device.device.type == "cpu" else CACHE_BYTES
        source = torch.zeros(size, dtype=torch.uint8, device=device.device)
        target = torch.empty_like(source)
        times = time_rounds({"copy": lambda leaves: leaves[1].copy_(leaves[0])}, [(source, target)], 7)["copy"]
        rate = 2 * source.nbytes / (min(times) if device.device.type == "cpu" else statistics.median(times))
        _ceilings[dtype] = Ceilings(rate, device.measured_gemm_flops(dtype))
    return _ceilings[dtype]


def _bytes(leaves: Tensors) -> int:
    return sum(t.nbytes for t in leaves)


def noise(*shape: int, dtype: torch.dtype, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
    """Random normal numbers on the device: zeros would run faster on a GPU, which then draws less power."""
    x = torch.randn(shape, device=backend.current().device) * scale
    return x.to(dtype).requires_grad_(grad)


def main(
    doc: str | None,
    jobs: Callable[[str, torch.dtype], Iterator[Job]],
    argv: Sequence[str],
    *,
    dtypes: Sequence[str] = ("bf16",),
) -> None:
    """The command line that every benchmark of an op has.

    Args:
        doc: the docstring of the benchmark.
        jobs: from ``tiny``, ``cpu`` or ``gpu`` (which sizes) and a dtype.
        argv: arguments.
        dtypes: what is measured unless ``--precision`` says otherwise.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(dtypes))
    parser.add_argument("--sizes", choices=("tiny", "cpu", "gpu"), default=None, help="absent: those for this device")
    parser.add_argument("--rounds", type=int, default=None, help="absent: 5 on a CPU, 15 on a GPU, 1 with --sizes tiny")
    parser.add_argument("--only", default="", metavar="TEXT", help="shapes that say so, e.g. '\"V\": 48000'")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEXT", help="contestants whose names say so")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--output", type=Path, default=None, help="also append the lines to this file")
    options = parser.parse_args(argv)
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    device = backend.current()
    device.select()
    torch.set_num_threads(options.threads)
    sizes = options.sizes or ("cpu" if device.device.type == "cpu" else "gpu")
    rounds = options.rounds or {"tiny": 1, "cpu": 5, "gpu": 15}[sizes]
    unwanted = (*options.without, *(("compile",) if options.no_compile else ()))
    for precision in options.precision:
        for job in jobs(sizes, DTYPES[precision]):
            if options.only not in json.dumps(dict(job.shape)):
                continue
            for record in measure(without(job, unwanted), rounds):
                line = json.dumps({"benchmark": "op"} | _rounded(record) | environment())
                print(line, flush=True)
                if options.output is not None:
                    with options.output.open("a") as out:
                        out.write(f"{line}\n")


def without(job: Job, unwanted: Sequence[str]) -> Job:
    """The job less the contestants whose names contain one of ``unwanted``."""

    def wanted(contestants: Mapping[str, Function]) -> dict[str, Function]:
        return {name: each for name, each in contestants.items() if not any(word in name for word in unwanted)}

    kept, other = wanted(job.contestants), wanted(job.unlike)
    return dataclasses.replace(job, contestants=kept, unlike=other)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {key: _rounded(each) for key, each in value.items()} if isinstance(value, dict) else value


def run(doc: str | None, jobs: Callable[[str, torch.dtype], Iterator[Job]], **options: Any) -> None:
    """``main`` on the arguments of the process."""
    run_cli(lambda argv: main(doc, jobs, argv, **options), sys.argv[1:])
