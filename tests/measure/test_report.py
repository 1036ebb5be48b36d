"""The report as text, JSON and HTML, ordinary and with everything that can be missing."""

from __future__ import annotations

import io
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from sparsecnn.measure import LatencyStats, ModelTiming, Report, environment
from sparsecnn.measure._svg import Axis
from sparsecnn.measure._text import count, size

from .helpers import layer_report, model_report

NAMES = ["stem.conv1", "layer1.0.conv2", "head"]


@pytest.fixture
def report() -> Report:
    return model_report([layer_report(name) for name in NAMES])


def blank_report() -> Report:
    """Nothing was measured, in each of the ways to say so."""
    nothing = ModelTiming(p50_ms=None, p90_ms=math.nan, p99_ms=None, iqr_ms=None, images_per_s=0.0)
    layers = [
        layer_report("unmeasured", dense_ms=None, chosen_ms=math.nan, density=None),
        layer_report("instant", chosen_ms=0.0, candidates_ms={"csr": None}),
        layer_report("diverged", max_abs_diff=math.inf, weight_shape=(), candidates_ms={}),
    ]  # fmt: skip
    return model_report(layers, before=nothing, after=nothing, macs=0, max_abs_diff=None)


def svgs(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(part) for part in re.findall(r"<svg.*?</svg>", html, re.S)]


def test_derived_figures(report: Report):
    assert report.speedup == 4.0
    assert report.layers[0].speedup == pytest.approx(4.0)
    assert not report.layers[0].is_dense
    assert layer_report("x", kernel="dense channels_last").is_dense
    assert model_report([], speedup=3.5).speedup == 3.5


def test_timing_from_statistics():
    stats = LatencyStats.from_ns([2_000_000, 2_000_000, 4_000_000])
    timing = ModelTiming.from_stats(stats, images=8)
    assert timing.p50_ms == pytest.approx(2.0) and timing.images_per_s == pytest.approx(4000.0)
    assert timing.p99_ms == pytest.approx(stats.p99_s * 1e3)
    assert timing.p90_ms == pytest.approx(stats.p90_s * 1e3)
    assert timing.iqr_ms == pytest.approx(stats.iqr_s * 1e3)


def test_text_has_every_layer_and_figure(report: Report):
    text = str(report)
    for expected in (*NAMES, "4.00x", "8.000 -> 2.000 ms", "25.0%", "32x16x3x3", "csr is fastest"):
        assert expected in text
    assert "4.00 KiB -> 1.00 KiB" in text and "note: a note" in text
    assert "\x1b" not in text


def test_text_keeps_to_its_width_and_takes_names_literally():
    name = "a.very.long.name." * 5 + "[bold]conv[/]"
    reason = "because " * 40
    text = model_report([layer_report(name, reason=reason)]).to_text(width=100)
    assert max(len(line) for line in text.splitlines()) <= 100
    column = "".join(line.split("  ")[0].strip() for line in text.splitlines()[8:])
    assert "[bold]" in column.replace(" ", "")


def test_prints_through_rich(report: Report):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    assert "layer1.0.conv2" in console.export_text()


def test_json_round_trip(report: Report, tmp_path: Path):
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    assert json.loads(text)["schema_version"] == 1
    again = Report.from_json(text)
    assert again == report
    assert again.layers[0].weight_shape == (32, 16, 3, 3)
    assert again.layers[0].folded == ("bn1", "relu1")
    assert Report.from_dict(report.to_dict()) == report


def test_json_is_strict_without_numbers():
    report = blank_report()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = report.to_json()
    data = json.loads(text, parse_constant=refuse)
    assert data["layers"][0]["dense_ms"] is None and data["before"]["p50_ms"] is None
    again = Report.from_json(text)
    assert math.isnan(again.layers[0].dense_ms) and math.isnan(again.layers[1].candidates_ms["csr"])
    assert again.layers[2].max_abs_diff == math.inf
    assert again.to_json() == text


def test_environment_survives_json(report: Report):
    report.environment = environment()
    assert Report.from_json(report.to_json()).environment == report.environment


def test_environment_describes_this_machine():
    stamp = environment()
    assert stamp["threads"] >= 1 and stamp["cores"] >= 1
    assert stamp["torch"] and stamp["python"] and stamp["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", stamp["date"])
    assert stamp["isa"] in (None, "scalar", "avx2", "avx512")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "expected schema_version 1, got 2; read the file"),
        (lambda d: d.update(schema_version=True), "expected schema_version 1, got True"),
        (lambda d: d.pop("schema_version"), "expected schema_version 1, got None"),
        (lambda d: d.pop("before"), "expected before to be a mapping, got None"),
        (lambda d: d.update(layers=None), "expected layers to be a list, got None"),
        (lambda d: d.update(layers=[3]), r"expected layers\[0\] to be a mapping, got 3"),
        (lambda d: d.update(extra=1), "expected Report with known fields, got unknown extra"),
        (lambda d: d["layers"][0].pop("name"), r"layers\[0\] with all fields, got missing name"),
        (lambda d: d["layers"][0].update(name=5), r"layers\[0\].name of type str, got 5"),
        (lambda d: d["layers"][0].update(macs=1.5), r"layers\[0\].macs of type int, got 1.5"),
        (lambda d: d["layers"][0].update(dense_ms="x"), "dense_ms of type float, got 'x'"),
        (lambda d: d["layers"][0].update(weight_shape="ab"), "weight_shape of type tuple"),
        (lambda d: d["layers"][0].update(candidates_ms=[1]), "candidates_ms of type dict"),
        (lambda d: d["after"].update(p50_ms=[]), r"after.p50_ms of type float, got \[\]"),
        (lambda d: d.update(notes="text"), "notes of type list"),
        (lambda d: d.update(layout=None), "layout of type str, got None"),
    ],
)
def test_bad_data(report: Report, change, message: str):
    data = json.loads(report.to_json())
    change(data)
    with pytest.raises(ValueError, match=f"Report: expected .*{message}|Report: {message}"):
        Report.from_dict(data)


