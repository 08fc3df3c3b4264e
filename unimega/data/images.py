"""What turns pictures into codes: the contract between preprocessing and the VQ tokenizers of `models/vision`."""

import io
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from unimega.data.format import Ids
from unimega.errors import optional

Pixels = npt.NDArray[np.uint8]
"""[H, W, 3] sRGB, contiguous, of any size: a tokenizer resizes and crops as its training did."""

MAX_PIXELS = 64 << 20
"""Pixels of one picture: a file of a few kB may claim more than memory holds."""


class ImageTokenizer(Protocol):
    """Pictures to codes.

    The classes of `models/vision` meet it by shape, without an import (`models` stands below `data`);
    ``tools/preprocess_data.py --image-tokenizer NAME:PATH`` joins them by ``unimega.models.vision.load(NAME, PATH)``.
    """

    @property
    def codebook(self) -> int:
        """Codes are 0 .. codebook - 1."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of every picture."""

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the weights and of every setting that changes codes."""

    def encode(self, images: Sequence[Pixels]) -> Ids:
        """Codes of a batch of pictures of any sizes.

        The codes of a picture may not depend on its neighbours' contents; the caller fixes the batches, so that the
        bytes of a corpus do not depend on the number of workers.

        Returns:
            int32 [len(images), rows * columns], row by row, in [0, codebook).
        """


class BadImage(Exception):
    """Bytes that are no picture, or one that is too large; the message says why."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The pixels of an encoded picture (JPEG, PNG, WebP, ...): upright by its EXIF mark, on white where transparent.

    Raises:
        BadImage: no picture, cut, or more than ``max_pixels``.
        UnimegaError: Pillow is not installed.
    """
    image_module = optional("PIL.Image", extra="data")
    operations = optional("PIL.ImageOps", extra="data")
    try:
        with image_module.open(io.BytesIO(data)) as image:
            if math.prod(image.size) > max_pixels:
                raise BadImage(f"a picture of {image.size[0]} x {image.size[1]} pixels, at most {max_pixels} are read")
            upright = operations.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                white = image_module.new("RGBA", upright.size, "white")
                upright = image_module.alpha_composite(white, upright)
            return np.array(upright.convert("RGB"), dtype=np.uint8)
    except BadImage:
        raise
    except image_module.UnidentifiedImageError as error:
        raise BadImage("not a picture of a known format") from error
    except Exception as error:  # decoders of untrusted bytes raise OSError, SyntaxError, struct.error, ...
        raise BadImage(
            f"not a picture that can be read ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
