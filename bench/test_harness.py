"""The benchmark tools: what they compute, refuse and print. Nothing here asserts a time."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench import compare, run
from bench.cases import DENSITIES, LAYERS, random_input, sparse_weight
from bench.suite_csr import verify
from bench.timing import buffer_sets, measure, rotating


@pytest.mark.parametrize("letter", LAYERS)
def test_layers_are_what_torch_says(letter: str) -> None:
    layer = LAYERS[letter]
    x = torch.empty(2, layer.c, layer.h, layer.w, device="meta")
    weight = torch.empty(layer.weight_shape, device="meta")
    y = F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)
    assert y.shape[2:] == torch.Size(layer.out_size)
    assert layer.dense_flops(2) == 2 * y.numel() * math.prod(layer.weight_shape[1:])
    assert layer.sparse_flops(3, 10) == 2 * 10 * 3 * layer.out_size[0] * layer.out_size[1]


@pytest.mark.parametrize("density", DENSITIES)
def test_weights_have_the_exact_number_of_nonzeros(density: float) -> None:
    layer = LAYERS["b"]
    weight = sparse_weight(layer, density)
    assert int(weight.count_nonzero()) == round(density * math.prod(layer.weight_shape))
    assert torch.equal(weight, sparse_weight(layer, density))
    assert not torch.equal(weight, sparse_weight(layer, density, seed=1))
    assert random_input(layer, 2).count_nonzero() > 0


def test_a_wrong_kernel_is_not_timed() -> None:
    layer = LAYERS["d"]
    weight, x = sparse_weight(layer, 0.02), random_input(layer, 1)

    def right(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(image.double(), weight.double(), padding=1).float()

    assert verify(layer, weight, x, right, torch.float32) < 1e-4
    with pytest.raises(AssertionError, match="out of bound"):
        verify(layer, weight, x, lambda image: right(image) * 1.001, torch.float32)


def test_cold_runs_use_every_buffer_in_turn() -> None:
    used: list[int] = []
    made: list[int] = []

    def factory() -> Any:
        made.append(len(made))
        mine = made[-1]
        return lambda: used.append(mine)

    measure({"one": factory}, cold_bytes=1 << 30, runs=20, warmup=0, min_time_s=0)
    assert made == [0, 1]
    assert used == [0, 1] * 10
    assert buffer_sets(1) == 64 and buffer_sets(1 << 40) == 2
    count = iter(range(100))
    step = rotating([lambda: next(count)])
    assert [step(), step()] == [0, 1]
    with pytest.raises(ValueError, match="runs >= 20, got 5"):
        measure({"one": factory}, runs=5)


def test_a_run_prints_and_writes_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    threads = torch.get_num_threads()
    try:
        arguments = ["csr", "--quick", "--layers", "d", "g", "--no-roof", "--json", str(file)]
        assert run.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.strip().splitlines()
    document = json.loads(file.read_text())
    assert lines[-1] == f"geomean csr {document['geomean_all']:.3f}"
    assert lines[-2].startswith("geomean csr at 90 % ")
    assert lines[-3].startswith("geomean csr at 80 % ")
    assert len(document["rows"]) == 4
    assert document["environment"]["torch"] == torch.__version__
    for row in document["rows"]:
        assert row["runs"] >= 20
        assert set(row["ms"]) == {
            "dense contiguous", "dense channels_last", "csr contiguous", "csr channels_last",
        }  # fmt: skip
        ours = min(row["ms"]["csr contiguous"], row["ms"]["csr channels_last"])
        dense = min(row["ms"]["dense contiguous"], row["ms"]["dense channels_last"])
        assert row["ratio"] == pytest.approx(dense / ours)
        layer = LAYERS[row["case"]]
        assert row["gflops"] == pytest.approx(layer.sparse_flops(1, row["nnz"]) / ours / 1e6)
    wanted = math.prod(r["ratio"] for r in document["rows"]) ** 0.25
    assert document["geomean_all"] == pytest.approx(wanted)
    assert compare.main([str(file), str(file)]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["winograd2"], "invalid choice"),
        (["csr", "--batch", "0"], "expected --batch >= 1, got 0"),
        (["csr", "--runs", "3"], "expected --runs >= 20, got 3"),
        (["csr", "--density", "1.5"], r"expected --density in (0, 1], got 1.5"),
        (["csr", "--layers", "z"], "expected --layers among a, b"),
        (["csr", "--json", "/nonexistent/x.json"], "existing folder"),
        (["models", "--cold"], "no --cold"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def document(ratio: float, *, spread: float = 0.01, runs: int = 25) -> dict[str, Any]:
    row = {
        "case": "a", "sparsity": 0.9, "ratio": ratio, "runs": runs,
        "best": "csr contiguous", "best_dense": "dense contiguous",
        "spread": {"csr contiguous": spread, "dense contiguous": spread},
    }  # fmt: skip
    return {
        "schema": 1, "suite": "csr", "mode": "warm", "threads": 1, "batch": 1, "device": "cpu",
        "dtype": "float32", "tf32": None, "environment": {"cpu": "x", "isa": "avx2", "cuda": None},
        "rows": [row],
    }  # fmt: skip


def status(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> int:
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    return compare.main([str(p) for p in paths])


def test_compare_fails_on_one_regression_beyond_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(tmp_path, document(4.0), document(4.0)) == 0
    assert status(tmp_path, document(4.0), document(3.93)) == 0  # within the floor
    assert status(tmp_path, document(4.0), document(3.8)) == 1
    assert "REGRESSED" in capsys.readouterr().out
    assert status(tmp_path, document(4.0), document(5.0)) == 0
    assert "improved" in capsys.readouterr().out
    # The same fall is no news when the measurements scatter by 40 %, and news with more runs.
    assert status(tmp_path, document(4.0, spread=0.4), document(3.8, spread=0.4)) == 0
    before, after = (document(ratio, spread=0.4, runs=10_000) for ratio in (4.0, 3.8))
    assert status(tmp_path, before, after) == 1


def test_compare_refuses_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = document(4.0)
    gone = copy.deepcopy(old)
    gone["rows"] = []
    assert status(tmp_path, old, gone) == 1
    assert "MISSING    a at 90 %" in capsys.readouterr().out
    for change in ({"threads": 2}, {"mode": "cold"}, {"schema": 9}):
        assert status(tmp_path, old, old | change) == 2
    other = copy.deepcopy(old)
    other["environment"]["cpu"] = "y"
    assert status(tmp_path, old, other) == 2
    assert "one machine (cpu), got 'x' and 'y'" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert compare.main([str(tmp_path / "broken.json"), str(tmp_path / "old.json")]) == 2
