"""Tokenizers of pictures: each meets ``unimega.data.images.ImageTokenizer`` and can draw its codes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from unimega.errors import ConfigError
from unimega.models.vision import chameleon, digits


class Drawer(Protocol):
    """What ``load`` gives: pictures to codes and back."""

    @property
    def codebook(self) -> int:
        """Codes are 0 .. codebook - 1."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of every picture."""

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the weights and of every setting that changes codes."""

    def encode(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int32]:
        """int32 [N, rows x columns] of uint8 pictures [H, W, 3] of any sizes."""

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """uint8 [N, H, W, 3] of codes [N, rows x columns]."""


TOKENIZERS: dict[str, Callable[[Path], Drawer]] = {"chameleon": chameleon.load, "digits": digits.load}
"""Loader of each kind by its name."""


def load(name: str, path: str | Path) -> Drawer:
    """The tokenizer of pictures called ``chameleon`` or ``digits`` from its files at ``path``.

    Raises:
        ConfigError: no such kind.
        CheckpointError: a file is missing, damaged or of another model.
    """
    if name not in TOKENIZERS:
        raise ConfigError(f"image tokenizer {name!r} is not known. There are {', '.join(TOKENIZERS)}.")
    return TOKENIZERS[name](Path(path))
