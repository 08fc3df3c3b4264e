"""The report as one HTML file: pictures are inside it, nothing is loaded from anywhere."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from charts import Line, chart
from corpus import CAPTIONS, DIGITS, Scans
from curve import FLOORS, WINDOW, running_means
from pictures import data_uri

STYLE = Path(__file__).with_name("page.css")
SHARES = {
    "t2i_accuracy": "drawn digits that the judge reads as asked",
    "i2t_accuracy": "held-out scans captioned with the right digit",
    "judge_accuracy": "judge on the held-out scans themselves",
    "judge_accuracy_on_reconstructions": "judge on their reconstructions from codes",
    "exact_copy_share": "drawings with the codes of a training scan",
    "exact_copy_share_held_out": "held-out scans with the codes of a training scan",
}


@dataclass(frozen=True)
class Described:
    """A held-out scan, what is left of it in codes, and what the model says it is."""

    scan: Scans
    reconstruction: Scans
    caption: str
    truth: str
    """The digit that it is, in a word."""
    is_right: bool


@dataclass(frozen=True)
class Beside:
    """A drawing and the training scan nearest to it."""

    drawing: Scans
    scan: Scans
    distance: float


@dataclass(frozen=True)
class Pictures:
    """What the page shows besides figures. Scans are [8, 8] in 0..1."""

    real: Sequence[Scans]
    """Ten scans, zero to nine."""
    drawn: Sequence[tuple[str, Sequence[tuple[Scans, bool]]]]
    """Rows of the grid: the caption with {} for the digit, ten drawings and whether the judge reads each as asked."""
    held_out: Sequence[Described]
    misread: Sequence[Described]
    warps: Sequence[Scans]
    beside: Sequence[Beside]


def page(figures: Mapping[str, Any], pictures: Pictures, metrics: Mapping[int, Mapping[str, Any]]) -> str:
    """The whole document."""
    sections = [
        _grid(pictures),
        _strips(pictures),
        _beside(pictures, figures),
        _curves(figures, metrics),
        _confusions(figures),
        _tables(figures),
        _warps(pictures),
    ]
    title = "Handwritten digits, drawn and read by one small model"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE.read_text()}</style></head><body><main>"
        f"<h1>{title}</h1>{_introduction(figures)}{''.join(sections)}{_footer(figures)}</main></body></html>\n"
    )


def percent(share: float) -> str:
    """0.9639 as 96.4 %."""
    return f"{100 * share:.1f} %"


def _introduction(figures: Mapping[str, Any]) -> str:
    counts, gate = figures["counts"], figures["gate"]
    cards = [
        (percent(figures["t2i_accuracy"]), "of drawn digits are read as asked", figures["t2i_accuracy"] >= gate),
        (percent(figures["i2t_accuracy"]), "of unseen scans are captioned right", figures["i2t_accuracy"] >= gate),
        (percent(figures["exact_copy_share"]), "of drawings copy a training scan's codes", None),
        (f"{figures['wall_s_total']:.0f} s", f"from scans to this page, on {figures['ranks']} CPU ranks", None),
    ]
    kinds = {True: "card pass", False: "card fail", None: "card"}
    shown = (f'<div class="{kinds[ok]}"><b>{value}</b><small>{text}</small></div>' for value, text, ok in cards)
    return (
        f"<p>A Uni-X of {figures['parameters'] / 1e6:.1f} M parameters learnt captions and 4 x 4 image codes of "
        f"{counts['training']} real 8 x 8 scans in one sequence, in both directions, in {figures['steps']} steps. "
        f"Here it draws {counts['drawn']} digits from captions and captions {counts['held_out']} scans that it "
        f"has never seen, through its Hugging Face export. Split {figures['split']}.</p>"
        f'<div class="cards">{"".join(shown)}</div>'
    )


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def _image(scan: Scans, what: str, *, wrong: bool = False) -> str:
    mark = ' class="wrong"' if wrong else ""
    return f'<img{mark} alt="{escape(what)}" title="{escape(what)}" src="{data_uri(scan)}">'


def _grid(pictures: Pictures) -> str:
    head = "".join(f'<th scope="col">{word}</th>' for word in DIGITS)
    real = "".join(f"<td>{_image(scan, 'a real scan')}</td>" for scan in pictures.real)
    rows = [f'<tr class="real"><th scope="row">real scans</th>{real}</tr>']
    for caption, drawings in pictures.drawn:
        cells = (
            f"<td>{_image(scan, caption.format(word), wrong=not ok)}</td>"
            for word, (scan, ok) in zip(DIGITS, drawings, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(caption.format("..."))}</th>{"".join(cells)}</tr>')
    return _section(
        "Text to image",
        "First row: real scans. The others are drawn from the caption at the left with the digit above; the first "
        "drawings of each caption, not chosen. Framed: the judge reads another digit.",
        f'<table class="grid"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>',
    )


def _strip(scans: Iterable[Described]) -> str:
    figures = (
        f'<figure{"" if one.is_right else " class=wrong"}><div class="pair">{_image(one.scan, "held-out scan")}'
        f"{_image(one.reconstruction, 'from its codes')}</div>"
        f"<figcaption>{_caption(one)}</figcaption></figure>"
        for one in scans
    )
    return f'<div class="strip">{"".join(figures)}</div>'


def _caption(one: Described) -> str:
    said = escape(one.caption) or "(nothing)"
    return said if one.is_right else f"{said}<br>it is a {one.truth}"


def _strips(pictures: Pictures) -> str:
    misread = (
        f"<h3>All {len(pictures.misread)} that it got wrong</h3>{_strip(pictures.misread)}" if pictures.misread else ""
    )
    return _section(
        "Image to text",
        "Held-out scans, each beside what its 16 codes keep of it, which is all that the model sees; greedy captions. "
        "The first 24 of the split, wrong ones framed.",
        f"{_strip(pictures.held_out)}<br>{misread}",
    )


def _beside(pictures: Pictures, figures: Mapping[str, Any]) -> str:
    shown = (
        f'<figure><div class="pair">{_image(one.drawing, "drawn")}{_image(one.scan, "nearest training scan")}</div>'
        f"<figcaption>distance {one.distance:.2f}</figcaption></figure>"
        for one in pictures.beside
    )
    own, real = figures["median_nearest_distance"], figures["median_nearest_distance_held_out"]
    return _section(
        "Not copied",
        f"Drawings beside the training scan nearest to each. The median distance is {own:.2f} (pixels 0 to 1, as the "
        f"codes show them), that of held-out scans {real:.2f}; {percent(figures['exact_copy_share'])} of drawings and "
        f"{percent(figures['exact_copy_share_held_out'])} of held-out scans have exactly the codes of a training scan.",
        f'<div class="strip">{"".join(shown)}</div>',
    )


def _curves(figures: Mapping[str, Any], metrics: Mapping[int, Mapping[str, Any]]) -> str:
    steps, panels = sorted(metrics), []
    for key, floors in FLOORS.items():
        values = [float(metrics[step][key]) for step in steps]
        points = figures["curve"]
        expected = [point[key.replace("loss", "measured")] for point in points]
        lines = [
            Line("each step", steps, values, "faint"),
            Line(f"mean of {WINDOW}", steps, running_means(values), "one"),
            Line("expected", [point["step"] for point in points], expected, "marks"),
        ]
        top = max([*values[:10], *floors.values()]) * 1.05
        panels.append(f"<div><h3>{key}, nats</h3>{chart(lines, y_top=top, floors=floors)}</div>")
    by_step = figures["accuracy_by_step"]
    marks = [int(step) for step in by_step]
    lines = [
        Line("drawn digits judged right", marks, [each["t2i"] for each in by_step.values()], "one", dots=True),
        Line("captions right", marks, [each["i2t"] for each in by_step.values()], "two", dots=True),
    ]
    panels.append(f"<div><h3>accuracy of exports on the way</h3>{chart(lines, y_top=1.0, percent=True)}</div>")
    return _section(
        "Training",
        "Loss by modality of the input token. Dashed: what no model gets below without the knowledge named. Crosses: "
        "the means of three earlier runs of another implementation.",
        f'<div class="columns">{"".join(panels)}</div>',
    )


def _confusions(figures: Mapping[str, Any]) -> str:
    mute = figures["captions_without_a_digit"]
    note = f" {mute} captions name no digit, or two." if mute else ""
    return _section(
        "Confusions",
        f"Rows: the true digit, or the one that was asked for. Columns: what was said, or what the judge sees.{note}",
        f'<div class="columns"><div><h3>captions of held-out scans</h3>{_matrix(figures["confusion_i2t"])}</div>'
        f"<div><h3>drawings, by the judge</h3>{_matrix(figures['confusion_t2i'])}</div></div>",
    )


def _matrix(counts: Sequence[Sequence[int]]) -> str:
    head = "".join(f"<th>{digit}</th>" for digit in range(10))
    rows = []
    for true, row in enumerate(counts):
        cells = []
        for found, count in enumerate(row):
            shade = 0.85 * count / max(1, sum(row))
            mark = ' class="off"' if count and found != true else ""
            cells.append(f'<td{mark} style="background:rgb(var(--heat) / {shade:.2f})">{count or ""}</td>')
        rows.append(f"<tr><th>{true}</th>{''.join(cells)}</tr>")
    return f'<table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _tables(figures: Mapping[str, Any]) -> str:
    shares = "".join(
        f"<tr><th>{text}</th><td>{percent(figures[key])}</td>"
        f"<td>{' - '.join(f'{100 * end:.1f}' for end in figures['intervals'][key])}</td></tr>"
        for key, text in SHARES.items()
    )
    others = {
        "different ones among the drawings": percent(figures["unique_share"]),
        "different ones among the training scans": percent(figures["unique_share_training"]),
        "reconstructions, PSNR": f"{figures['psnr_db']:.1f} dB",
        "throughput of the training": f"{figures['tokens_per_s']:.0f} tokens/s",
    }
    more = "".join(f"<tr><th>{text}</th><td>{value}</td><td></td></tr>" for text, value in others.items())
    seconds = "".join(f"<tr><th>{name}</th><td>{value:.1f}</td></tr>" for name, value in figures["wall_s"].items())
    return _section(
        "Figures",
        "The judge is a support vector machine on the pixels of the real training scans. Where it does better on "
        "drawings than on scans, the drawings are more typical than real ones, not better.",
        '<div class="columns"><table class="figures"><thead><tr><th></th><th></th><th>95 % interval</th></tr></thead>'
        f'<tbody>{shares}{more}</tbody></table><table class="figures">'
        "<thead><tr><th>stage</th><th>seconds</th></tr></thead>"
        f"<tbody>{seconds}<tr><th>all</th><td>{figures['wall_s_total']:.1f}</td></tr></tbody></table></div>",
    )


def _warps(pictures: Pictures) -> str:
    shown = "".join(f"<figure>{_image(scan, f'copy {i}')}</figure>" for i, scan in enumerate(pictures.warps))
    return _section(
        "Sixteen warps of one scan",
        "Captions are learnt from each training scan (first) and 16 copies, turned, sheared, scaled and shifted.",
        f'<div class="strip warps">{shown}</div>',
    )


def _footer(figures: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in figures["versions"].items())
    captions = ", ".join(caption.format("...") for caption in CAPTIONS)
    return f"<footer>{versions}. Captions: {escape(captions)}. All figures: report.json.</footer>"
