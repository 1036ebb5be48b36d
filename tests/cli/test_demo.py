"""The demo end to end, small; and its gates on made-up results."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsecnn
from sparsecnn import demo
from sparsecnn._demo_reload import ReloadError, reload
from sparsecnn.cli import main
from sparsecnn.data import ResNet20, digits
from sparsecnn.measure import ModelTiming, Report

pytest.importorskip("sklearn")

FILES = {"report.html", "report.json", "summary.json", "model.safetensors"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One quick run through the command line."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["demo", "--quick", "--out", str(folder), "--sparsity", "0.75"])
    return {
        "code": code, "folder": folder, "text": printed.getvalue(),
        "random": torch.equal(state, torch.get_rng_state()),
        "threads": threads == torch.get_num_threads(),
        "summary": json.loads((folder / "summary.json").read_text()),
    }  # fmt: skip


def test_the_run_succeeds_and_leaves_its_files(quick: dict[str, Any]) -> None:
    assert quick["code"] == 0
    assert {path.name for path in quick["folder"].iterdir()} == FILES
    assert quick["random"] and quick["threads"], "global state changed"


def test_the_fresh_process_computed_the_same(quick: dict[str, Any]) -> None:
    summary = quick["summary"]
    assert summary["reload_diff"] <= demo.MAX_RELOAD_DIFF
    assert "logits on the test set equal" in quick["text"]
    # Once more here, against the file itself.
    model = sparsecnn.load(quick["folder"] / "model.safetensors", ResNet20(8)).eval()
    with torch.inference_mode():
        logits = model(digits(32, 0).test.tensors[0])
    again = reload(quick["folder"] / "model.safetensors", 8, 0, torch.get_num_threads(), "cpu")
    assert again.shape == (450, 10) and float(again.std()) > 0
    assert (again - logits).abs().max() <= demo.MAX_RELOAD_DIFF


def test_the_summary_holds_the_figures(quick: dict[str, Any]) -> None:
    summary = quick["summary"]
    assert summary["schema_version"] == 1 and summary["quick"] is True
    assert summary["images"] == 450 and 0 <= summary["accuracy_sparse"] <= 1
    # All convolutions but the stem at 75 %; stem and classifier are a few hundred weights.
    assert 0.70 < summary["sparsity"] < 0.75
    assert summary["file_bytes"] == (quick["folder"] / "model.safetensors").stat().st_size
    assert summary["file_bytes"] < 0.5 * summary["dense_bytes"]
    ratio = summary["dense_p50_ms"] / summary["fast_p50_ms"]
    assert summary["speedup"] == pytest.approx(ratio) and summary["failures"] == []
    for word in ("accuracy", "latency", "size", "reloaded", "written", "took"):
        assert word in quick["text"]


def test_the_report_can_be_parsed_and_looked_at(quick: dict[str, Any]) -> None:
    text = (quick["folder"] / "report.json").read_text()
    assert json.loads(text)["schema_version"] == 1
    report = Report.from_json(text)
    assert len(report.layers) == 22 and any("fresh process" in note for note in report.notes)
    density = {layer.name: layer.density for layer in report.layers}
    assert density["stem.0"] == 1 and density["fc"] == 1
    assert density["blocks.4.conv2"] == pytest.approx(0.25, abs=0.01)
    page = (quick["folder"] / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "<svg" in page
    for name in density:
        assert name in page and name in quick["text"]


def _result(**changes: Any) -> demo.Result:
    result = demo.Result(
        images=450, accuracy_dense=0.98, accuracy_sparse=0.97, sparsity=0.9, dense_bytes=100,
        file_bytes=20, dense_layout="contiguous", dense_p50_ms=2.0, fast_p50_ms=1.0,
        dense_iqr_ms=0.1, fast_iqr_ms=0.1, threads=1, reload_diff=0.0, reload_bitwise=True,
        seconds=1.0, quick=False,
    )  # fmt: skip
    return replace(result, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ()),
        ({"accuracy_sparse": 0.99}, ()),
        ({"accuracy_sparse": 0.9699}, ("1.01 points", "--epochs")),
        ({"accuracy_sparse": 0.5, "quick": True}, ()),
        ({"reload_diff": 1e-5}, ()),
        ({"reload_diff": 2e-5}, ("reloaded model differs by 2e-05",)),
        ({"reload_diff": math.nan, "quick": True}, ("reloaded model",)),
    ],
)
def test_the_gates(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    failures = _result(**changes).failures()
    assert len(failures) == bool(words)
    assert all(word in failures[0] for word in words)


def test_a_failed_check_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    time = ModelTiming(p50_ms=1, p90_ms=1, p99_ms=1, iqr_ms=0, images_per_s=1000)
    report = Report(layers=[], before=time, after=time)
    monkeypatch.setattr("sparsecnn.cli.run", lambda *_: (_result(accuracy_sparse=0.9), report))
    assert main(["demo", "--out", str(tmp_path)]) == 1
    found = capsys.readouterr()
    assert "failed: accuracy fell by 8.00 points" in found.err and "demo" in found.out


def test_a_dead_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ReloadError, match=r"could not reload .*model\.safetensors: ValueError"):
        reload(tmp_path / "model.safetensors", 8, 0, 1, "cpu")

    def fail(*_: object) -> None:
        raise ReloadError("the fresh process could not reload it")

    monkeypatch.setattr("sparsecnn.cli.run", fail)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    found = capsys.readouterr().err
    assert found.splitlines()[-1].startswith("sparsecnn demo: failed: ") and "fresh" in found


def test_interruption_leaves_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsecnn.cli.run", interrupt)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert "sparsecnn demo: interrupted" in capsys.readouterr().err
