"""Parts to a corpus, in the order of the inputs."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import unimega
from unimega.data.preparing.job import MAX_BAD_SHARE
from unimega.data.preparing.parts import PartReader, Record, Run
from unimega.data.preparing.plan import Plan
from unimega.data.preparing.work import BadRows, Work
from unimega.data.writer import CorpusWriter, write_error
from unimega.errors import DataError

_MAX_RUNS = 10_000


@dataclass
class FileCounts:
    """What became of one input file: one entry of ``sources`` for each of its runs."""

    name: str
    path: str
    kind: str
    bytes: int
    lines: int = 0
    rows: int = 0
    ended: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    runs: list[Run] = field(default_factory=list)


def merge(plan: Plan, work: Work, *, tick: Callable[[], None]) -> dict[str, Any]:
    """Publish quarantine and corpus; returns the sidecar, or without a corpus its counts and sources.

    Raises:
        DataError: the disk is full, a part was damaged, or too many rows are bad; no reader sees anything of it.
    """
    counts = [_count(plan, work, number) for number in range(len(plan.files))]
    facts = _facts(plan, counts)
    rows, bad = sum(one.rows for one in counts), sum((one.quarantined for one in counts), Counter[str]())
    _write_quarantine(plan, work, bad.total())
    if bad.total() > plan.job.may_be_bad(rows):
        with quarantine(plan).open() as refused:
            raise too_many(plan, rows, bad, json.loads(refused.readline()))
    if not any(source["documents"] for source in facts["sources"]):
        found = f"all {rows} rows are bad, see {quarantine(plan)}" if rows else "no rows"
        names = ", ".join(file.shown for file in plan.files)
        raise BadRows(f"{names}: {found}. A corpus needs at least one document.")
    if plan.job.validate:
        return facts
    with CorpusWriter(plan.job.output, overwrite=plan.job.overwrite) as writer:
        for file in range(len(plan.files)):
            for path, record in _parts(plan, work, file):
                with PartReader(path, record) as part:
                    for data in part.ids():
                        writer.add_ids(data)
                        tick()
                    tables = part.tables()
                    writer.add_tables(tables.lengths, tables.modes, tables.sequences, longest=record.longest)
                    part.check()
        return writer.finish(facts)


def quarantine(plan: Plan) -> Path:
    """Where refused rows go."""
    return Path(f"{plan.job.output}.quarantine.jsonl")


def too_many(plan: Plan, rows: int, bad: Mapping[str, int], first: Mapping[str, Any]) -> BadRows:
    """The refusal of a corpus with too many bad rows; ``first`` is an entry of the quarantine."""
    total = sum(bad.values())
    most = ", ".join(f"{reason} ({count})" for reason, count in Counter(bad).most_common(3))
    given = plan.job.max_bad_share
    share, default = (MAX_BAD_SHARE, " (the default)") if given is None else (given, "")
    return BadRows(
        f"{first['file']}:{first['line']}: {first['detail']}. {total} of {rows} rows ({100 * total / rows:.2f} %) are "
        f"bad, --max-bad-share {share:g}{default} allows {int(plan.job.may_be_bad(rows))}: {most}. "
        f"See {quarantine(plan)}."
    )


def write_entries(plan: Plan, entries: list[dict[str, Any]]) -> None:
    """Write a quarantine of a few rows."""
    path = quarantine(plan)
    try:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    except OSError as error:
        raise write_error(path, error) from error


def _parts(plan: Plan, work: Work, file: int) -> list[tuple[Path, Record]]:
    found = []
    for block in range(work.blocks(file) or 0):
        record = work.record(file, block)
        if record is None:
            raise DataError(f"{plan.part(file, block)}: it has gone or is damaged. Run again.")
        found.append((plan.part(file, block), record))
    return found


def _count(plan: Plan, work: Work, number: int) -> FileCounts:
    file = plan.files[number]
    source = plan.job.sources[file.source]
    counts = FileCounts(source.name or file.shown, file.shown, source.kind, file.bytes)
    for _, record in _parts(plan, work, number):
        counts.lines += record.lines
        counts.rows += record.rows
        counts.ended += record.ended
        counts.quarantined.update(record.quarantined)
        for run in record.runs:
            last = counts.runs[-1] if counts.runs else None
            if last is not None and (None in (run.direction, last.direction) or run.direction == last.direction):
                last.add(run)
            else:
                counts.runs.append(run)
        if len(counts.runs) > _MAX_RUNS:
            raise BadRows(
                f"{file.shown}: data_type changes more than {_MAX_RUNS} times. Sort the rows by data_type, or give the "
                "source a direction (both, t2i, i2t), which all of its pairs then have."
            )
    return counts


def _write_quarantine(plan: Plan, work: Work, bad: int) -> None:
    """All refused rows with their lines in the files; the file of an earlier run goes."""
    path = quarantine(plan)
    try:
        if not bad:
            path.unlink(missing_ok=True)
            return
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("w") as out:
            for file in range(len(plan.files)):
                before = 0
                for part_path, record in _parts(plan, work, file):
                    if record.quarantined:
                        with PartReader(part_path, record) as part:
                            for entry in part.refused():
                                out.write(json.dumps({**entry, "line": entry["line"] + before}) + "\n")
                    before += record.lines
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(path)
    except OSError as error:
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise write_error(path, error) from error


def _facts(plan: Plan, counts: list[FileCounts]) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    documents = 0
    for one in counts:
        for number, run in enumerate(one.runs or [Run(None)]):
            sources.append(
                {
                    "name": one.name,
                    "path": one.path,
                    "kind": one.kind,
                    "direction": run.direction or "both",
                    "first_document": documents,
                    "bytes": 0 if number else one.bytes,
                    "lines": 0 if number else one.lines,
                    "rows": 0 if number else one.rows,
                    "documents": run.documents,
                    "tokens": {"text": run.text, "vision": run.vision},
                    "quarantined": {} if number else dict(sorted(one.quarantined.items())),
                }
            )
            documents += run.documents
    resolved = {**plan.settings, "sources": [asdict(source) for source in plan.job.sources]}
    return {
        "tokenizer": plan.tokenizer,
        "vocabulary": plan.vocabulary,
        "counts": {"text_documents_with_eos": sum(one.ended for one in counts)},
        "sources": sources,
        "made_by": {
            "version": unimega.__version__,
            "config_sha256": hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest(),
        },
    }
