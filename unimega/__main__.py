"""``python -m unimega doctor``: what runs here, and what does not and why."""

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata

from unimega.errors import run_cli

PACKAGES = ("torch", "megatron-core", "numpy", "transformers", "triton", "torch-npu", "transformer-engine")


def main(argv: Sequence[str]) -> None:
    """Parse and run the one subcommand."""
    parser = argparse.ArgumentParser(prog="python -m unimega", description="unimega " + _version("unimega"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="versions, device, and which implementation of each op can run here")
    parser.parse_args(argv)
    doctor()


def doctor() -> None:
    """Print versions, the backend, and op x implementation x device x reason."""
    print(f"unimega        {_version('unimega')}")
    print(f"python         {platform.python_version()} ({platform.system()} {platform.machine()})")
    for package in PACKAGES:
        print(f"{package:<14} {_version(package)}")

    import torch

    from unimega import backend, kernels

    here = backend.current()
    note = f" ({here.note})" if here.note else ""
    print(f"{'backend':<14} {here.name}, device {here.device}, collectives {here.collective}{note}\n")
    devices = tuple(dict.fromkeys((torch.device(here.device.type), torch.device("cpu"))))
    table = [("op", "implementation", "device", "")]
    for row in kernels.registry.rows(devices):
        state = row.reason or ("chosen by auto" if row.chosen else "available")
        table.append((row.op, row.impl, row.device, f"{state} ({row.note})" if row.note else state))
    for line in _columns(table):
        print(line)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package != "unimega":
            return "not installed"
    from unimega import __version__

    return f"{__version__} (not installed: run from its folder)"


def _columns(table: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
