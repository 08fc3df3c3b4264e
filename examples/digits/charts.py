"""Line charts as inline SVG: text and lines take the page's colours, in light and in dark."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 40, 16, 12, 34
MOST_POINTS = 400

Place = Callable[[float, float], tuple[float, float]]
"""Step and value to x and y in the picture."""


@dataclass(frozen=True)
class Line:
    """A curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    """CSS class: ``faint``, ``one``, ``two``, or ``marks`` for crosses without a line."""
    dots: bool = False


def chart(
    lines: Sequence[Line], *, y_top: float, floors: Mapping[str, float] | None = None, percent: bool = False
) -> str:
    """An SVG of curves over the steps from 0; ``floors`` are dashed and named."""
    last = max((max(line.x) for line in lines if line.x), default=1)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / last, min(y / y_top, 1.02)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for value in ticks(y_top):
        x, y = place(0, value)
        text = f"{100 * value:.0f} %" if percent else f"{value:g}"
        parts.append(f'<line class="rule" x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x - 5:.1f}" y="{y + 3:.1f}" text-anchor="end">{text}</text>')
    for value in ticks(last):
        x, y = place(value, 0)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">step</text>'
    )
    for name, level in (floors or {}).items():
        x, y = place(0, level)
        parts.append(f'<line class="floor" x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        label = f"{escape(name)} {level:.2f}"
        y += 13 if level < 0.1 * y_top else 0  # below a low one: curves end just above it
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 3:.1f}" text-anchor="end">{label}</text>')
    parts += [_drawn(line, place) for line in lines]
    return "".join([*parts, "</svg>", _legend(lines)])


def ticks(top: float) -> list[float]:
    """Round numbers from 0 to ``top``, four to eight of them."""
    raw = top / 6
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def _drawn(line: Line, place: Place) -> str:
    every = max(1, len(line.x) // MOST_POINTS)
    kept = sorted({*range(0, len(line.x), every), len(line.x) - 1}) if line.x else []
    points = [place(line.x[i], line.y[i]) for i in kept]
    if line.style == "marks":
        d = "".join(f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0-7l-7 7" for x, y in points)
        return f'<path class="marks" d="{d}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points if line.dots)
    return f'<polyline class="{line.style}" points="{path}"/>{dots}'


def _legend(lines: Sequence[Line]) -> str:
    items = (f'<span class="key {line.style}">{escape(line.label)}</span>' for line in lines if line.label)
    return f'<div class="legend">{"".join(items)}</div>'
