"""What a worker does: the rows of one block to one part."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

from unimega.data import format as layout
from unimega.data.preparing import columns, encode, files, samples
from unimega.data.preparing.files import InputFile, Raw
from unimega.data.preparing.parts import PartWriter
from unimega.data.preparing.plan import Plan
from unimega.data.records.kinds import row_of_fields, row_of_json
from unimega.data.records.row import BadRow, Row, Rules
from unimega.data.tokenize import TextTokenizer
from unimega.data.writer import write_error, write_synced
from unimega.errors import DataError

_BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1000
"""Rows tokenised together: enough for a tokenizer to be fast, little memory."""
_SHOWN = 2000
"""Characters of a refused row that are kept."""
_EXAMPLES = 20


@dataclass(frozen=True)
class Task:
    """A block, or of a file whose blocks only reading tells every block number ``turn`` modulo ``turns``."""

    file: int
    block: int | None
    turn: int = 0
    turns: int = 1


class Delta(NamedTuple):
    """What has happened since the last report."""

    bytes: int = 0
    """Of the file on disk."""
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    bad: Mapping[str, int] = {}
    """Refused rows by reason."""
    examples: tuple[dict[str, Any], ...] = ()
    """Some refused rows."""


Report = Callable[[Delta], None]


class Worker:
    """Does tasks of a plan, one after another; it holds the tokenizers."""

    def __init__(self, plan: Plan, tokenizer: TextTokenizer | None = None) -> None:
        self.plan = plan
        self.tokenizer = tokenizer or TextTokenizer(plan.job.tokenizer, backend=plan.job.backend)
        special = self.tokenizer.special
        self.has_borders = special.vision_start is not None and special.vision_end is not None

    @cached_property
    def pictures(self) -> encode.Pictures:
        """The encoder of pictures, made when the first one comes."""
        assert self.plan.job.image_tokenizer is not None
        return encode.Pictures(
            self.plan.job.image_tokenizer(), limit=self.plan.row_bytes, check_only=self.plan.job.validate
        )

    def run(self, task: Task, report: Report) -> None:
        """Write the parts of a task that are not there yet.

        Raises:
            DataError: the file is damaged or has gone, or a part cannot be written.
        """
        file = self.plan.files[task.file]
        try:
            if task.block is None:
                self._run_stream(task, file, report)
            else:
                self._run_block(task, task.block, file, report)
        except OSError as error:  # what cannot be written has a line already
            raise files.unreadable(file.shown, error) from error

    def _run_block(self, task: Task, block: int, file: InputFile, report: Report) -> None:
        assert file.spans is not None
        span = file.spans[block]
        share = (span[1] - span[0]) / max(1, sum(stop - start for start, stop in file.spans))
        if file.format == "jsonl":
            rows = files.lines_of_block(file, span, limit=self.plan.row_bytes)
            self._block(task.file, block, rows, lambda read: read, report)
        else:
            fields = self.plan.rules[task.file].fields
            rows = columns.rows(file.path, file.shown, span, fields=fields, limit=self.plan.row_bytes)
            self._block(task.file, block, rows, lambda _: 0, report, total=round(share * file.bytes))

    def _run_stream(self, task: Task, file: InputFile, report: Report) -> None:
        limit = self.plan.row_bytes
        with Path(file.path).open("rb", buffering=0) as opened:
            if file.format == "tar":
                rows = samples.samples(opened, file.compression, file.shown, limit=limit)
            else:
                stream = files.decompressed(opened, file.compression, file.shown)
                rows = files.lines(stream, limit=limit, expands=file.shown)
            cut = _Cut(rows, self.plan.task_bytes)
            number = 0
            while not cut.exhausted:
                if number % task.turns == task.turn and not self.plan.part(task.file, number).exists():
                    self._block(task.file, number, cut.block(), partial(_moved, opened, opened.tell()), report)
                else:
                    for _ in cut.block():
                        pass
                number += 1
        end = self.plan.end(task.file)
        temporary = end.with_suffix(f".{task.turn}.tmp")
        try:
            write_synced(temporary, str(number).encode())
            temporary.rename(end)
        except OSError as error:
            raise write_error(temporary, error) from error

    def _block(
        self,
        file: int,
        block: int,
        rows: Iterator[Raw],
        consumed: Callable[[int], int],
        report: Report,
        total: int | None = None,
    ) -> None:
        """Write one part.

        Args:
            consumed: bytes of the file that a number of bytes of rows took.
            total: bytes that the whole block stands for, if ``consumed`` does not tell.
        """
        with PartWriter(self.plan.part(file, block), job=self.plan.key) as part:
            writer = _Block(self, file, block, part)
            told = 0
            for batch in _batches(rows):
                delta = writer.add(batch)
                now = consumed(writer.bytes)
                report(delta._replace(bytes=now - told))
                told = now
            part.commit()
        report(Delta(bytes=(consumed(writer.bytes) if total is None else total) - told))


def _moved(file: RawIOBase, before: int, _: int) -> int:
    return file.tell() - before


class _Cut:
    """Cuts a stream of rows into blocks of about ``size`` bytes."""

    def __init__(self, rows: Iterator[Raw], size: int) -> None:
        self._rows, self._size, self.exhausted = rows, size, False

    def block(self) -> Iterator[Raw]:
        """The rows of the next block."""
        size = 0
        for raw in self._rows:
            yield raw
            size += raw.size
            if size >= self._size:
                return
        self.exhausted = True


def _batches(rows: Iterator[Raw]) -> Iterator[list[Raw]]:
    batch: list[Raw] = []
    size = 0
    for raw in rows:
        batch.append(raw)
        size += raw.size
        if size >= _BATCH_BYTES or len(batch) == _BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Block:
    """Rows of one block to its part."""

    def __init__(self, worker: Worker, file: int, block: int, part: PartWriter) -> None:
        self._worker, self._part = worker, part
        self._file, self._rules = worker.plan.files[file], worker.plan.rules[file]
        self._source = worker.plan.job.sources[self._file.source].name or self._file.shown
        self._numbered = block == 0 or self._file.format != "jsonl" or self._file.spans is None
        self._first_line: int | None = None
        self._examples = 0
        self.bytes = 0
        """Of the rows so far."""

    def add(self, batch: list[Raw]) -> Delta:
        """Parse, encode and write rows, refuse those that are bad."""
        if self._first_line is None:
            self._first_line = batch[0].line
        self.bytes += sum(raw.size for raw in batch)
        filled = [raw for raw in batch if not isinstance(raw.content, bytes) or raw.content.strip()]
        good: list[tuple[Raw, Row]] = []
        bad: list[tuple[Raw, BadRow]] = []
        for raw in filled:
            try:
                good.append((raw, _parse(raw, self._rules)))
            except BadRow as error:
                bad.append((raw, error))
        if any(segment.picture is not None for _, row in good for segment in row.segments):
            good = self._encode_pictures(good, bad)
        documents, tokens = self._write(good, bad)
        record = self._part.record
        record.lines += len(batch)
        record.rows += len(filled)
        counts = Counter(error.reason for _, error in bad)
        for reason, count in counts.items():
            record.quarantined[reason] = record.quarantined.get(reason, 0) + count
        return Delta(0, len(filled), documents, tokens, counts, self._refuse(bad))

    def _encode_pictures(self, good: list[tuple[Raw, Row]], bad: list[tuple[Raw, BadRow]]) -> list[tuple[Raw, Row]]:
        left = []
        for (raw, _), row in zip(good, self._worker.pictures.encode([row for _, row in good]), strict=True):
            if isinstance(row, BadRow):
                bad.append((raw, row))
            else:
                left.append((raw, row))
        return left

    def _write(self, good: list[tuple[Raw, Row]], bad: list[tuple[Raw, BadRow]]) -> tuple[int, int]:
        """Encode and write documents; (documents, tokens)."""
        if not good:
            return 0, 0
        worker, rows = self._worker, [row for _, row in good]
        validate = worker.plan.job.validate
        encoded = encode.encode(rows, worker.tokenizer, count_only=validate)
        if not validate and not encoded.totals.all():
            empty = BadRow("the tokenizer gives no token for it", reason="empty text")
            bad += [(raw, empty) for (raw, _), total in zip(good, encoded.totals, strict=True) if not total]
            return self._write([one for one, total in zip(good, encoded.totals, strict=True) if total], bad)
        images = int((layout.modality_of(encoded.modes) == layout.VISION).sum())
        if images and not worker.has_borders:
            raise DataError(
                f"tokenizer='{worker.plan.job.tokenizer}' is wrong. It has no <|vision_start|> or no <|vision_end|>, "
                f"and {self._file.shown} holds images. Add both as special tokens."
            )
        record = self._part.record
        for run in encode.runs(rows, encoded):
            encode.append_run(record.runs, run)
        record.documents += len(rows)
        record.sequences += len(encoded.modes)
        record.images += images
        record.longest = max(record.longest, int(encoded.totals.max()))
        record.ended += encode.ended(rows, encoded, worker.tokenizer.special.eos)
        if not validate:
            self._part.add(encoded.ids, encoded.lengths, encoded.modes, encoded.sequences)
        return len(rows), len(encoded.ids)

    def _refuse(self, bad: list[tuple[Raw, BadRow]]) -> tuple[dict[str, Any], ...]:
        """Write refused rows to the part; returns some of them with their line in the file, if it is known."""
        assert self._first_line is not None
        examples = []
        for raw, error in sorted(bad, key=lambda one: one[0].line):
            entry = {
                "source": self._source,
                "file": self._file.shown,
                "line": raw.line - self._first_line + 1,
                "byte": raw.byte,
                "reason": error.reason,
                "detail": str(error),
                "row": _shown(raw.content),
            }
            self._part.refuse(entry)
            if self._examples < _EXAMPLES:
                self._examples += 1
                examples.append({**entry, "line": raw.line if self._numbered else None})
        return tuple(examples)


def _parse(raw: Raw, rules: Rules) -> Row:
    if isinstance(raw.content, BadRow):
        raise raw.content
    if isinstance(raw.content, bytes):
        return row_of_json(raw.content, rules)
    return row_of_fields(raw.content, rules)


def _shown(content: Any) -> str:
    """The start of a refused row."""
    if isinstance(content, bytes):
        return content[: 4 * _SHOWN].decode("utf-8", errors="replace")[:_SHOWN]
    if isinstance(content, BadRow):
        return ""
    parts = []
    for name, value in content.items():
        known = isinstance(value, str | int | float | None)
        parts.append(f"{name}: {str(value)[:200] if known else type(value).__name__}")
    return ", ".join(parts)[:_SHOWN]
