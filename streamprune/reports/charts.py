"""Figures of a report as inline SVG: text stays text, colours are the page's, and each is said in words too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 260  # of a figure, in its own units
LEFT, RIGHT, TOP, BOTTOM = 92, 12, 12, 40  # margins around what is plotted
BAR, GAP = 18, 8


@dataclass(frozen=True)
class Axis:
    """Axis from `low` to `high` of a quantity, over pixels `start` to `stop`.

    Attributes:
        say: writes a value. marks: values that are marked, if not round ones.
    """

    low: float
    high: float
    start: float
    stop: float
    say: Callable[[float], str] = "{:,.6g}".format
    marks: tuple[float, ...] = ()

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        width = self.high - self.low or 1.0
        return self.start + (value - self.low) / width * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """List about `count` round values on the axis, or the marks that it was given."""
        if self.marks:
            return list(self.marks)
        width = self.high - self.low
        if width <= 0 or not math.isfinite(width):
            return [self.low]
        rough = width / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def x_axis(low: float, high: float, say: Callable[[float], str] = "{:,.6g}".format) -> Axis:
    """Make the axis along the bottom of a figure."""
    return Axis(low, high, LEFT, WIDTH - RIGHT, say)


def y_axis(low: float, high: float, say: Callable[[float], str] = "{:,.6g}".format) -> Axis:
    """Make the axis along the left of a figure."""
    return Axis(low, high, HEIGHT - BOTTOM, TOP, say)


def logarithmic_y(low: float, high: float) -> Axis:
    """Make the axis along the left for logarithms to base 10, marked at round numbers."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = range(1, 10) if high - low < 1 else (1, 2, 5) if high - low < 3 else (1,)
    marks = [math.log10(factor) + power for power in powers for factor in factors]
    inside = tuple(mark for mark in marks if low <= mark <= high)
    return Axis(low, high, HEIGHT - BOTTOM, TOP, lambda value: f"{10**value:.2g}", inside)


def picture(height: float, title: str, words: str, parts: Sequence[str]) -> str:
    """Wrap what was drawn in an SVG with its title, and with the words that say what it shows."""
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(f"{title}: {words}", quote=True)}">'
        f"<title>{escape(title)}</title><desc>{escape(words)}</desc>{body}</svg>"
    )


def plot(title: str, words: str, x: Axis, y: Axis, labels: tuple[str, str], parts: Sequence[str]) -> str:
    """Draw axes with ticks and labels around parts that were drawn by them."""
    drawn = []
    for value in y.ticks():
        drawn += [line((x.start, y(value)), (x.stop, y(value)), "grid"), _text(x.start - 6, y(value) + 4, y.say(value))]
    for value in x.ticks(8):
        drawn.append(_text(x(value), y.start + 16, x.say(value), anchor="middle"))
    drawn += [line((x.start, y.start), (x.stop, y.start), "axis")]
    drawn.append(_text((x.start + x.stop) / 2, HEIGHT - 6, labels[0], anchor="middle"))
    middle = (y.start + y.stop) / 2
    drawn.append(
        f'<text class="soft" x="12" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 12 {middle:.1f})">'
        f"{escape(labels[1])}</text>"
    )
    return picture(HEIGHT, title, words, [*drawn, *parts])


def bars(title: str, words: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Draw horizontal bars: a name, a value that is not negative, and what is written beside it."""
    most = max([value for _, value, _ in rows if math.isfinite(value)], default=0.0) or 1.0
    parts, y, left = [], 4, 190
    for name, value, said in rows:
        width = min(value / most, 1.0) * (WIDTH - left - 190) if value > 0 else 0.0  # inf is as long as the longest
        parts.append(_text(left - 8, y + 14, name, "ink"))
        parts.append(f'<rect class="a" x="{left}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>')
        parts.append(_text(left + width + 8, y + 14, said, anchor="start"))
        y += BAR + GAP
    return picture(y, title, words, parts)


def rectangle(x: tuple[float, float], y: tuple[float, float], kind: str) -> str:
    """Draw a filled rectangle between two places each way."""
    left, top = min(x), min(y)
    size = f'width="{max(x) - left:.1f}" height="{max(y) - top:.1f}"'
    return f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" {size}/>'


def line(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    """Draw a straight line."""
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def curve(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Draw a line through points."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{through}"/>'


def _text(x: float, y: float, words: str, kind: str = "soft", anchor: str = "end") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
