"""The few SVG elements and the axes that the HTML report draws with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Axis:
    """A scale from data to SVG coordinates with its ticks.

    Attributes:
        low: data value at `begin`.
        high: data value at `end`.
        begin: coordinate of `low`.
        end: coordinate of `high`; below `begin` for an axis that points up.
        ticks: data values to label, ascending.
        is_log: whether the scale is logarithmic.
    """

    low: float
    high: float
    begin: float
    end: float
    ticks: tuple[float, ...]
    is_log: bool = False

    @classmethod
    def linear(cls, low: float, high: float, begin: float, end: float) -> Axis:
        """Five to ten ticks at steps of 1, 2 or 5 times a power of ten, reaching past `high`."""
        span = high - low if high > low else 1.0
        power = 10.0 ** math.floor(math.log10(span / 5))
        step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 10)
        # The slack keeps 1.0 from becoming 1.0000000000000002 steps and growing a tick too many.
        steps = math.ceil(span / step - 1e-9)
        # Multiples rounded to the step's own decimals: 3 * 0.1 prints as 0.3.
        digits = max(0, 1 - math.floor(math.log10(step)))
        ticks = tuple(round(low + i * step, digits) for i in range(steps + 1))
        return cls(low, ticks[-1], begin, end, ticks)

    @classmethod
    def log2(cls, low: float, high: float, begin: float, end: float) -> Axis:
        """Ticks at powers of two around the data and 1; both `low` and `high` must be positive."""
        first = min(-1, math.floor(math.log2(low)))
        last = max(1, math.ceil(math.log2(high)))
        stride = max(1, math.ceil((last - first) / 10))
        powers = [p for p in range(first, last + 1) if p % stride == 0]  # 0, the 1x, is among them
        ticks = tuple(2.0**p for p in powers)
        return cls(2.0**first, 2.0**last, begin, end, ticks, is_log=True)

    def at(self, value: float) -> float:
        """Coordinate of a data value."""
        if self.is_log:
            share = math.log2(value / self.low) / math.log2(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """An image with the given coordinate system, named `label` for screen readers."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line; `kind` is its CSS class, here and below."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A bar at least one unit wide, so that a tiny value stays visible."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1.0):.1f}" height="{height:.1f}" '
        f'rx="1.5" class="{kind}"/>'
    )


def circle(x: float, y: float, radius: float, kind: str, tip: str = "") -> str:
    """A marker with an optional tooltip."""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{title}</circle>'


def text(
    x: float, y: float, content: str, kind: str = "", anchor: str = "start", turned: bool = False
) -> str:
    """A line of text; `anchor` is start, middle or end, `turned` writes it upwards."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{turn}>'
        f"{escape(content)}</text>"
    )
