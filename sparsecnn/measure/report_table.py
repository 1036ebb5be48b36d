"""The conversion report as a table for the terminal; loaded when a report is first printed."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from ._text import count, ms, shape, times
from .report import LayerReport, Report, summary_rows

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render_table(report: Report) -> RenderableType:
    """The summary, one row per layer and the notes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = Table.grid(padding=(0, 2))
    summary.add_column(style="bold")
    summary.add_column()
    for label, value in summary_rows(report):
        summary.add_row(Text(label), Text(value))
    parts: list[RenderableType] = [summary, Text()]
    if report.layers:
        parts.append(_layer_table(report.layers))
    else:
        parts.append(Text("no convolution or linear layer was considered"))
    parts += [Text(f"note: {note}") for note in report.notes]
    return Group(*parts)


def render_text(report: Report, width: int) -> str:
    """The table as plain text without colour codes, at most `width` columns wide."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=False, color_system=None, legacy_windows=False
    )
    console.print(render_table(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _layer_table(layers: list[LayerReport]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", overflow="fold", min_width=8)
    table.add_column("weight", overflow="fold")
    for head in ("density", "MACs", "dense ms", "now ms", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("kernel", overflow="fold", min_width=8)
    # Bounded, because a long sentence would otherwise squeeze the layer names first.
    table.add_column("reason", overflow="fold", min_width=10, max_width=32)
    for layer in layers:
        # Text, never str: a name such as "[bold]" must not be read as markup.
        cells = (
            layer.name,
            shape(layer.weight_shape),
            "-" if math.isnan(layer.density) else f"{layer.density:.1%}",
            count(layer.macs),
            ms(layer.dense_ms),
            ms(layer.chosen_ms),
            times(layer.speedup),
            layer.kernel,
            layer.reason,
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table
