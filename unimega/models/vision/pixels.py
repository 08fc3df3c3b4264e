"""Pictures of any size to the squares that a tokenizer was trained on."""

import numpy as np
import numpy.typing as npt

from unimega.errors import optional

_MAX_RATIO = 8
"""Sides of a longer picture are cut to this ratio before it is resized: a strip of one pixel would fill the memory."""


def square(image: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Resize the shorter side to ``side`` (Lanczos), then cut the middle: uint8 [side, side, 3] of [H, W, 3].

    Raises:
        UnimegaError: Pillow is not installed.
    """
    pillow = optional("PIL.Image", extra="data")
    height, width = image.shape[:2]
    most = _MAX_RATIO * min(height, width)
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    picture = pillow.fromarray(np.ascontiguousarray(image[top : top + most, left : left + most]))
    scale = side / min(picture.size)
    size = (round(scale * picture.width), round(scale * picture.height))
    if size != picture.size:
        picture = picture.resize(size, pillow.Resampling.LANCZOS)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.uint8)
