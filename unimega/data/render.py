"""Statistics and documents as lines of text, with colours where a terminal shows them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unimega.data.samples import Run, Sample

_RESET, _BOLD, _FAINT = "\x1b[0m", "\x1b[1m", "\x1b[2m"
_OF_MODALITY = {"text": "\x1b[32m", "vision": "\x1b[36m"}
LEGEND = ("green: text", "cyan: vision", "bold: loss", "faint: no loss")
_UNITS = {"text": "tokens", "vision": "codes"}
DEFAULT_WIDTH = 400


def sample_lines(sample: Sample, *, colour: bool, width: int | None = DEFAULT_WIDTH) -> Iterator[str]:
    """A heading, then a line for each run: where it is from, modality, loss, number, content.

    Args:
        sample: what to show.
        colour: modality by colour, loss by weight; without it the columns say the same.
        width: most characters of a run's content; None: all.
    """
    heading = (
        f"document {sample.document} of {sample.corpus} ({sample.source}, its document {sample.row}), {sample.form}: "
        f"{sample.tokens} tokens, {sample.targets} with loss"
    )
    yield f"{_BOLD}{heading}{_RESET}" if colour else heading
    names = max((len(run.label) for run in sample.runs), default=0)
    for run in sample.runs:
        loss = "loss" if run.is_target else "-"
        unit = _UNITS["vision"] if run.text is None and run.modality == "vision" else _UNITS["text"]
        facts = f"  {run.label:<{names}}  {run.modality:<6}  {loss:<4}  {len(run.ids):>6} {unit:<6}"
        content = _content(run, width)
        if colour:
            content = f"{_BOLD if run.is_target else _FAINT}{_OF_MODALITY.get(run.modality, '')}{content}{_RESET}"
        yield f"{facts}  {content}"


def _content(run: Run, width: int | None) -> str:
    """Text with its control characters spelled out: a corpus may hold sequences that would steer a terminal."""
    if run.text is None:
        said = " ".join(map(str, run.ids if width is None else run.ids[:width]))
    else:
        said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in run.text)
    if width is None or len(said) <= width:
        return said
    cut = said[:width] if run.text is not None else said[:width].rsplit(" ", 1)[0]
    left = f"{len(said) - width} characters" if run.text is not None else f"{len(run.ids) - len(cut.split())} codes"
    return f"{cut} ... ({left} more)"


def statistics_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Tables of what ``Statistics.summary`` holds, and of entropies where they are in it."""
    total = max(1, sum(summary["tokens"].values()))
    rows = [["", "tokens", "share", "sequences", "documents with"]]
    for name, tokens in summary["tokens"].items():
        share = f"{100 * tokens / total:.2f} %"
        sequences = summary["sequences"][name]["number"]
        rows.append([name, f"{tokens:,}", share, f"{sequences:,}", f"{summary['documents_with'][name]:,}"])
    yield from _table(rows)
    yield ""
    percents = list(summary["documents"]["percentiles"])
    rows = [["tokens of a", "number", "mean", *(f"{percent} %" for percent in percents)]]
    lengths = {"document": summary["documents"]}
    lengths |= {f"{name} sequence": value for name, value in summary["sequences"].items() if value["number"]}
    for name, value in lengths.items():
        numbers = [f"{value['percentiles'][percent]:,}" for percent in percents]
        rows.append([name, f"{value['number']:,}", f"{value['mean']:,.1f}", *numbers])
    yield from _table(rows)
    for title, unit in (("kinds", "documents"), ("roles", "sequences"), ("sources", "documents")):
        yield ""
        yield from _shares(title.removesuffix("s"), unit, summary[title])
    if "entropy" in summary:
        yield ""
        yield from _entropies(summary["entropy"])


def _shares(title: str, unit: str, shares: Mapping[str, Any]) -> Iterator[str]:
    names = list(next(iter(shares.values()))["tokens"]) if shares else []
    rows = [[title, unit, *(f"{name} tokens" for name in names), "share of tokens"]]
    for name, share in shares.items():
        tokens = [f"{share['tokens'][modality]:,}" for modality in names]
        rows.append([name, f"{share[unit]:,}", *tokens, f"{100 * share['share']:.2f} %"])
    yield from _table(rows)


def _entropies(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [["conditional entropy", "n", "bits", "n-grams", "different", "most frequent"]]
    for entry in entries:
        largest = f"{100 * entry['largest'] / max(1, entry['ngrams']):.2f} %"
        rows.append(
            [
                entry["modality"],
                str(entry["n"]),
                f"{entry['bits']:.4f}",
                f"{entry['ngrams']:,}",
                f"{entry['different']:,}",
                largest,
            ]
        )
    yield from _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they must be, the first one to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip()
