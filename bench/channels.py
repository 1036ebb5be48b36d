"""Which architectures can lose 30 % of their filters: `python -m bench.channels OUTPUT.json`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsecnn.measure import count_macs
from sparsecnn.prune import Magnitude
from sparsecnn.prune.channels import prune_channels_
from tests.models import prepare_torchvision

NAMES = (
    "resnet18 resnet34 resnet50 resnet101 resnext50_32x4d resnext101_32x8d wide_resnet50_2 "
    "wide_resnet101_2 vgg11 vgg16_bn vgg19 densenet121 densenet169 mobilenet_v2 "
    "mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b3 efficientnet_v2_s "
    "inception_v3 googlenet squeezenet1_0 squeezenet1_1 shufflenet_v2_x0_5 shufflenet_v2_x1_0 "
    "mnasnet0_5 mnasnet1_0 regnet_x_400mf regnet_y_400mf regnet_y_1_6gf convnext_tiny"
).split()


def sweep_one(name: str) -> dict[str, Any]:
    """Prune one torchvision architecture with random weights and run it in both modes."""
    import torchvision

    torch.manual_seed(0)
    options = {"init_weights": True} if name in ("inception_v3", "googlenet") else {}
    row: dict[str, Any] = {"architecture": name, "reason": None}
    start = time.perf_counter()
    try:
        model = torchvision.models.get_model(name, weights=None, **options)
        size = 299 if name == "inception_v3" else 224
        x = torch.randn(2, 3, size, size)
        before = count_macs(model, x)
        start = time.perf_counter()
        _, report = prune_channels_(model, x, Magnitude(sparsity=0.3))
        row["seconds"] = time.perf_counter() - start
        after = count_macs(model, x)
        row |= {"params": [before.params, after.params], "kept": report.kept}
        row |= {"macs": [before.dense_macs, after.dense_macs]}
        with torch.no_grad():
            if model.eval()(x).shape != (2, 1000) or after.params >= before.params:
                row["reason"] = "the output's shape changed or nothing shrank"
            model.train()(x)
    except (ValueError, RuntimeError) as error:
        row["reason"] = str(error)
        row.setdefault("seconds", time.perf_counter() - start)
    return row


def main() -> None:
    """Write one JSON file with a row per architecture."""
    if not prepare_torchvision():
        raise SystemExit("channels: expected torchvision that fits this torch, got none")
    rows = []
    for name in NAMES:
        rows.append(sweep_one(name))
        print(name, rows[-1]["reason"] or "ok", flush=True)
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
