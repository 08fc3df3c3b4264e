"""What the conversion commands share: options whose mistakes are one line, and a bar. No torch."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm

from unimega.errors import UnimegaError

_PATIENCE_SECONDS = 1.0


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the usage."""
        raise UnimegaError(f"{message}. --help lists the options.")


def ids(option: str, text: str | None) -> tuple[int, ...] | None:
    """A list of token ids, ``89,90``; None stays None.

    Raises:
        UnimegaError: it is no such list.
    """
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise UnimegaError(f"{option}={text!r} is not a list of ids. Write it as 89,90.") from None


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, for what takes more than a second; yields the function that tells it (bytes done, of)."""
    with tqdm(desc=what, unit="B", unit_scale=True, delay=_PATIENCE_SECONDS, disable=None) as shown:

        def tell(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield tell
