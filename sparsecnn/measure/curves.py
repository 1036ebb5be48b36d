"""A plot of curves over one axis as a self-contained SVG file: no library, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ._svg import Axis, circle, line, svg, text

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900.0, 460.0, 64.0, 36.0, 48.0
_LEGEND = 230.0  # room for names at the right
_NAME_CHARS = 30
_COLOURS = (
    "#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#0891b2", "#65a30d", "#7c3aed",
)  # fmt: skip
_STYLE = (
    "text { font: 12px system-ui, sans-serif; fill: #1c2430; } .grid { stroke: #dfe4ea; } "
    ".ref { stroke: #5b6675; stroke-dasharray: 5 4; } "
    + " ".join(f".k{i} {{ fill: {c}; stroke: {c}; }}" for i, c in enumerate(_COLOURS))
)


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    reference: float | None = None,
) -> str:
    """Draw `series` over `x`.

    Args:
        x: ascending values, at least two.
        series: name -> one value per x; colours repeat after eight.
        title: above the plot.
        x_label: under it.
        y_label: beside it.
        reference: a dashed horizontal line.

    Returns:
        An SVG document.

    Raises:
        ValueError: fewer than two x, no series, or one of another length.
    """
    if len(x) < 2 or not series or any(len(values) != len(x) for values in series.values()):
        raise ValueError(
            f"curves: expected at least two x and one value per x in every series, got {len(x)} "
            f"x and lengths {sorted({len(values) for values in series.values()})}"
        )
    levels = [v for values in series.values() for v in values]
    levels += [] if reference is None else [reference]
    height = max(_HEIGHT, _TOP + _BOTTOM + 16.0 * len(series))
    across = Axis.linear(min(x), max(x), _LEFT, _WIDTH - _LEGEND)
    up = Axis.linear(min(levels), max(levels), height - _BOTTOM, _TOP)
    parts = [f"<style>{_STYLE}</style>", text(_LEFT, 20, title)]
    for tick in across.ticks:
        parts.append(line(across.at(tick), up.begin, across.at(tick), up.end, "grid"))
        parts.append(text(across.at(tick), up.begin + 18, f"{tick:g}", anchor="middle"))
    for tick in up.ticks:
        parts.append(line(across.begin, up.at(tick), across.end, up.at(tick), "grid"))
        parts.append(text(across.begin - 8, up.at(tick) + 4, f"{tick:g}", anchor="end"))
    parts.append(text((across.begin + across.end) / 2, height - 8, x_label, anchor="middle"))
    parts.append(text(14, (up.begin + up.end) / 2, y_label, anchor="middle", turned=True))
    if reference is not None:
        parts.append(line(across.begin, up.at(reference), across.end, up.at(reference), "ref"))
    for number, (name, values) in enumerate(series.items()):
        kind = f"k{number % len(_COLOURS)}"
        points = [(across.at(a), up.at(b)) for a, b in zip(x, values, strict=True)]
        for (x1, y1), (x2, y2) in pairwise(points):
            parts.append(line(x1, y1, x2, y2, kind))
        for (x1, y1), value in zip(points, values, strict=True):
            parts.append(circle(x1, y1, 3, kind, f"{name}: {value:.4g}"))
        row = _TOP + 16.0 * number
        parts.append(circle(_WIDTH - _LEGEND + 20, row, 4, kind))
        short = name if len(name) <= _NAME_CHARS else "..." + name[3 - _NAME_CHARS :]
        parts.append(text(_WIDTH - _LEGEND + 30, row + 4, short))
    drawn = svg(_WIDTH, height, parts, title)
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"
