"""What a user can get wrong, as exceptions that read as one line, and the way to optional packages."""

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType

OTHER_RANKS_WAIT_SECONDS = 10
INTERRUPTED = 130


class UnimegaError(Exception):
    """A mistake of the user's: one line that says where, what is wrong and what to do. A terminal sees no traceback."""


class ConfigError(UnimegaError):
    """A run description that is malformed, inconsistent or not possible."""


class DataError(UnimegaError):
    """A corpus or input file that is missing, damaged or at odds with the run."""


class CheckpointError(UnimegaError):
    """A checkpoint or Hugging Face folder that is missing, damaged or of another model."""


class KernelUnavailable(UnimegaError):
    """An implementation was named that cannot run here."""


class BackendError(UnimegaError):
    """The device, its collective library or megatron-core is not what the engine needs."""


def optional(module: str, *, extra: str) -> ModuleType:
    """Import a package that only some users need.

    Raises:
        UnimegaError: it is not installed; the line names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnimegaError(
            f"package {module.split('.')[0]!r} is needed here and cannot be imported ({error}). "
            f"Install it with: pip install 'unimega[{extra}]'."
        ) from error


def run_cli(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Run a command; a user error becomes one line on stderr and exit status 2, Ctrl-C one line and status 130.

    Under torchrun local rank 0 prints it. The others wait: torchrun ends all ranks when the first one exits, and would
    cut off rank 0 before its line. One that is still there afterwards is alone with its error and prints it itself.
    """
    try:
        main(argv)
    except UnimegaError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        print(f"unimega: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"unimega: {str(interrupt) or 'interrupted.'}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
