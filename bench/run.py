"""Run a benchmark suite: `python bench/run.py SUITE --threads T --batch N --json FILE`.

Outputs are checked before anything is timed, competitors are timed in turn in one process, results
are medians with spreads. The last line printed is `geomean SUITE <ratio to the best dense layout>`
(the mean over all sparsities; one line per sparsity comes before it).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparsecnn

# As a script this file sees its own folder only; the suites are in the packages beside it. After
# the package itself, so that an installed one is not hidden by the sources.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import (
    suite_chain,
    suite_csr,
    suite_depthwise,
    suite_models,
    suite_pattern,
    suite_pointwise,
    suite_winograd,
)
from bench.suite import Settings, Suite
from bench.timing import MIN_RUNS, SETTLE, fma_roof_gflops, keep_memory
from sparsecnn.measure import environment

ROOT = Path(__file__).resolve().parents[1]
SUITES: dict[str, Suite] = {
    "chain": suite_chain,
    "csr": suite_csr,
    "depthwise": suite_depthwise,
    "models": suite_models,
    "pattern": suite_pattern,
    "pointwise": suite_pointwise,
    "winograd": suite_winograd,
}
# IQR over median beyond which a measurement says more about the neighbours than about the kernel.
NOISY = 0.25
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; usage errors exit with status 2."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the results here")
    parser.add_argument("--density", type=float, nargs="+", metavar="D", help="shares of nonzeros")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="cases of the suite")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--isa", choices=("scalar", "avx2", "avx512"))
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--cold", action="store_true", help="rotate buffers past the cache")
    parser.add_argument(
        "--unsettled",
        action="store_true",
        help="time right behind the rival, with the C library's own memory settings",
    )
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in dense CUDA kernels")
    parser.add_argument("--no-roof", action="store_true", help="do not measure the FMA roof")
    parser.add_argument("--quick", action="store_true", help="few cases, few sparsities, few runs")
    options = parser.parse_args(argv)
    known = SUITES[options.suite].NAMES
    for name in options.layers or ():
        if name not in known and options.suite != "models":  # any name of timm
            parser.error(f"expected --layers among {', '.join(known)}, got {name}")
    for density in options.density or ():
        if not 0 < density <= 1:
            parser.error(f"expected --density in (0, 1], got {density}")
    for label, value, least in (
        ("--threads", options.threads, 1),
        ("--batch", options.batch, 1),
        ("--runs", options.runs, MIN_RUNS),
    ):
        if value < least:
            parser.error(f"expected {label} >= {least}, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device for --device cuda, got none")
    short = options.dtype != "float32" and options.device == "cpu"
    if options.suite == "models" and (options.cold or short):
        parser.error("expected no --cold, and on the CPU no --dtype, with the suite models")
    return options


def commit() -> str | None:
    """The commit of the tree, with "+" when tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def json_path(text: str) -> Path:
    """The value of --json: refused before anything is measured if its folder does not exist."""
    path = Path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected --json in an existing folder, got {text}")
    return path


def write_results(path: Path | None, results: dict[str, Any]) -> None:
    """Write results with the commit and the machine they are of; None writes nothing."""
    if path is not None:
        document = {"commit": commit(), "environment": environment(), **results}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def geomean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers; NaN of none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def by_sparsity(rows: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Geometric mean of the headline ratio at each sparsity, in rising order."""
    return {
        sparsity: geomean(r["ratio"] for r in rows if r["sparsity"] == sparsity)
        for sparsity in sorted({r["sparsity"] for r in rows})
    }


def show(suite: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows as a table; losses as plainly as wins."""
    table = Table(title=f"{suite}: median ms, ratio = best dense / best of ours")
    names = list(rows[0]["ms"])
    table.add_column("case", no_wrap=True)
    table.add_column("sparsity", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for title in ("ratio", "true GF/s", "effective GF/s", "% of roof", "spread %"):
        table.add_column(title, justify="right")
    for r in rows:
        numbers = []
        for key, digits in (("gflops", 1), ("effective_gflops", 1), ("roof_share", 0)):
            value = r.get(key)
            scale = 100 if key == "roof_share" else 1
            numbers.append("-" if value is None else f"{scale * value:.{digits}f}")
        style = "green" if r["ratio"] > 1 else "red"
        table.add_row(
            r["label"],
            f"{100 * r['sparsity']:.0f}",
            *(f"{r['ms'][name]:.3f}" for name in names),
            f"[{style}]{r['ratio']:.2f}[/]",
            *numbers,
            f"{100 * max(r['spread'].values()):.0f}",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite; returns the exit status."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    kept = not options.unsettled and keep_memory()
    if options.isa:
        sparsecnn.set_isa(options.isa)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        torch.backends.cudnn.allow_tf32 = options.tf32
    roof = None
    if options.device == "cpu" and options.suite != "models" and not options.no_roof:
        roof = fma_roof_gflops(options.threads)

    suite = SUITES[options.suite]
    results = suite.rows(
        Settings(
            names=options.layers or (suite.QUICK if options.quick else suite.NAMES),
            densities=options.density
            or (suite.QUICK_DENSITIES if options.quick else suite.DENSITIES),
            batch=options.batch,
            device=options.device,
            dtype=DTYPES[options.dtype],
            cold=options.cold,
            settle=0 if options.unsettled else SETTLE,
            runs=MIN_RUNS if options.quick else options.runs,
            max_time_s=10.0 if options.quick else 60.0,
            roof_gflops=roof,
        )
    )
    rows = []
    progress = Console(stderr=True)
    for row in results:
        rows.append(row)
        progress.print(
            f"{row['case']} {100 * row['sparsity']:.0f} %: {row['ms'][row['best']]:.3f} ms, "
            f"{row['ratio']:.2f}x {row['best_dense']}",
            highlight=False,
        )
    # Without a terminal the table gets the width it needs instead of 80 columns.
    show(options.suite, rows, Console() if sys.stdout.isatty() else Console(width=170))
    noisy = [r for r in rows if max(r["spread"].values()) > NOISY]
    if noisy:
        print(
            f"noisy: {len(noisy)} of {len(rows)} rows scatter by more than {100 * NOISY:.0f} %: "
            "the machine is busy, do not quote these numbers"
        )
    means = by_sparsity(rows)
    overall = geomean(r["ratio"] for r in rows)
    write_results(options.json, {
        "schema": 1,
        "suite": options.suite,
        "mode": "cold" if options.cold else "unsettled" if options.unsettled else "warm",
        "threads": options.threads,
        "batch": options.batch,
        "device": options.device,
        "dtype": options.dtype,
        "tf32": options.tf32 if options.device == "cuda" else None,
        "freed_memory_kept": kept,
        "roof_gflops": roof,
        "geomean": {f"{s:g}": v for s, v in means.items()},
        "geomean_all": overall,
        "rows": rows,
    })  # fmt: skip
    if roof is not None:
        print(f"roof {roof:.1f} GFLOP/s, {options.threads} threads")
    for sparsity, mean in means.items():
        print(f"geomean {options.suite} at {100 * sparsity:.0f} % {mean:.3f}")
    print(f"geomean {options.suite} {overall:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
