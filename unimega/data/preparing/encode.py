"""A batch of rows to ids."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from unimega.data import format as layout
from unimega.data import images
from unimega.data.format import Ids
from unimega.data.images import BadImage, ImageTokenizer, Pixels
from unimega.data.preparing.parts import Run
from unimega.data.records.row import BadRow, Row, Segment
from unimega.data.tokenize import TextTokenizer
from unimega.errors import DataError

_PICTURES, _PIXELS = 32, 16 << 20
"""Pictures encoded together: at most so many, and no more once they have so many pixels."""


class Encoded(NamedTuple):
    """Documents one after another."""

    ids: Ids
    lengths: npt.NDArray[np.int32]
    """[S] ids of each sequence."""
    modes: npt.NDArray[np.int8]
    """[S] mode bytes."""
    sequences: npt.NDArray[np.int32]
    """[documents] number of sequences of each."""
    totals: npt.NDArray[np.int64]
    """[documents] ids of each."""


def encode(rows: Sequence[Row], tokenizer: TextTokenizer, *, count_only: bool = False) -> Encoded:
    """Ids of documents without pictures.

    Args:
        count_only: leave texts without ids.

    Raises:
        DataError: the tokenizer gives an id that it does not have.
    """
    segments = [segment for row in rows for segment in row.segments]
    sequences = np.fromiter((len(row.segments) for row in rows), dtype=np.int32, count=len(rows))
    modes = np.fromiter((segment.mode for segment in segments), dtype=np.int8, count=len(segments))
    texts = [segment.text for segment in segments if segment.text is not None]
    if count_only:
        text_ids, text_lengths = np.zeros(0, dtype=np.int32), np.zeros(len(texts), dtype=np.int32)
    else:
        text_ids, text_lengths = tokenizer.encode_batch(texts)
    if len(text_ids) and not (int(text_ids.min()) >= 0 and int(text_ids.max()) < tokenizer.size):
        raise DataError(
            f"tokenizer='{tokenizer.folder}' gives ids up to {text_ids.max()}, its size is {tokenizer.size}."
        )
    if len(texts) == len(segments):
        ids, lengths = text_ids, text_lengths
    else:
        ids, lengths = _woven(segments, text_ids, text_lengths)
    ends = np.zeros(len(segments) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    borders = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(sequences, out=borders[1:])
    totals = ends[borders[1:]] - ends[borders[:-1]]
    return Encoded(ids, lengths.astype(np.int32, copy=False), modes, sequences, totals)


def _woven(
    segments: Sequence[Segment], text_ids: Ids, text_lengths: npt.NDArray[np.int32]
) -> tuple[Ids, npt.NDArray[np.int32]]:
    """Ids of texts and given ids, in the order of the segments."""
    pieces: list[Ids] = []
    place = 0
    left = iter(text_lengths.tolist())
    for segment in segments:
        if segment.ids is not None:
            pieces.append(segment.ids)
        else:
            length = next(left)
            pieces.append(text_ids[place : place + length])
            place += length
    lengths = np.fromiter(map(len, pieces), dtype=np.int32, count=len(pieces))
    return np.concatenate(pieces), lengths


def runs(rows: Sequence[Row], encoded: Encoded) -> list[Run]:
    """Runs of one direction; leading documents that are no pairs stay a run of their own."""
    vision = np.where(layout.modality_of(encoded.modes) == layout.VISION, encoded.lengths, 0)
    ends = np.cumsum(encoded.sequences)
    sums = np.zeros(len(vision) + 1, dtype=np.int64)
    np.cumsum(vision, out=sums[1:])
    codes = (sums[ends] - sums[ends - encoded.sequences]).tolist()
    if all(row.direction is None for row in rows):
        return [Run(None, len(rows), int(encoded.totals.sum()) - sum(codes), sum(codes))]
    found: list[Run] = []
    for row, total, coded in zip(rows, encoded.totals.tolist(), codes, strict=True):
        append_run(found, Run(row.direction, 1, total - coded, coded))
    return found


def append_run(found: list[Run], run: Run) -> None:
    """Join a run to the last one where no border lies between them; the result does not depend on how runs are cut."""
    if found and (run.direction is None or run.direction == found[-1].direction):
        found[-1].add(run)
    else:
        found.append(run)


def ended(rows: Sequence[Row], encoded: Encoded, eos: int) -> int:
    """Number of text documents that hold an eos at their end."""
    last = np.cumsum(encoded.totals) - 1
    is_text = encoded.modes[np.cumsum(encoded.sequences) - 1] == layout.MODE_TEXT
    return int(((encoded.ids[last] == eos) & is_text).sum()) if len(encoded.ids) else 0


class Pictures:
    """Turns the pictures of rows into codes, in batches that depend on the rows alone."""

    def __init__(self, tokenizer: ImageTokenizer, *, limit: int, check_only: bool) -> None:
        """Take a tokenizer.

        Args:
            limit: bytes of the longest picture file.
            check_only: read pictures, but give zeros for their codes.
        """
        self._tokenizer, self._limit, self._check_only = tokenizer, limit, check_only

    def encode(self, rows: Sequence[Row]) -> list[Row | BadRow]:
        """Rows with codes in place of pictures, or why there are none.

        Raises:
            DataError: the image tokenizer gives other codes than it says.
        """
        done: list[Row | BadRow] = list(rows)
        waiting: list[tuple[int, int]] = []
        batch: list[Pixels] = []
        codes: dict[tuple[int, int], Ids] = {}

        def flush() -> None:
            if batch:
                codes.update(zip(waiting, self._codes(batch), strict=True))
                waiting.clear()
                batch.clear()

        for number, row in enumerate(rows):
            for place, segment in enumerate(row.segments):
                if segment.picture is None:
                    continue
                try:
                    batch.append(images.decode(self._bytes(segment.picture)))
                except (BadImage, OSError) as error:
                    done[number] = _bad_picture(error, segment.picture)
                    break
                waiting.append((number, place))
                if len(batch) == _PICTURES or sum(one.size for one in batch) >= 3 * _PIXELS:
                    flush()
        flush()
        for number, row in enumerate(rows):
            if isinstance(done[number], Row) and any(segment.picture is not None for segment in row.segments):
                done[number] = row._replace(
                    segments=tuple(
                        segment if segment.picture is None else Segment(segment.mode, ids=codes[number, place])
                        for place, segment in enumerate(row.segments)
                    )
                )
        return done

    def _bytes(self, picture: bytes | str) -> bytes:
        if isinstance(picture, bytes):
            return picture
        if not stat.S_ISREG(os.stat(picture).st_mode):  # a pipe would be waited for
            raise BadImage(f"{picture}: not a file")
        with Path(picture).open("rb") as file:
            data = file.read(self._limit + 1)
        if len(data) > self._limit:
            raise BadImage(f"{picture}: more than {self._limit} bytes")
        return data

    def _codes(self, batch: Sequence[Pixels]) -> Ids:
        rows, columns = self._tokenizer.grid
        shape = (len(batch), rows * columns)
        if self._check_only:
            return np.zeros(shape, dtype=np.int32)
        codes = np.asarray(self._tokenizer.encode(batch))
        if codes.shape != shape or codes.dtype.kind not in "iu":
            raise DataError(
                f"the image tokenizer gave {codes.dtype} {list(codes.shape)}, int32 {list(shape)} is needed."
            )
        if int(codes.min()) < 0 or int(codes.max()) >= self._tokenizer.codebook:
            raise DataError(f"the image tokenizer gave code {codes.max()}, its codebook is {self._tokenizer.codebook}.")
        return codes.astype(np.int32)


def _bad_picture(error: Exception, picture: bytes | str | None) -> BadRow:
    why = f"{picture!s}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return BadRow(why, reason="bad picture")
