"""The tokenizer of the digits demo: a code names the centre nearest to a patch of 2 x 2 grey pixels."""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unimega.errors import CheckpointError
from unimega.models.vision.pixels import square

SIDE, PATCH = 8, 2
GRID = SIDE // PATCH

Scans = npt.NDArray[np.float32]
"""[N, 8, 8], 0 is black and 1 is white."""


@dataclass(frozen=True)
class PatchTokenizer:
    """A vector quantiser of patches; 16 codes a picture, row by row."""

    centres: npt.NDArray[np.float32]
    """float32 [K, 4]: the pixels of each code, 0..1."""

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return len(self.centres)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return GRID, GRID

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of the centres and the sizes."""
        settings = f"patches {SIDE} {PATCH}"
        return hashlib.sha256(settings.encode() + self.centres.astype("<f4").tobytes()).hexdigest()

    def encode(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int32]:
        """int32 [N, 16] of uint8 pictures [H, W, 3]; others than 8 x 8 are resized, colours become their mean."""
        fitting = [image if image.shape[:2] == (SIDE, SIDE) else square(image, SIDE) for image in images]
        grey = np.asarray([image.mean(axis=2) / 255 for image in fitting], dtype=np.float32)
        return self.encode_scans(grey.reshape(len(images), SIDE, SIDE)).astype(np.int32)

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """uint8 [N, 8, 8, 3] of codes [N, 16]."""
        grey = np.rint(self.decode_scans(codes) * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=3)

    def encode_scans(self, scans: Scans) -> npt.NDArray[np.int64]:
        """int64 [N, 16]; the lower code wins a tie."""
        cut = scans.reshape(len(scans), GRID, PATCH, GRID, PATCH).swapaxes(2, 3)
        patches = cut.reshape(-1, PATCH * PATCH).astype(np.float64)
        centres = self.centres.astype(np.float64)
        distances = (centres**2).sum(1) - 2 * patches @ centres.T
        return distances.argmin(1).reshape(len(scans), GRID * GRID)

    def decode_scans(self, codes: npt.NDArray[np.integer[Any]]) -> Scans:
        """float32 [N, 8, 8] in 0..1 of codes [N, 16]."""
        patches = self.centres[codes].reshape(len(codes), GRID, GRID, PATCH, PATCH)
        return patches.swapaxes(2, 3).reshape(len(codes), SIDE, SIDE).clip(0, 1)


def load(path: Path) -> PatchTokenizer:
    """The tokenizer whose ``centres`` lie in an npz, such as the ``scans.npz`` of the digits corpus.

    Raises:
        CheckpointError: no such file, not an npz, or no centres [K, 4] in it.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            centres = arrays["centres"]
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: no npz with centres ({' '.join(str(error).split())}). examples/digits/corpus.py writes one."
        ) from error
    if centres.ndim != 2 or centres.shape[1] != PATCH * PATCH or not len(centres) or centres.dtype.kind != "f":
        raise CheckpointError(f"{path}: centres are {centres.dtype} {list(centres.shape)}, floats [K, 4] are needed.")
    if not np.isfinite(centres).all():
        raise CheckpointError(f"{path}: centres hold a number that is not finite. The file is damaged.")
    return PatchTokenizer(centres.astype(np.float32))
