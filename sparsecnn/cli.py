"""The command line: `sparsecnn demo | doctor | profile | bench | sensitivity`.

Exit status: 0 for success; 1 when a job failed its own check; 2, with one line on the standard
error stream and no traceback, for bad arguments, files or models.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from sparsecnn import __version__
from sparsecnn._cli_doctor import examine_model, examine_tensors
from sparsecnn._cli_models import HELP, CliError, first_pass, open_model, open_source
from sparsecnn._cli_profile import profile, profile_table
from sparsecnn._cli_sensitivity import examine, open_data
from sparsecnn._cli_types import device, positive, seed, shape, shares, sparsity
from sparsecnn.accelerate import accelerate
from sparsecnn.demo import ReloadError, Settings, compare_latency, run
from sparsecnn.measure import Report
from sparsecnn.prune import Random, prune_

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from sparsecnn.demo import Result

ARCH_HELP = "architecture of a checkpoint file: torchvision:NAME, timm:NAME or module.path:factory"


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line; the usage itself is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status, see the module.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the error
        return stop.code if isinstance(stop.code, int) else 2
    what = f"sparsecnn {options.command}"
    try:
        job: Callable[[argparse.Namespace], int] = options.job
        return job(options)
    except (CliError, ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        # The library checks its arguments and says in one sentence what is wrong with them.
        print(f"{what}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{what}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sparsecnn", description="Make a trained CNN smaller and faster.")
    parser.add_argument("--version", action="version", version=f"sparsecnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train, prune, fine-tune, accelerate and report on real digits",
        description="Train a ResNet-20 on scikit-learn's digits, prune it gradually, fine-tune, "
        "accelerate, save, reload in a fresh process and report. About two minutes on two cores.",
    )
    demo.set_defaults(job=_demo)
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder (%(default)s)")
    demo.add_argument("--epochs", type=positive, metavar="N", help="dense training (4)")
    demo.add_argument("--finetune-epochs", type=positive, metavar="N", help="after it (6)")
    demo.add_argument(
        "--sparsity", type=sparsity, default=0.9, help="share of zeros (%(default)s)"
    )
    demo.add_argument("--seed", type=seed, default=0, help="of everything random (%(default)s)")
    _add_machine(demo, 1, "of the measurements; training uses all cores (%(default)s)")
    # For the tests: seconds instead of minutes, and no promise about accuracy.
    demo.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)

    doctor = commands.add_parser(
        "doctor",
        help="why is my pruned model not faster? one verdict per layer",
        description="Judge every layer of a pruned model: how its zeros lie, which kernel applies, "
        "what it gains. Measured if the architecture is known, else by density.",
    )
    doctor.set_defaults(job=_doctor)
    _add_model(doctor)

    profiler = commands.add_parser(
        "profile",
        help="MACs, parameters, bytes, latency, throughput, memory, energy",
        description="Count and measure one forward pass.",
    )
    profiler.set_defaults(job=_profile)
    _add_model(profiler)
    profiler.add_argument("--runs", type=positive, default=50, help="timed passes (%(default)s)")

    bench = commands.add_parser(
        "bench",
        help="how much faster a model gets at a sparsity",
        description="Zero a random share of a model's convolutions, accelerate it and report: the "
        "speed of a sparsity before anything is trained. Single layers are benchmarked by "
        "bench/run.py in the source tree.",
    )
    bench.set_defaults(job=_bench)
    _add_model(bench)
    bench.add_argument(
        "--sparsity", type=sparsity, default=0.9, help="share of zeros (%(default)s)"
    )
    bench.add_argument("--batch", type=positive, metavar="N", help="instead of that of --input")
    bench.add_argument("--seed", type=seed, default=0, help="of the zeros (%(default)s)")
    bench.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")

    sensitive = commands.add_parser(
        "sensitivity",
        help="how much accuracy each layer costs at each sparsity",
        description="Prune one layer at a time, without training, and evaluate: which layers can "
        "lose much, which nothing.",
    )
    sensitive.set_defaults(job=_sensitivity)
    _add_model(sensitive)
    sensitive.add_argument(
        "--data", required=True, metavar="DATA", help="digits, or module.path:factory, called "
        "without arguments, which returns batches (images, labels)",
    )  # fmt: skip
    sensitive.add_argument(
        "--granularity", default="element", help="element, kernel, filter, ... (%(default)s)"
    )
    sensitive.add_argument(
        "--sparsities", type=shares, metavar="S,S,...", help="to try (0.3,0.5,0.7,0.8,0.9,0.95)"
    )
    sensitive.add_argument("--svg", type=Path, metavar="FILE", help="write the curves as an image")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("--arch", metavar="ARCH", help=ARCH_HELP)
    parser.add_argument(
        "--input",
        type=shape,
        default=(1, 3, 224, 224),
        metavar="N,C,H,W",
        help="shape of the input (1,3,224,224)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    _add_machine(parser, None, "of PyTorch (its default)")


def _add_machine(parser: argparse.ArgumentParser, threads: int | None, text: str) -> None:
    parser.add_argument("--threads", type=positive, default=threads, metavar="N", help=text)
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")


def _demo(options: argparse.Namespace) -> int:
    settings = Settings(
        out=options.out,
        sparsity=options.sparsity,
        seed=options.seed,
        threads=options.threads,
        device=options.device,
        quick=options.quick,
    )
    if options.quick:
        settings = replace(settings, width=8, epochs=1, finetune_epochs=2)
    settings = replace(
        settings,
        epochs=options.epochs or settings.epochs,
        finetune_epochs=options.finetune_epochs or settings.finetune_epochs,
    )
    if settings.out.exists() and not settings.out.is_dir():
        raise CliError(f"expected --out to be a folder, got the file {settings.out}")
    out = _console()
    try:
        with _progress() as progress:
            result, report = run(settings, progress)
    except ReloadError as error:
        print(f"sparsecnn demo: failed: {error}", file=sys.stderr)
        return 1
    out.print(report)
    out.print(_summary(result, settings.out))
    failed = result.failures()
    for failure in failed:
        print(f"sparsecnn demo: failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def _summary(result: Result, folder: Path) -> Any:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    same = "bit for bit" if result.reload_bitwise else f"up to {result.reload_diff:.2g}"
    checked = "not checked in a quick run" if result.quick else f"{-result.drop * 100:+.2f} points"
    names = ", ".join(("report.html", "report.json", "summary.json", "model.safetensors"))
    rows = (
        (
            "accuracy",
            f"{result.accuracy_dense:.2%} dense -> {result.accuracy_sparse:.2%} at "
            f"{result.sparsity:.1%} zeros ({checked}, {result.images} test images)",
        ),
        (
            "latency",
            f"{result.dense_p50_ms:.2f} ms dense ({result.dense_layout}) -> "
            f"{result.fast_p50_ms:.2f} ms ({result.speedup:.2f}x; batch 1, {result.threads} "
            "thread(s), medians)",
        ),
        (
            "size",
            f"{result.dense_bytes:,} -> {result.file_bytes:,} bytes "
            f"({result.dense_bytes / result.file_bytes:.1f}x smaller)",
        ),
        ("reloaded", f"by a fresh process: logits on the test set equal {same}"),
        ("written", f"{folder}{os.sep}: {names}"),
        ("took", f"{result.seconds:.0f} s"),
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(Text(label), Text(value))
    good = not result.failures()
    return Panel(
        grid, title="demo", border_style="green" if good else "red", expand=False, padding=(0, 1)
    )


def _doctor(options: argparse.Namespace) -> int:
    _check_outputs(options.json)
    source = open_source(options.model, options.arch)
    if source.model is None:
        diagnosis = examine_tensors(source.name, source.tensors)
    else:
        model, x = _ready(source.model, options)
        diagnosis = examine_model(source.name, model, x, progress=True)
    out = _console()
    out.print(diagnosis.table())
    for line in diagnosis.advice:
        out.print(f"- {line}", markup=False, highlight=False)
    _write_json(options.json, diagnosis.to_dict())
    return 0


def _profile(options: argparse.Namespace) -> int:
    _check_outputs(options.json)
    name, model = open_model(options.model, options.arch)
    model, x = _ready(model, options)
    with _progress() as progress:
        task = progress.add_task("profile", total=5)

        def step(part: str) -> None:
            progress.update(task, advance=0 if part == "count MACs" else 1, description=part)

        figures = profile(name, model, x, options.runs, step)
        progress.update(task, completed=5, description="profile")
    _console().print(profile_table(figures))
    _write_json(options.json, figures)
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    _check_outputs(options.json, options.svg)
    data = open_data(options.data, options.input)
    _, model = open_model(options.model, options.arch)
    model, _ = _ready(model, options)
    found = examine(model, data, options.granularity, options.sparsities)
    _console().print(found)
    _write_json(options.json, found.to_dict())
    if options.svg is not None:
        options.svg.write_text(found.to_svg(), encoding="utf-8")
    return 0


def _bench(options: argparse.Namespace) -> int:
    _check_outputs(options.json, options.html)
    if options.batch is not None:
        options.input = (options.batch, *options.input[1:])
    _, model = open_model(options.model, options.arch)
    model, x = _ready(model, options)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    # The first convolution is small and feeds everything; depthwise ones have nothing to skip.
    chosen = {m for m in convolutions[1:] if m.groups == 1}
    if not chosen:
        raise CliError("expected MODEL with at least two ungrouped convolutions, got fewer")
    if options.sparsity > 0:
        zeros = Random(sparsity=options.sparsity, seed=options.seed)
        prune_(model, zeros, lambda module, name: module in chosen)
    fast = accelerate(model, x, progress=True)
    report = fast.report
    assert isinstance(report, Report)
    stats, layout = compare_latency(model, fast, x)
    dense, quick = stats[layout].median_s * 1e3, stats["accelerated"].median_s * 1e3
    report.notes.append(
        f"{options.sparsity:.0%} random zeros in {len(chosen)} of {len(convolutions)} "
        f"convolutions; dense eager in its best layout ({layout}) {dense:.3g} ms, "
        f"accelerated {quick:.3g} ms: {dense / quick:.2f}x"
    )
    _console().print(report)
    if options.json is not None:
        report.to_json(options.json)
    if options.html is not None:
        report.to_html(options.html)
    return 0


def _ready(model: nn.Module, options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model and a seeded input on the device, known to run."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = model.eval().to(options.device)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.randn(options.input, generator=torch.Generator().manual_seed(0))
    x = x.to(options.device, dtype)
    first_pass(model, lambda: model(x), ",".join(map(str, options.input)))
    return model, x


def _check_outputs(*paths: Path | None) -> None:
    """Refuse before minutes of work what could not be written after them."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise CliError(f"expected a file in an existing folder, got {path}")


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _console() -> Console:
    from rich.console import Console

    # A pipe or a file has no width; 80 columns would fold every cell of the tables.
    wide = None if sys.stdout.isatty() else 140
    return Console(width=wide)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
