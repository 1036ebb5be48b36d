"""Which architectures can lose 30 % of their filters: `python bench/channels.py --json FILE`.

Every network has random weights: what is asked is whether the couplings are found and the removal
proven, not what accuracy stays. A refusal is a row with its reason. With `--rounding` it times what
multiples of `round_to` are worth instead.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

# As a script this file sees its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.run import json_path, write_results
from sparsecnn.measure import count_macs, time_interleaved
from sparsecnn.prune import Magnitude
from sparsecnn.prune.channels import prune_channels_
from tests.models import prepare_torchvision

SPARSITY = 0.3
ROUNDINGS = (1, 8, 16)
ROUNDED = ("resnet18", "resnet50", "vgg11", "mobilenet_v2")
TORCHVISION = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11 vgg16_bn densenet121 mobilenet_v2 "
    "mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s inception_v3 "
    "inception_v3+aux googlenet googlenet+aux squeezenet1_0 squeezenet1_1 shufflenet_v2_x0_5 "
    "mnasnet0_5 regnet_x_400mf regnet_y_400mf convnext_tiny"
).split()
TIMM = (
    "resnet18 resnext50_32x4d seresnet50 wide_resnet50_2 vgg11_bn densenet121 mobilenetv2_050 "
    "mobilenetv3_small_050 efficientnet_b0 mnasnet_small regnetx_002 regnety_002 convnext_atto "
    "inception_v3 ghostnet_100 repvgg_a0"
).split()
# Sides of images; less leaves nothing behind the poolings of Inception, and of its training head.
SIDES = {"inception_v3": 75, "inception_v3+aux": 299}


def build(source: str, name: str) -> nn.Module:
    """One network with random weights; "+aux" keeps the heads that only training runs.

    Args:
        source: "torchvision" or "timm".
        name: of the architecture there.
    """
    torch.manual_seed(0)
    if source == "timm":
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False)
        return model
    import torchvision

    name, _, aux = name.partition("+")
    options = {}
    if name in ("inception_v3", "googlenet"):
        options = {"init_weights": False, "aux_logits": bool(aux)}
    model = torchvision.models.get_model(name, weights=None, **options)
    return model


def awaken_(model: nn.Module, x: Tensor) -> None:
    """Let every branch count, in place: one that adds nothing may lose anything unnoticed.

    Scales that start at or near zero (the last norm of a residual branch, layer scales) become
    one; batch norms get the statistics of random images, without which deep networks explode.

    Args:
        model: with fresh weights.
        x: of the shape of one image.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and parameter.abs().max() < 1e-3:
            nn.init.ones_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all batches
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(4, *x.shape[1:]))
    model.eval()


def logits(output: Any) -> Tensor:
    """The class scores, also of a network with auxiliary heads in training mode."""
    return output if isinstance(output, Tensor) else output[0]


def sweep_one(source: str, name: str) -> dict[str, Any]:
    """Prune one architecture, then run it in evaluation and in training mode.

    Args:
        source: "torchvision" or "timm".
        name: of the architecture there.

    Returns:
        "reason" is None if all went well; otherwise it says what did not.
    """
    row: dict[str, Any] = {"source": source, "architecture": name, "reason": None}
    try:
        model = build(source, name)
        side = SIDES.get(name, 64)
        x = torch.randn(1, 3, side, side)
        awaken_(model, x)
        with torch.no_grad():
            shape = logits(model(x)).shape
        before = sum(p.numel() for p in model.parameters())
        row["params"] = [before, before]
        start = time.perf_counter()
        _, report = prune_channels_(model, x, Magnitude(sparsity=SPARSITY, granularity="filter"))
        row["seconds"] = time.perf_counter() - start
        after = sum(p.numel() for p in model.parameters())
        row |= {"params": [before, after], "kept": report.kept, "layers": len(report.layers)}
        with torch.no_grad():
            small = logits(model.eval()(x)).shape
            training = logits(model.train()(torch.cat([x, x]))).shape
        if small != shape or training != (2, *shape[1:]):
            row["reason"] = f"outputs of shape {tuple(small)}, {tuple(training)}"
        elif after >= before:
            row["reason"] = "no parameter less than before"
    except Exception as error:  # a row of the table, whatever a network stumbles over
        row["reason"] = f"{type(error).__name__}: {error}"
    return row


def measure_rounding(name: str) -> dict[str, Any]:
    """Time a network pruned with several values of `round_to`, interleaved, for one image.

    Args:
        name: of a torchvision architecture.
    """
    x = torch.randn(1, 3, 224, 224)
    models: dict[str, nn.Module] = {}
    for rounded in ROUNDINGS:
        torch.manual_seed(0)
        model = build("torchvision", name).eval()
        if not models:
            models["dense"] = copy.deepcopy(model)
        config = Magnitude(sparsity=SPARSITY, granularity="filter")
        prune_channels_(model, x, config, round_to=rounded)
        models[str(rounded)] = model
    placed = {}
    for label, model in models.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            network = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
            data = x.contiguous(memory_format=layout)
            placed[f"{label} {layout}"] = lambda m=network, d=data: m(d)  # type: ignore[misc]
    stats = time_interleaved(placed, runs=40, warmup=5)
    found: dict[str, Any] = {"architecture": name}
    for label, model in models.items():
        mine = [value for key, value in stats.items() if key.split()[0] == label]
        best = min(mine, key=lambda value: value.median_s)
        found[label] = {
            "ms": best.median_s * 1e3,
            "iqr_ms": best.iqr_s * 1e3,
            "macs": count_macs(model, x).dense_macs,
        }
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal.

    Args:
        rows: of `sweep_one`.
    """
    found = Table("source", "architecture", "params", "left", "layers", "kept", "seconds", "result")
    for row in rows:
        before, after = row.get("params", (0, 0))
        found.add_row(
            row["source"],
            row["architecture"],
            f"{before / 1e6:.2f} M",
            f"{after / before:.0%}" if before else "",
            str(row.get("layers", "")),
            str(len(row.get("kept", ()))),
            f"{row['seconds']:.1f}" if "seconds" in row else "",
            row["reason"] or "ok",
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, print the table and write the rows.

    Args:
        argv: arguments instead of those of the process.
    """
    parser = argparse.ArgumentParser(prog="bench/channels.py", description=__doc__)
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the results here")
    parser.add_argument(
        "--rounding", action="store_true", help="time values of round_to instead of the sweep"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures")
    options = parser.parse_args(argv)
    if not prepare_torchvision():
        parser.error("expected torchvision and timm to be installed, got none; pip install timm")
    jobs = [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM]
    rows = []
    if options.rounding:
        torch.set_num_threads(1)
        jobs = []
        for name in options.only or ROUNDED:
            rows.append(measure_rounding(name))
            print(json.dumps(rows[-1]), flush=True)
    for source, name in jobs:
        if options.only and name not in options.only:
            continue
        rows.append(sweep_one(source, name))
        print(f"{source} {name}: {rows[-1]['reason'] or 'ok'}", flush=True)
        gc.collect()  # graphs of the tracer hold their networks in cycles
    if not options.rounding:
        Console(width=160).print(table(rows))
    write_results(options.json, {
        "suite": "rounding" if options.rounding else "channels",
        "settings": {"sparsity": SPARSITY, "importance": "magnitude"},
        "rows": rows,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
