"""python benchmarks/bench_step.py [--model mot] [--precision fp32 bf16] [--shape KEY=NUMBER ...] [--output FILE]

Time whole training steps (forward, backward, clipping, AdamW) of one process. Prints a JSON line for each precision
and model:

- ``unix``: split layers at both ends; with ``--model mot``, ``mot``: all layers split, attention over documents;
- ``dense``: one weight for all modalities, all else equal, the scopes of attention too: the same FLOPs to the last one;
- ``dense_document``: the preset ``dense``: attention over documents in every layer, a few FLOPs more than ``unix``;
- ``masked``: ``unix`` or ``mot`` with boolean masks, as original code has it (``masked*.py``), the same numbers.

Steps are timed in turns (round by round, the order rotating), so that what else a machine does falls on all alike:
ratios are between neighbours of one round. A round also times the GEMMs of ``unix`` alone, at its shapes.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import BASE, MODELS, QUICK, Contestant, Shape, make_contestants, make_pack, make_specs, model_gemms
from syncs import count_syncs

from unimega import backend
from unimega.errors import ConfigError, UnimegaError, run_cli
from unimega.training.engine import DTYPES

TIMEOUT = datetime.timedelta(minutes=5)
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""Relative difference of the losses of ``unix`` and ``masked``, before the first update and after it."""


def warm_up(
    contestants: Mapping[str, Contestant], model: str, precision: str
) -> tuple[dict[str, float], dict[str, int]]:
    """Two steps of everything: (losses after one update, host syncs of the second step).

    Raises:
        UnimegaError: ``masked`` does not compute what ``model`` computes, before an update or after it.
    """
    first = {name: each.step() for name, each in contestants.items()}
    counted = {name: count_syncs(each.step) for name, each in contestants.items()}
    second = {name: loss for name, (_, loss) in counted.items()}
    for losses in (first, second):
        ours, theirs = losses[model], losses["masked"]
        if not abs(ours - theirs) <= TOLERANCE[precision] * abs(ours):
            raise UnimegaError(f"the loss of {model} is {ours}, of masked {theirs}: they are not the same model.")
    return second, {name: number for name, (number, _) in counted.items()}


Times = dict[str, list[tuple[float, float]]]
"""(wall seconds, processor seconds of this process) of each contestant by round."""


def time_rounds(runs: Mapping[str, Callable[[], Any]], rounds: int) -> Times:
    """Run everything once a round, each time starting one further on."""
    names, device = list(runs), backend.current()
    times: Times = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            device.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            device.synchronize()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def ratios(times: Times, name: str, base: str, clock: int) -> dict[str, float]:
    """Median, least and greatest of the ratios of the rounds."""
    pairs = [a[clock] / b[clock] for a, b in zip(times[name], times[base], strict=True)]
    return {"median": round(statistics.median(pairs), 3), "min": round(min(pairs), 3), "max": round(max(pairs), 3)}


def measure(shape: Shape, model: str, precision: str, steps: int) -> Iterator[dict[str, Any]]:
    """One record per model."""
    dtype, device, pack = DTYPES[precision], backend.current(), make_pack(shape)
    contestants = make_contestants(shape, model, precision, pack)
    losses, step_syncs = warm_up(contestants, model, precision)
    syncs = {name: count_syncs(each.forward_backward)[0] for name, each in contestants.items()}
    square = device.measured_gemm_flops(dtype)
    gemm_flops, gemms = model_gemms(make_specs(shape, model)[model], pack.microbatch(), dtype)
    gemms()
    times = time_rounds({**{name: each.step for name, each in contestants.items()}, "gemms": gemms}, steps)
    on_host = device.device.type == "cpu"
    rate = gemm_flops / statistics.median(wall for wall, _ in times["gemms"])
    for name, each in contestants.items():
        wall = [seconds for seconds, _ in times[name]]
        seconds = statistics.median(wall)
        yield {
            "benchmark": "step",
            "precision": precision,
            "model": name,
            "parameters": each.parameters,
            "flops": each.flops,
            "seconds": round(seconds, 4),
            "seconds_min": round(min(wall), 4),
            "seconds_max": round(max(wall), 4),
            "tokens_per_s": round(shape.tokens / seconds, 1),
            "flops_per_s": each.flops / seconds,
            "gemm_flops_per_s_square": square,
            "gemm_flops_per_s_model": rate,
            "fraction_of_square": round(each.flops / seconds / square, 3),
            "fraction_of_model_gemms": ratio_of_rates(times, name, each.flops / gemm_flops, clock=0),
            "ratio_to_dense": ratios(times, name, BASE, 0),
            "ratio_to_masked": ratios(times, name, "masked", 0),
            "cpu_ratio_to_dense": ratios(times, name, BASE, 1) if on_host else None,
            "flops_to_dense": round(each.flops / contestants[BASE].flops, 4),
            "syncs_forward_backward": syncs[name],
            "syncs_step": step_syncs[name],
            "loss_after_one_step": round(losses[name], 5),
            "rounds": steps,
        }


def ratio_of_rates(times: Times, name: str, flops_to_gemms: float, *, clock: int) -> float:
    """Median over rounds of (FLOP/s of the step) / (FLOP/s of the GEMMs alone)."""
    pairs = zip(times["gemms"], times[name], strict=True)
    return round(statistics.median(flops_to_gemms * gemm[clock] / step[clock] for gemm, step in pairs), 3)


def environment(shape: Shape) -> dict[str, Any]:
    """What every record says of where it was taken."""
    device = backend.current().device
    sha = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "shape": asdict(shape),
        "device": _processor() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": importlib.metadata.version("megatron-core"),
        "commit": sha.stdout.strip() or None,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    """The name that the system gives the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, {len(named)} cores" if named else platform.processor() or platform.machine()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="mot: every layer split, norms too")
    parser.add_argument("--shape", nargs="*", default=[], metavar="KEY=NUMBER", help=str(asdict(Shape())))
    parser.add_argument("--steps", type=int, default=6, help="rounds that are timed")
    parser.add_argument("--threads", type=int, default=None, help="of torch; absent: its own choice")
    parser.add_argument("--output", type=Path, default=None, help="also append the lines to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run; the figures say little")
    return parser.parse_args(argv)


def read_shape(base: Shape, changes: Sequence[str]) -> Shape:
    """``base`` with ``KEY=NUMBER`` applied.

    Raises:
        ConfigError: no such key, or no number.
    """
    known = [f.name for f in fields(Shape)]
    for change in changes:
        key, _, value = change.partition("=")
        if key not in known or not value.isdigit():
            raise ConfigError(f"--shape {change!r} is wrong. Give KEY=NUMBER with a key of: {', '.join(known)}.")
        base = replace(base, **{key: int(value)})
    return base


def main(argv: Sequence[str]) -> None:
    """See the module."""
    options = parse(argv)
    shape = read_shape(QUICK if options.quick else Shape(), options.shape)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    backend.current().init_process_group(timeout=TIMEOUT)
    for precision in options.precision:
        for record in measure(shape, options.model, precision, options.steps):
            line = json.dumps(record | environment(shape))
            print(line, flush=True)
            if options.output is not None:
                with options.output.open("a") as out:
                    out.write(f"{line}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
