"""Every factorization on real images: `python bench/factorization.py --seeds 3 --json FILE`.

Each method factorizes a trained network of scikit-learn's digits at two and at four times fewer
MACs per layer, then fine-tunes it. A row gives the accuracy on the test images of the dense
network, before and after fine-tuning, the MACs, and measured times at batch 64, one thread, the
dense network in its better memory format and interleaved: of the network as its convolutions one
after the other, and with its chains as one kernel each. The test images choose nothing.

MACs of methods with few steps, and of layers without gain, may lie off the target: the table says.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.digits_training import BATCH, Context, accuracy_of, dense_networks, fit
from bench.run import json_path, write_results
from sparsecnn.factorize import (
    FCSVD,
    ChannelSVD,
    Denil,
    Factorize,
    Mahalanobis,
    PCAEnergyGlobal,
    TargetSpeedup,
    Zhang,
    collect_gradients,
    compact_maps_,
    factorize_,
    kim,
)
from sparsecnn.measure import count_macs, time_interleaved
from sparsecnn.nn import FactorizedConv2d

TUNING = 10
TUNING_RATE = 0.01
GRADIENTS = 600
"""Training images whose gradients are taken one by one."""


class WideDigitsNet(nn.Sequential):
    """3x3 convolutions of 32, 64 and 64 filters for 8x8 images: wide enough for ranks."""

    def __init__(self) -> None:
        def block(c_in: int, c_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        super().__init__(
            *block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"wide": WideDigitsNet}
INNER = ("3", "7")
"""The convolutions that are factorized: the first one has one input channel."""


@dataclass(frozen=True)
class Job:
    """A row of the table.

    Attributes:
        name: of the method.
        run: `run(context, model, speedup)` factorizes in place.
        rate: of the fine-tuning.
        speedups: targets.
        may_lose: accuracy that the mean over the seeds may lose after fine-tuning.
    """

    name: str
    run: Callable[[Context, nn.Module, float], None]
    rate: float = TUNING_RATE
    speedups: tuple[float, ...] = (2.0, 4.0)
    may_lose: float = 0.02


def calibration(context: Context) -> list[Tensor]:
    """Training images without labels."""
    return list(context.data.train.tensors[0].split(BATCH))


def plain(method: Any, **options: Any) -> Callable[[Context, nn.Module, float], None]:
    """The inner convolutions by one method, at a common speed-up; batch norms estimated anew."""

    def run(context: Context, model: nn.Module, speedup: float) -> None:
        config = {name: Factorize(method, TargetSpeedup(speedup)) for name in INNER}
        factorize_(
            model, config, calibration(context)[0], calibration(context), measure=False, **options
        )

    return run


def layerwise(method: str) -> Callable[[Context, nn.Module, float], None]:
    """One layer after the other, the whole network trained in between (Astrid & Lee 2017)."""

    def run(context: Context, model: nn.Module, speedup: float) -> None:
        def finetune(network: nn.Module, name: str) -> None:
            if name != INNER[-1]:
                fit(network, context.data, context.seed + 50, 3, rate=TUNING_RATE / 2)

        plain(method, order="layerwise", finetune=finetune)(context, model, speedup)

    return run


def _linear(context: Context, model: nn.Module, speedup: float) -> None:
    config = {"12": Factorize("fc_svd", TargetSpeedup(speedup))}
    factorize_(model, config, calibration(context)[0], measure=False)


def _linear_cov(context: Context, model: nn.Module, speedup: float) -> None:
    config = {"12": Factorize(FCSVD(metric="cov"), TargetSpeedup(speedup))}
    factorize_(model, config, calibration(context)[0], calibration(context), measure=False)


def _mahalanobis(context: Context, model: nn.Module, speedup: float) -> None:
    labelled = [tuple(part[:GRADIENTS] for part in context.data.train.tensors)]
    gradients = collect_gradients(model, INNER, labelled)
    plain(Mahalanobis("channel_svd"), gradients=gradients)(context, model, speedup)


def _global(context: Context, model: nn.Module, speedup: float) -> None:
    rank = PCAEnergyGlobal(speedup)
    config = {name: Factorize(Zhang(), rank) for name in INNER}
    x = calibration(context)
    factorize_(model, config, x[0], x, order="layerwise", measure=False)


def _kim(context: Context, model: nn.Module, speedup: float) -> None:
    x = calibration(context)
    factorize_(model, kim(model, x[0]), x[0], x, measure=False)


def _circulant(context: Context, model: nn.Module, speedup: float) -> None:
    # The weights of both layers shrink by k / d; no pooling may stand between them.
    compact_maps_(model, "0", "3", round(32 / speedup), calibration(context))


JOBS = (
    Job("channel_svd", plain("channel_svd")),
    Job("channel_svd, cov", plain(ChannelSVD(metric="cov"))),
    Job("channel_svd, mahalanobis", _mahalanobis),
    Job("tucker2", plain("tucker2")),
    Job("tucker4", plain("tucker4")),
    Job("vh", plain("vh")),
    Job("cp", plain("cp"), TUNING_RATE / 2),
    Job("cp_nls", plain("cp_nls"), TUNING_RATE / 2),
    Job("cp_tpm, layerwise", layerwise("cp_tpm"), TUNING_RATE / 2),
    Job("jaderberg1", plain("jaderberg1")),
    Job("jaderberg2, data", plain("jaderberg2", order="layerwise", reconstruct=100)),
    Job("rigamonti", plain("rigamonti")),
    Job("dct", plain("dct")),
    Job("denil", plain("denil")),
    Job("denil, across channels", plain(Denil("covariance", across_channels=True))),
    Job("zhang", plain("zhang", order="layerwise")),
    Job("zhang, PCA energy", _global),
    Job("mono", plain("mono")),
    Job("bicluster_outer", plain("bicluster_outer")),
    Job("bicluster_svd", plain("bicluster_svd")),
    Job("circulant", _circulant),
    Job("fc_svd", _linear),
    Job("fc_svd, cov", _linear_cov),
    # Variational Bayes takes layers as small as these for noise: rank 1 of 9 in the first one.
    Job("kim", _kim, speedups=(0.0,), may_lose=1.0),
)


def fused(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy whose chains are one kernel each where there is one, and how many are."""
    copied = copy.deepcopy(model)
    done = 0
    for name, module in list(copied.named_modules()):
        if isinstance(module, FactorizedConv2d):
            try:
                copied.set_submodule(name, module.to_chain())
                done += 1
            except NotImplementedError:
                continue
    return copied.eval(), done


