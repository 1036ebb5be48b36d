"""Whole networks factorized to a latency target: `python bench/factorized_models.py --json FILE`.

VGG-16 and ResNet-50 with random weights, one 224x224 image: every convolution by one method and
every linear layer by SVD, the largest ranks measured to be twice as fast as the layer (`Latency`),
and once the ranks of variational Bayes, which on random weights are those of noise. Times are
interleaved: the dense network in its better memory format, the same through `accelerate`, the
factorized one as plain convolutions, and through `accelerate`, which fuses chains where that is
faster. What accuracy is left is not asked: random weights have no low rank.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.run import json_path, write_results
from sparsecnn import accelerate
from sparsecnn.factorize import Factorize, FactorizeReport, Latency, factorize_, kim
from sparsecnn.measure import time_interleaved
from tests.models import prepare_torchvision

MODELS = ("vgg16", "resnet50")
METHODS = ("tucker2", "vh", "cp", "kim")
TARGET = 2.0


def factorize_whole(model: nn.Module, x: Tensor, method: str) -> FactorizeReport:
    """Factorize a network in place, with a progress bar."""
    if method == "kim":
        return factorize_(model, kim(model, x), x, progress=True)
    config = {
        "_default": Factorize(method, Latency(TARGET)),
        "re:fc|classifier.*": Factorize("fc_svd", Latency(TARGET)),
    }
    return factorize_(model, config, x, progress=True)


def measure(name: str, console: Console, methods: Sequence[str]) -> list[dict[str, Any]]:
    """All methods on one architecture, timed together."""
    import torchvision

    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    networks: dict[str, nn.Module] = {"dense": dense, "dense accelerated": accelerate(dense, x)}
    reports: dict[str, tuple[FactorizeReport, float]] = {}
    for method in methods:
        model = copy.deepcopy(dense)
        begin = time.perf_counter()
        report = factorize_whole(model, x, method)
        reports[method] = (report, time.perf_counter() - begin)
        console.print(f"{name} {method}", highlight=False)
        console.print(str(report), highlight=False, soft_wrap=True)
        networks[method] = model
        networks[f"{method} accelerated"] = accelerate(model, x)
    fns: dict[str, Callable[[], object]] = {}
    for label, network in networks.items():
        layouts = [torch.contiguous_format]
        if "accelerated" not in label:
            layouts.append(torch.channels_last)
        for layout in layouts:
            placed = network
            if layout is torch.channels_last:
                placed = copy.deepcopy(network)
                placed.to(memory_format=layout)  # type: ignore[call-overload]
            data = x.contiguous(memory_format=layout)
            fns[f"{label}/{layout}"] = lambda m=placed, d=data: m(d)  # type: ignore[misc]
    stats = time_interleaved(fns, runs=25, warmup=3)
    best = {
        label: min(
            (s for key, s in stats.items() if key.split("/")[0] == label),
            key=lambda s: s.median_s,
        )
        for label in networks
    }
    rows = []
    for method in methods:
        report, seconds = reports[method]
        fast = best[f"{method} accelerated"]
        rows.append({
            "model": name,
            "method": method,
            "factorize_s": seconds,
            "factorized_layers": sum(not layer.reason for layer in report),
            "dense_layers": {layer.name: layer.reason for layer in report if layer.reason},
            "macs_ratio": report.dense_macs / report.macs,
            "params_ratio": report.dense_params / report.params,
            "dense_ms": best["dense"].median_s * 1e3,
            "dense_iqr_ms": best["dense"].iqr_s * 1e3,
            "dense_accelerated_ms": best["dense accelerated"].median_s * 1e3,
            "convs_ms": best[method].median_s * 1e3,
            "fast_ms": fast.median_s * 1e3,
            "fast_iqr_ms": fast.iqr_s * 1e3,
            "layers": report.to_dict()["layers"],
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Factorize, print the table and write the rows."""
    parser = argparse.ArgumentParser(prog="bench/factorized_models.py", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the results here")
    options = parser.parse_args(argv)
    if not prepare_torchvision():
        parser.error("expected torchvision to be installed; pip install torchvision")
    torch.set_num_threads(options.threads)
    console = Console(width=170)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows += measure(name, console, options.methods)
    table = Table(title=f"whole networks, one image, {options.threads} threads, ms")
    for heading in "model method MACs dense accelerated factorized accelerated speed s".split():
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["model"], row["method"], f"{row['macs_ratio']:.2f}x", f"{row['dense_ms']:.1f}",
            f"{row['dense_accelerated_ms']:.1f}", f"{row['convs_ms']:.1f}",
            f"{row['fast_ms']:.1f}", f"{row['dense_ms'] / row['fast_ms']:.2f}x",
            f"{row['factorize_s']:.0f}",
        )  # fmt: skip
    console.print(table)
    write_results(options.json, {
        "suite": "factorized_models",
        "threads": options.threads,
        "target": TARGET,
        "rows": rows,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
