"""The bytes of `PREFIX.bin/.idx` (megatron-core's v1) and the mode byte; `docs/data_formats.md` has the table."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")
"""Version, dtype code, sequences, entries of the document index; follows the magic."""
HEADER_BYTES = len(MAGIC) + HEADER.size
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
INT32 = 4
BLOCK_BYTES = 64 << 20
"""Bytes of `.bin` under one checksum of the sidecar."""
SIDECAR_FORMAT = "unimega-data"
SIDECAR_VERSION = 1
DAMAGED = "The file is damaged; write it again."
"""How the lines about broken files end."""

TEXT, VISION = 0, 1
MODALITY_BITS, CONTEXT_BIT, ROLE_SHIFT, ROLE_BITS = 0x07, 0x08, 4, 0x30
BODY, CAPTION, QUESTION, ANSWER = range(4)
ROLES = ("body", "caption", "question", "answer")
"""Names of the roles; a role's number is its place."""


def mode(modality: int, role: int = BODY, *, context: bool = False) -> int:
    """The mode byte of a sequence: bits 0-2 modality, bit 3 no loss when instructions are masked, bits 4-5 role."""
    return modality | (CONTEXT_BIT if context else 0) | role << ROLE_SHIFT


MODE_TEXT, MODE_IMAGE = mode(TEXT), mode(VISION)
MODE_CAPTION = mode(TEXT, CAPTION)
MODE_QUESTION = mode(TEXT, QUESTION, context=True)
MODE_ANSWER = mode(TEXT, ANSWER)


def modality_of(modes: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """int8 modality code of each mode byte."""
    return modes & np.int8(MODALITY_BITS)


def role_of(modes: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """int8 role of each mode byte."""
    return (modes & np.int8(ROLE_BITS)) >> np.int8(ROLE_SHIFT)


def is_context(modes: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Whether each sequence carries no loss when the run masks instructions."""
    return (modes & np.int8(CONTEXT_BIT)).astype(np.bool_)


@dataclass(frozen=True)
class Header:
    """The first 34 bytes of an index, and the sizes that follow from them (Python ints: counts of 2^60 cannot wrap)."""

    dtype_code: int
    sequences: int
    entries: int
    """Documents + 1."""

    @property
    def bytes_without_modes(self) -> int:
        """Size of an index that has no mode bytes."""
        return HEADER_BYTES + 12 * self.sequences + 8 * self.entries

    @property
    def bytes_with_modes(self) -> int:
        """Size of an index that has them."""
        return self.bytes_without_modes + self.sequences


def index_parts(
    lengths: npt.NDArray[np.int32], documents: npt.NDArray[np.int64], modes: npt.NDArray[np.int8]
) -> Sequence[bytes]:
    """The parts of an index whose sequences lie one after another as int32 in `.bin`, in the order of the file.

    Args:
        lengths: [S] elements of each sequence.
        documents: [documents + 1] first sequence of each document, then S.
        modes: [S] mode bytes.
    """
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=pointers[1:])
    pointers *= 4
    return (
        MAGIC + HEADER.pack(VERSION, INT32, len(lengths), len(documents)),
        lengths.astype("<i4").tobytes(),
        pointers.tobytes(),
        documents.astype("<i8").tobytes(),
        modes.astype("i1").tobytes(),
    )
