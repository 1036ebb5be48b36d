"""Small networks and reports that the tests of sparsecnn.measure share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecnn.measure import LayerReport, ModelTiming, Report


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def digits_net(width: int = 32) -> nn.Sequential:
    """The 8x8 digits network; `width` is the number of filters of its last two convolutions."""
    return nn.Sequential(
        conv_block(1, width // 2),
        conv_block(width // 2, width),
        nn.MaxPool2d(2),
        conv_block(width, width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class SparseLinear(nn.Module):
    """A sparse layer as the counters see one: `nnz`, `weight_shape`, and an uncounted operator."""

    is_sparsecnn_layer = True

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        weight = dense.weight.detach()
        self.weight_shape = tuple(weight.shape)
        self.values = nn.Parameter(weight[weight != 0])
        self.register_buffer("index", weight.flatten().nonzero().flatten())
        self.bias = nn.Parameter(dense.bias.detach().clone())

    @property
    def nnz(self) -> int:
        return self.values.numel()

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.zeros(self.weight_shape).flatten().index_put((self.index,), self.values)
        # Elementwise product and sum: no operator that FlopCounterMode has a formula for.
        return (x.unsqueeze(1) * weight.view(self.weight_shape)).sum(-1) + self.bias


def layer_report(name: str, **changes: object) -> LayerReport:
    fields: dict[str, object] = {
        "name": name,
        "type": "Conv2d",
        "input_shape": (1, 16, 8, 8),
        "output_shape": (1, 32, 8, 8),
        "weight_shape": (32, 16, 3, 3),
        "density": 0.25,
        "macs": 294912,
        "effective_macs": 73728,
        "dense_ms": 0.4,
        "chosen_ms": 0.1,
        "kernel": "csr",
        "candidates_ms": {"dense contiguous": 0.4, "csr": 0.1},
        "reason": "csr is fastest",
        "max_abs_diff": 1e-6,
        "folded": ("bn1", "relu1"),
    }
    return LayerReport(**{**fields, **changes})  # type: ignore[arg-type]


def model_report(layers: list[LayerReport], **changes: object) -> Report:
    fields: dict[str, object] = {
        "layers": layers,
        "before": ModelTiming(p50_ms=8.0, p90_ms=9.0, p99_ms=9.5, iqr_ms=0.5, images_per_s=125.0),
        "after": ModelTiming(p50_ms=2.0, p90_ms=2.5, p99_ms=3.0, iqr_ms=0.1, images_per_s=500.0),
        "bytes_before": 4096,
        "bytes_after": 1024,
        "macs": 460416,
        "effective_macs": 46041,
        "max_abs_diff": 2e-6,
        "notes": ["a note"],
        "environment": {"cpu": "a cpu", "threads": 1, "cuda": None},
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]
