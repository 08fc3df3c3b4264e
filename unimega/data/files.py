"""Open the files of a corpus: what is missing, a folder, a loop of links or not allowed gets one line."""

import errno
import mmap
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from unimega.errors import DataError


def exists(path: Path) -> bool:
    """Whether there is a file that can be opened.

    Raises:
        DataError: there is something of this name that is no file.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise _refusal(path, error) from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'}, not a file of a corpus.")
    return True


def mapped(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file as a read-only view that owns its map; nothing is read before it is touched.

    Raises:
        DataError: it cannot be opened.
    """
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.zeros(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def read_bytes(path: Path) -> bytes | None:
    """All of a file; None if there is none.

    Raises:
        DataError: it cannot be opened.
    """
    if not exists(path):
        return None
    with _opened(path) as file:
        return file.read()


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be opened ({error.strerror or error}).")