def measure(job: Job, context: Context, speedup: float) -> dict[str, Any]:
    """One method at one target on one seed."""
    begin = time.perf_counter()
    dense = context.dense("wide")
    model = context.dense("wide")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        job.run(context, model, speedup)
    seconds = time.perf_counter() - begin
    before = accuracy_of(model.eval(), context.data.test)
    fit(model, context.data, context.seed + 100, TUNING, rate=job.rate)
    x = context.data.test.tensors[0][:BATCH]
    chains, count = fused(model)
    fns: dict[str, Callable[[], object]] = {}
    for label, network in (("dense", dense), ("convs", model), ("chain", chains)):
        for layout in (torch.contiguous_format, torch.channels_last):
            placed = copy.deepcopy(network).to(memory_format=layout)  # type: ignore[call-overload]
            data = x.contiguous(memory_format=layout)
            fns[f"{label} {layout}"] = lambda m=placed, d=data: m(d)  # type: ignore[misc]
    stats = time_interleaved(fns, runs=60, warmup=5)
    best = {
        label: min(
            (s for name, s in stats.items() if name.startswith(label)), key=lambda s: s.median_s
        )
        for label in ("dense", "convs", "chain")
    }
    return {
        "method": job.name,
        "target": speedup,
        "seed": context.seed,
        "accuracy_dense": accuracy_of(dense, context.data.test),
        "accuracy_before": before,
        "accuracy": accuracy_of(model, context.data.test),
        "macs_ratio": count_macs(dense, x[:1]).dense_macs / count_macs(model, x[:1]).dense_macs,
        "chains": count,
        "factorize_s": seconds,
        **{f"{label}_us": s.median_s * 1e6 for label, s in best.items()},
        **{f"{label}_iqr_us": s.iqr_s * 1e6 for label, s in best.items()},
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds."""
    found = []
    for key in dict.fromkeys((row["method"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["target"]) == key]
        means = {
            name: statistics.fmean(row[name] for row in mine)
            for name in ("accuracy_dense", "accuracy_before", "accuracy", "macs_ratio")
        }
        speed = {
            label: statistics.geometric_mean(row["dense_us"] / row[f"{label}_us"] for row in mine)
            for label in ("convs", "chain")
        }
        found.append({"method": key[0], "target": key[1], **means, **speed,
                      "chains": mine[0]["chains"]})  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the table; exit status 1 if a method loses more than it may after fine-tuning."""
    parser = argparse.ArgumentParser(prog="bench/factorization.py", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (3)")
    parser.add_argument("--methods", nargs="*", choices=[job.name for job in JOBS])
    parser.add_argument("--json", type=json_path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(width=140)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        context = Context(seed, dense_networks(NETWORKS, seed))
        for job in JOBS:
            if options.methods and job.name not in options.methods:
                continue
            for speedup in job.speedups:
                row = measure(job, context, speedup)
                rows.append(row)
                console.print(
                    f"seed {seed} {job.name} {speedup:g}x: {row['accuracy_dense']:.2%} > "
                    f"{row['accuracy_before']:.2%} > {row['accuracy']:.2%}, MACs "
                    f"{row['macs_ratio']:.2f}x, convs {row['dense_us'] / row['convs_us']:.2f}x, "
                    f"chain {row['dense_us'] / row['chain_us']:.2f}x, {row['factorize_s']:.1f} s",
                    highlight=False,
                )  # fmt: skip
    means = summary(rows)
    table = Table(title=f"factorization, digits 8x8, means of {options.seeds} seeds, batch {BATCH}")
    for heading in "method target dense before after MACs convs chain".split():
        table.add_column(heading)
    failed = []
    for row in means:
        table.add_row(
            row["method"], f"{row['target']:g}x" if row["target"] else "own",
            f"{row['accuracy_dense']:.2%}", f"{row['accuracy_before']:.2%}",
            f"{row['accuracy']:.2%}", f"{row['macs_ratio']:.2f}x", f"{row['convs']:.2f}x",
            f"{row['chain']:.2f}x" if row["chains"] else "-",
        )  # fmt: skip
        allowed = next(job.may_lose for job in JOBS if job.name == row["method"])
        if row["accuracy_dense"] - row["accuracy"] > allowed:
            failed.append(f"{row['method']} at {row['target']:g}x lost more than {allowed:.0%}")
    console.print(table)
    write_results(options.json, {
        "suite": "factorization",
        "threads": 1,
        "batch": BATCH,
        "summary": means,
        "rows": rows,
    })  # fmt: skip
    for line in failed:
        console.print(f"failed: {line}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
