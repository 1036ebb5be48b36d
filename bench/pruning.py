"""Every pruning method on real images: `python bench/pruning.py --seeds 3 --json FILE`.

Each method prunes a trained network of scikit-learn's digits (8x8), fine-tunes it where its paper
does, and is materialized. A row gives the accuracy on the test images before and after, the speed
of the materialized network against the dense one in its best layout, timed in turn at batch 64 (a
single 8x8 image is all call overhead), and the sizes of both as files. The test images choose
nothing: statistics, thresholds and searches see training and validation images only.

The masked and the materialized network must agree: logits within 1e-4, every label the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparsecnn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.digits_training import Context, accuracy_of, dense_networks
from bench.pruning_methods import METHODS, NETWORKS, Method
from bench.run import json_path, write_results
from sparsecnn.demo import compare_latency
from sparsecnn.measure import count_macs, model_size

MAX_DIFF = 1e-4
CANDIDATES = ("csr", "pattern", "depthwise", "pointwise", "chain")


def measure(method: Method, context: Context, batch: int) -> dict[str, Any]:
    """One method on one seed.

    Raises:
        AssertionError: the materialized network does not compute what the masked one does.
    """
    begin = time.perf_counter()
    dense = context.dense(method.network)
    masked = method.run(context).eval()
    images = context.data.test.tensors[0]
    # Dense Winograd kernels would speed up the dense network as well, and store four times the
    # weights: what the zeros are worth is what the other kernels make of them.
    fast = sparsecnn.materialize(masked, images[:batch], candidates=CANDIDATES)
    with torch.inference_mode():
        before, after = masked(images), fast(images)
    diff = float((before - after).abs().max())
    assert diff <= MAX_DIFF, f"{method.name}: logits differ by {diff:.3g}"
    assert torch.equal(before.argmax(1), after.argmax(1)), f"{method.name}: labels differ"
    stats, layout = compare_latency(dense, fast, images[:batch])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if method.save is None:
            sparsecnn.save(fast, path)
        else:
            method.save(masked, path)
        file_bytes = path.stat().st_size
    dense_macs = count_macs(dense, images[:1]).dense_macs
    dense_bytes = model_size(dense)["file_bytes"]
    return {
        "method": method.name,
        "network": method.network,
        "seed": context.seed,
        "accuracy_dense": accuracy_of(dense, context.data.test),
        "accuracy": accuracy_of(fast, context.data.test),
        "zeros": sparsecnn.sparsity(masked).element,
        "macs_share": count_macs(fast, images[:1]).effective_macs / dense_macs,
        "dense_us": stats[layout].median_s * 1e6,
        "fast_us": stats["accelerated"].median_s * 1e6,
        "fast_iqr_us": stats["accelerated"].iqr_s * 1e6,
        "dense_layout": layout,
        "dense_bytes": dense_bytes,
        "file_bytes": file_bytes,
        "logits_diff": diff,
        "kernels": sorted({layer.kernel for layer in fast.report.layers}),
        "seconds": time.perf_counter() - begin,
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, one row per method; the worst loss of accuracy beside the mean."""
    found = []
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method.name]
        if not mine:
            continue

        faster = [row["dense_us"] / row["fast_us"] for row in mine]
        smaller = [row["dense_bytes"] / row["file_bytes"] for row in mine]
        means = {
            name: statistics.fmean(row[name] for row in mine)
            for name in ("accuracy_dense", "accuracy", "zeros", "macs_share")
        }
        found.append({
            "method": method.name,
            "paper": method.paper,
            "network": method.network,
            **means,
            "worst_drop": max(r["accuracy_dense"] - r["accuracy"] for r in mine),
            "speedup": statistics.geometric_mean(faster),
            "size_ratio": statistics.geometric_mean(smaller),
        })  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the table; exit status 1 if a method loses more, or removes less, than it should."""
    parser = argparse.ArgumentParser(prog="bench/pruning.py", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (3)")
    parser.add_argument("--methods", nargs="*", choices=[m.name for m in METHODS])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=json_path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    chosen = [m for m in METHODS if not options.methods or m.name in options.methods]
    console = Console(width=140)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        context = Context(seed, dense_networks(NETWORKS, seed))
        for method in chosen:
            row = measure(method, context, options.batch)
            rows.append(row)
            console.print(
                f"seed {seed} {method.name}: {row['accuracy_dense']:.2%} > {row['accuracy']:.2%}, "
                f"{row['zeros']:.1%} zeros, {row['dense_us'] / row['fast_us']:.2f}x, "
                f"{row['seconds']:.0f} s", highlight=False,
            )  # fmt: skip
    means = summary(rows)
    title = f"pruning, digits 8x8, means of {options.seeds} seeds, batch {options.batch}"
    table = Table(title=title)
    for heading in "method paper net dense pruned worst zeros MACs speed size".split():
        table.add_column(heading)
    failed = []
    for row, method in zip(means, [m for m in METHODS if m in chosen], strict=True):
        table.add_row(
            row["method"], row["paper"], row["network"], f"{row['accuracy_dense']:.2%}",
            f"{row['accuracy']:.2%}", f"{-row['worst_drop'] * 100:+.1f}", f"{row['zeros']:.1%}",
            f"{row['macs_share']:.0%}", f"{row['speedup']:.2f}x", f"{row['size_ratio']:.1f}x",
        )  # fmt: skip
        drop = row["accuracy_dense"] - row["accuracy"]
        if drop > method.may_lose:
            failed.append(f"{method.name} lost {drop:.3f}, at most {method.may_lose} is allowed")
        if row["zeros"] < method.zeros - 0.005:
            failed.append(f"{method.name} has {row['zeros']:.1%} zeros, not {method.zeros:.0%}")
        if row["size_ratio"] < method.smaller:
            failed.append(f"{method.name}: {row['size_ratio']:.1f}x smaller, not {method.smaller}x")
        if row["macs_share"] > method.macs + 0.005:
            failed.append(f"{method.name} has {row['macs_share']:.1%} MACs, not {method.macs:.0%}")
    console.print(table)
    write_results(options.json, {
        "suite": "pruning",
        "threads": options.threads,
        "batch": options.batch,
        "summary": means,
        "rows": rows,
    })  # fmt: skip
    for line in failed:
        console.print(f"failed: {line}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
