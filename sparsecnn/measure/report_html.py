"""The conversion report as one self-contained HTML page: inline CSS and SVG, no script, no link.

Every text that comes from the model (layer names, reasons, notes) passes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from ._svg import Axis, circle, line, rect, svg, text
from ._text import count, ms, ratio, scientific, shape, size, times
from .report import LayerReport, Report

_WIDTH = 1040  # of both plots, in SVG units; the page scales them
_ROW = 30  # height of a layer in the bar chart
_NAME_CHARS = 34  # longer layer names lose their beginning in the chart, never in the table

# Classes k0, k1, ... of the style sheet, one per kernel; "dense" kernels share the grey one.
_COLOURS = 6

_STYLE = """
:root { color-scheme: light dark; --bg:#fff; --fg:#1c2430; --muted:#5b6675; --line:#dfe4ea;
  --card:#f6f8fa; --k0:#2563eb; --k1:#d97706; --k2:#059669; --k3:#c026d3; --k4:#dc2626;
  --k5:#0891b2; --dense:#8a94a3; --before:#c9d0d9; --good:#047857; --bad:#b42318; }
@media (prefers-color-scheme: dark) { :root { --bg:#12161c; --fg:#e4e9f0; --muted:#9aa6b5;
  --line:#2b333e; --card:#1a2028; --k0:#60a5fa; --k1:#fbbf24; --k2:#34d399; --k3:#e879f9;
  --k4:#f87171; --k5:#22d3ee; --dense:#7d8898; --before:#465160; --good:#34d399; --bad:#f97066; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 56px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; } .sub, figcaption, dt { color: var(--muted); }
figcaption { font-size: 13px; }
.cards { display: grid; gap: 12px; margin: 24px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.card b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span, .card small { display: block; color: var(--muted); font-size: 13px; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--fg); font-size: 12px; font-family: inherit; }
svg .muted { fill: var(--muted); }
.grid { stroke: var(--line); } .axis { stroke: var(--muted); }
.ref { stroke: var(--muted); stroke-dasharray: 5 4; }
.k0 { fill: var(--k0); stroke: var(--k0); } .k1 { fill: var(--k1); stroke: var(--k1); }
.k2 { fill: var(--k2); stroke: var(--k2); } .k3 { fill: var(--k3); stroke: var(--k3); }
.k4 { fill: var(--k4); stroke: var(--k4); } .k5 { fill: var(--k5); stroke: var(--k5); }
.dense { fill: var(--dense); stroke: var(--dense); } .before { fill: var(--before); }
rect { stroke: none; } circle { fill-opacity: .8; } circle.ring { fill: none; stroke-width: 1.6; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; font-size: 13px;
  color: var(--muted); } .legend svg { display: inline-block; width: 12px; height: 12px;
  margin-right: 6px; vertical-align: -1px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 6px 8px; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; } th { color: var(--muted); font-weight: 600; white-space: nowrap;
  border-bottom-width: 2px; } .n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; } td.name { font-family: ui-monospace, Menlo, monospace;
  overflow-wrap: anywhere; min-width: 130px; } td.why { min-width: 230px; }
td.nb { white-space: nowrap; } td small { display: block; color: var(--muted); font-size: 12px;
  font-family: system-ui, sans-serif; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px;
  margin: 8px 0; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def render_html(report: Report) -> str:
    """The page for `report`, as a string.

    Layers without a time or a density are left out of the plots and say so in the caption; the
    table has every layer.
    """
    colours = _colours(report.layers)
    environment = report.environment
    stamp = [str(environment[k]) for k in ("cpu", "cuda", "date") if environment.get(k)]
    body = [
        "<h1>sparsecnn conversion report</h1>",
        f'<p class="sub">{escape(", ".join(stamp) or "no environment recorded")}</p>',
        _cards(report),
        _bars(report.layers, colours),
        _scatter(report.layers, colours),
        _table(report.layers),
    ]
    if report.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        body.append(f"<h2>Notes</h2><ul>{items}</ul>")
    if environment:
        rows = "".join(
            f"<dt>{escape(str(key))}</dt><dd>{escape('-' if value is None else str(value))}</dd>"
            for key, value in environment.items()
        )
        body.append(f"<h2>Environment</h2><dl>{rows}</dl>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>sparsecnn conversion report</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n"
        "</body>\n</html>\n"
    )


def _cards(report: Report) -> str:
    before, after = report.before, report.after
    share = ratio(report.effective_macs, report.macs)
    smaller = ratio(report.bytes_before, report.bytes_after)
    swapped = sum(not layer.is_dense for layer in report.layers)
    tone = "" if math.isnan(report.speedup) else "good" if report.speedup >= 1 else "bad"
    cells = [
        ("speed-up", times(report.speedup), f"median over median, {report.layout}", tone),
        (
            "latency p50",
            f"{ms(after.p50_ms)} ms",
            f"was {ms(before.p50_ms)} ms; IQR {ms(after.iqr_ms)} (was {ms(before.iqr_ms)})",
            "",
        ),
        (
            "latency p90 / p99",
            f"{ms(after.p90_ms)} / {ms(after.p99_ms)} ms",
            f"was {ms(before.p90_ms)} / {ms(before.p99_ms)} ms",
            "",
        ),
        (
            "throughput",
            f"{count(after.images_per_s)} img/s",
            f"was {count(before.images_per_s)} img/s",
            "",
        ),
        (
            "stored",
            size(report.bytes_after),
            f"was {size(report.bytes_before)} ({times(smaller)} smaller)",
            "",
        ),
        (
            "MACs, nonzero weights",
            count(report.effective_macs),
            f"of {count(report.macs)}" + ("" if math.isnan(share) else f" ({share:.1%})"),
            "",
        ),
        (
            "layers swapped",
            f"{swapped} of {len(report.layers)}",
            f"{len(report.layers) - swapped} kept dense",
            "",
        ),
        ("max |difference|", scientific(report.max_abs_diff), "of the model outputs", ""),
    ]
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{escape(label)}</span><b class="{tone}">{escape(value)}</b>'
            f"<small>{escape(detail)}</small></div>"
            for label, value, detail, tone in cells
        )
        + "</div>"
    )


def _bars(layers: list[LayerReport], colours: dict[str, str]) -> str:
    shown = [x for x in layers if math.isfinite(x.dense_ms) and math.isfinite(x.chosen_ms)]
    head = "<h2>Time per layer</h2>"
    if not shown:
        return f'{head}<p class="sub">No layer was timed.</p>'
    left, right, top = 250, 130, 8
    bottom = top + _ROW * len(shown)
    longest = max(max(x.dense_ms, x.chosen_ms) for x in shown)
    axis = Axis.linear(0.0, longest, left, _WIDTH - right)
    parts = []
    for tick in axis.ticks:
        x = axis.at(tick)
        parts += [
            line(x, top, x, bottom, "axis" if tick == 0 else "grid"),
            text(x, bottom + 18, f"{tick:g}", "muted", "middle"),
        ]
    middle = (left + _WIDTH - right) / 2
    parts.append(text(middle, bottom + 38, "median time of the layer (ms)", "muted", "middle"))
    for i, layer in enumerate(shown):
        y = top + i * _ROW
        before, now = axis.at(layer.dense_ms), axis.at(layer.chosen_ms)
        tip = (
            f"{layer.name}: best dense {ms(layer.dense_ms)} ms, now {layer.kernel} "
            f"{ms(layer.chosen_ms)} ms ({times(layer.speedup)})"
        )
        label = layer.name
        if len(label) > _NAME_CHARS:
            label = "…" + label[1 - _NAME_CHARS :]
        parts += [
            f"<g><title>{escape(tip)}</title>",
            text(left - 10, y + 19, label, "", "end"),
            rect(left, y + 4, before - left, 10, "before"),
            rect(left, y + 15, now - left, 10, colours[layer.kernel]),
            text(max(before, now) + 8, y + 19, f"{ms(layer.chosen_ms)} ms, {times(layer.speedup)}"),
            "</g>",
        ]
    keys = [(rect(0, 0, 12, 12, "before"), "best dense candidate")]
    keys += _keys(shown, colours, "now: ")
    return (
        f"{head}<figure>{_legend(keys)}{svg(_WIDTH, bottom + 46, parts, 'time per layer')}"
        f"{_missing(len(layers) - len(shown), 'without a time')}</figure>"
    )


def _scatter(layers: list[LayerReport], colours: dict[str, str]) -> str:
    head = "<h2>Speed-up against density</h2>"
    shown = [
        layer
        for layer in layers
        if math.isfinite(layer.density) and math.isfinite(layer.speedup) and layer.speedup > 0
    ]
    if not shown:
        return f'{head}<p class="sub">No layer has both a density and a time.</p>'
    rejected = [(layer, *best) for layer in shown if (best := _best_rejected(layer)) is not None]
    ratios = [layer.speedup for layer in shown] + [value for _, _, value in rejected]
    left, right, top, bottom = 64, 110, 12, 330
    across = Axis.linear(0.0, 1.0, left, _WIDTH - right)
    up = Axis.log2(min(ratios), max(ratios), bottom, top)
    parts = []
    for tick in across.ticks:
        x = across.at(tick)
        parts += [
            line(x, top, x, bottom, "axis" if tick == 0 else "grid"),
            text(x, bottom + 18, f"{tick:.0%}", "muted", "middle"),
        ]
    for tick in up.ticks:
        y = up.at(tick)
        parts += [
            line(left, y, _WIDTH - right, y, "ref" if tick == 1 else "grid"),
            text(left - 8, y + 4, f"{tick:g}x", "muted", "end"),
        ]
    parts += [
        text(_WIDTH - right + 8, up.at(1.0) + 4, "as fast as dense", "muted"),
        text(
            (left + _WIDTH - right) / 2,
            bottom + 38,
            "density (share of nonzero weights)",
            "muted",
            "middle",
        ),
        text(
            16,
            (top + bottom) / 2,
            "speed-up over the best dense candidate",
            "muted",
            "middle",
            turned=True,
        ),
    ]
    for layer, name, value in rejected:
        tip = f"{layer.name}: {name} was rejected at {times(value)}, density {layer.density:.1%}"
        parts.append(circle(across.at(layer.density), up.at(value), 5, "ring dense", tip))
    for layer in shown:
        tip = f"{layer.name}: {layer.kernel} {times(layer.speedup)}, density {layer.density:.1%}"
        x, y = across.at(layer.density), up.at(layer.speedup)
        parts.append(circle(x, y, 5.5, colours[layer.kernel], tip))
    keys = _keys(shown, colours, "")
    if rejected:
        keys.append((circle(6, 6, 5, "ring dense"), "best sparse candidate, measured and rejected"))
    return (
        f"{head}<figure>{_legend(keys)}"
        f"{svg(_WIDTH, bottom + 46, parts, 'speed-up against density')}"
        f"{_missing(len(layers) - len(shown), 'without a density or a time')}</figure>"
    )


def _best_rejected(layer: LayerReport) -> tuple[str, float] | None:
    """Fastest sparse candidate of a layer that stayed dense, and its speed-up."""
    if not layer.is_dense:
        return None
    rivals = {
        name: layer.dense_ms / value
        for name, value in layer.candidates_ms.items()
        if not name.startswith("dense") and math.isfinite(value) and value > 0
    }
    name = max(rivals, key=lambda key: rivals[key], default=None)
    return None if name is None else (name, rivals[name])


def _table(layers: list[LayerReport]) -> str:
    head = "<h2>Layers</h2>"
    if not layers:
        return f'{head}<p class="sub">No convolution or linear layer was considered.</p>'
    columns = (
        ("layer", ""), ("weight", ""), ("density", "n"), ("MACs", "n"), ("dense ms", "n"),
        ("now ms", "n"), ("speed-up", "n"), ("kernel", ""), ("why", ""),
    )  # fmt: skip
    rows = []
    for layer in layers:
        tried = ", ".join(f"{name} {ms(value)} ms" for name, value in layer.candidates_ms.items())
        details = [f"measured: {tried}"] if tried else []
        if layer.folded:
            details.append(f"folded in: {', '.join(layer.folded)}")
        if not math.isnan(layer.max_abs_diff):
            details.append(f"output differs by at most {scientific(layer.max_abs_diff)}")
        cells = (
            ("n", "-" if math.isnan(layer.density) else f"{layer.density:.1%}"),
            ("n", count(layer.macs)),
            ("n", ms(layer.dense_ms)),
            ("n", ms(layer.chosen_ms)),
            ("n", times(layer.speedup)),
            ("", layer.kernel),
        )
        sizes = f"{shape(layer.input_shape)} to {shape(layer.output_shape)}"
        rows.append(
            _cell("name", layer.name, layer.type)
            + _cell("nb", shape(layer.weight_shape), sizes)
            + "".join(_cell(kind, content) for kind, content in cells)
            + _cell("why", layer.reason or "-", *details)
        )
    heads = "".join(f'<th class="{kind}">{escape(label)}</th>' for label, kind in columns)
    return (
        f'{head}<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>'
        + "".join(f"<tr>{row}</tr>\n" for row in rows)
        + "</tbody></table></div>"
    )


def _cell(kind: str, content: str, *details: str) -> str:
    """A table cell with smaller lines below its content."""
    small = "".join(f"<small>{escape(detail)}</small>" for detail in details)
    return f'<td class="{kind}">{escape(content)}{small}</td>'


def _colours(layers: Iterable[LayerReport]) -> dict[str, str]:
    kernels = sorted({layer.kernel for layer in layers})
    sparse = [kernel for kernel in kernels if not kernel.startswith("dense")]
    colours = {kernel: f"k{i % _COLOURS}" for i, kernel in enumerate(sparse)}
    return {kernel: colours.get(kernel, "dense") for kernel in kernels}


def _keys(
    layers: Iterable[LayerReport], colours: dict[str, str], prefix: str
) -> list[tuple[str, str]]:
    """Swatch and label per colour in use; dense kernels share one."""
    labels: dict[str, str] = {}
    for kernel in sorted({layer.kernel for layer in layers}):
        labels[colours[kernel]] = "dense kept" if colours[kernel] == "dense" else kernel
    return [(rect(0, 0, 12, 12, kind), prefix + label) for kind, label in labels.items()]


def _legend(keys: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<span><svg viewBox="0 0 12 12" aria-hidden="true">{swatch}</svg>{escape(label)}</span>'
        for swatch, label in keys
    )
    return f'<div class="legend">{items}</div>'


def _missing(number: int, why: str) -> str:
    if not number:
        return ""
    return f"<figcaption>{number} layer{'s' * (number > 1)} {why} not shown.</figcaption>"