def test_no_report_at_all():
    with pytest.raises(TypeError, match="expected data to be a mapping, got list"):
        Report.from_dict([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        Report.from_json("[]")
    with pytest.raises(ValueError, match="Expecting value"):
        Report.from_json("not json")
    with pytest.raises(ValueError, match="expected width to be an int >= 80, got 10"):
        model_report([]).to_text(width=10)


def test_html_has_every_layer_and_both_plots(report: Report, tmp_path: Path):
    html = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    table = html[html.index("<table>") :]
    assert all(f">{name}<" in table for name in NAMES)
    plots = [svg for svg in svgs(html) if svg.get("role") == "img"]
    assert [svg.get("aria-label") for svg in plots] == [
        "time per layer",
        "speed-up against density",
    ]
    assert len(plots[0].findall("./g")) == len(NAMES)
    assert len(plots[1].findall("./circle")) == len(NAMES)
    labels = {text.text for svg in plots for text in svg.iter("text")}
    assert {"median time of the layer (ms)", "density (share of nonzero weights)"} <= labels


def test_bars_are_drawn_to_scale():
    layers = [layer_report("a", dense_ms=0.4, chosen_ms=0.1), layer_report("b", dense_ms=0.2)]
    chart = svgs(model_report(layers).to_html())
    (bars,) = [svg for svg in chart if svg.get("aria-label") == "time per layer"]
    widths = [
        [float(r.get("width", "")) for r in group.findall("rect")] for group in bars.iter("g")
    ]
    assert widths[0][0] == pytest.approx(4 * widths[0][1], abs=0.5)
    assert widths[0][0] == pytest.approx(2 * widths[1][0], abs=0.5)


def test_a_rejected_candidate_is_drawn_where_it_would_have_been():
    kept = layer_report(
        "kept", kernel="dense contiguous", chosen_ms=0.4, candidates_ms={"csr": 0.8, "dense": 0.4}
    )
    html = model_report([kept]).to_html()
    (plot,) = [svg for svg in svgs(html) if svg.get("aria-label") == "speed-up against density"]
    ring, dot = plot.findall("circle")
    assert ring.get("class") == "ring dense" and "0.50x" in ring[0].text
    assert float(ring.get("cy")) > float(dot.get("cy"))  # further down is slower


def test_html_is_self_contained_and_escapes_what_the_model_says():
    evil = '<script>alert("1")</script>&'
    layer = layer_report(
        evil, type=evil, kernel=evil, reason=evil, folded=(evil,), candidates_ms={evil: 0.1}
    )
    kept = layer_report("k", kernel="dense", candidates_ms={evil: 9.0})
    report = model_report(
        [layer, kept], notes=[evil], layout=evil, environment={evil: evil, "cpu": evil}
    )
    html = report.to_html()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r"""(src|href)=|@import|url\(|https?:""", html)
    assert all(svg is not None for svg in svgs(html))  # every plot is still well-formed


def test_html_without_layers_or_timings():
    empty = model_report([]).to_html()
    assert "No convolution or linear layer was considered" in empty and "role" not in empty
    blank = blank_report().to_html()
    for name in ("unmeasured", "instant", "diverged"):
        assert f">{name}<" in blank
    assert "1 layer without a time not shown" in blank
    assert "nan" not in re.sub(r"<style>.*</style>", "", blank, flags=re.S).lower()
    assert "nan" not in str(blank_report()).lower()
    assert "no convolution or linear layer" in str(model_report([]))


@pytest.mark.parametrize("method", ["to_json", "to_html"])
def test_a_failed_write_keeps_the_old_file(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    path = tmp_path / "report"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        getattr(report, method)(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]  # and no temporary file


def test_a_missing_folder_is_an_error(report: Report, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        report.to_json(tmp_path / "missing" / "report.json")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
def test_written_files_have_the_usual_permissions(report: Report, tmp_path: Path):
    (tmp_path / "plain").touch()
    report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (99, "99"), (460_416, "460 k"), (999_999, "1 M"), (4.1e9, "4.1 G"), (math.nan, "-")],
)  # fmt: skip
def test_counts(value: float, text: str):
    assert count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB")])
def test_sizes(value: int, text: str):
    assert size(value) == text


@pytest.mark.parametrize("high", [1e-7, 0.03, 0.3, 1.0, 1.81, 7.0, 10.0, 123.4, 9.9e6])
def test_linear_axes_reach_past_the_data_in_a_readable_number_of_ticks(high: float):
    axis = Axis.linear(0.0, high, 100.0, 900.0)
    assert 4 <= len(axis.ticks) <= 11
    assert axis.ticks[-1] >= high * (1 - 1e-9)
    assert axis.ticks[-2] < high
    steps = {
        round((b - a) / axis.ticks[1], 6) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)
    }
    assert steps == {1.0}
    assert axis.at(0.0) == 100.0 and axis.at(axis.ticks[-1]) == pytest.approx(900.0)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.18, 7.3), (1e-5, 1e5), (4.0, 4.0)])
def test_logarithmic_axes_cover_the_data_and_label_one(low: float, high: float):
    axis = Axis.log2(low, high, 330.0, 12.0)
    assert 1.0 in axis.ticks and len(axis.ticks) <= 12
    assert axis.low <= low and axis.high >= high
    assert 12.0 <= axis.at(high) <= axis.at(low) <= 330.0
