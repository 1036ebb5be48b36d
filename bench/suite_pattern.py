"""Suite `pattern`: structured sparsity, against the dense layer and csr_conv2d on the same weight.

A case is a layer and a pattern, e.g. `a:shape`. Patterns that fix their density (2:4) run at that
one only, and kernel needs filters larger than one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecnn
from bench.cases import LAYERS, ConvLayer, random_input
from bench.suite import LAYOUTS, Settings, in_layouts, measured, result
from bench.suite_csr import verify
from bench.timing import Run

PATTERNS = ("shape", "vector8", "kernel", "2:4")
NAMES = tuple(
    f"{name}:{pattern}"
    for name, layer in LAYERS.items()
    for pattern in PATTERNS
    if pattern != "kernel" or layer.kernel > 1
)
QUICK = ("a:shape", "c:vector8", "f:vector8", "b:kernel")
DENSITIES = (0.5, 0.25, 0.1)
QUICK_DENSITIES = (0.25, 0.1)


def pattern_weight(layer: ConvLayer, pattern: str, density: float, *, seed: int = 0) -> Tensor:
    """A weight whose kept groups are drawn at random, a share `density` of them, to the group.

    Args:
        layer: whose weight.
        pattern: one of `PATTERNS`; "2:4" keeps half whatever the density.
        density: share of kept groups.
        seed: of places and values.

    Returns:
        (K, C, R, S) float32, scaled so that outputs have about the size of inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    k, c, r, s = layer.weight_shape
    if pattern == "2:4":
        scores = torch.rand(k, c // 4, 4, r, s, generator=generator)
        mask = (scores.argsort(2).argsort(2) < 2).reshape(k, c, r, s)
    else:
        rows, columns = {
            "shape": (1, c * r * s), "vector8": (k // 8, c * r * s), "kernel": (k, c)
        }[pattern]  # fmt: skip
        # As many in each row, as a selection per filter has it.
        order = torch.rand(rows, columns, generator=generator).argsort(1).argsort(1)
        mask = order < max(1, round(density * columns))
        if pattern == "kernel":
            mask = mask[:, :, None].expand(k, c, r * s)
        mask = mask.repeat_interleave(k // rows, 0).reshape(k, c, r, s)
    scale = (math.prod(layer.weight_shape) / k * density) ** -0.5
    return scale * torch.randn(layer.weight_shape, generator=generator) * mask


def contestants(
    layer: ConvLayer, weight: Tensor, packed: sparsecnn.PatternWeight, x: Tensor
) -> tuple[dict[str, Callable[[], Run]], Callable[[Tensor], Tensor]]:
    """Factories with buffers of their own for the timer, and our function for the check."""
    csr = sparsecnn.CSRWeight.from_dense(weight)
    stride, pad = layer.stride, layer.padding

    def ours(image: Tensor) -> Tensor:
        return sparsecnn.ops.pattern_conv2d(image, packed, stride=stride, padding=pad)

    def unstructured(image: Tensor) -> Tensor:
        return sparsecnn.ops.csr_conv2d(image, csr, stride=stride, padding=pad)

    def dense(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        own = weight.clone(memory_format=form)
        return lambda image: F.conv2d(image, own, None, stride, pad)

    factories = {
        **in_layouts("dense", x, dense),
        **in_layouts("csr", x, lambda form: unstructured),
        **in_layouts("pattern", x, lambda form: ours),
    }
    return factories, ours


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure every layer in every pattern at every density; one row of the results at a time."""
    for case in settings.names:
        name, pattern = case.split(":", 1)
        layer = LAYERS[name]
        x = random_input(layer, settings.batch).to(settings.device, settings.dtype)
        for density in settings.densities:
            if pattern == "2:4" and density != 0.5:
                continue
            weight = pattern_weight(layer, pattern, density).to(settings.device, settings.dtype)
            packed = sparsecnn.PatternWeight.from_dense(weight)
            assert packed.pattern == pattern, f"{case}: found {packed.pattern}"
            factories, ours = contestants(layer, weight, packed, x)
            images = [x.contiguous(memory_format=form) for form in LAYOUTS.values()]
            error = max(verify(layer, weight, image, ours, settings.dtype) for image in images)
            p, q = layer.out_size
            y_bytes = settings.batch * layer.k * p * q * x.element_size()
            stats = measured(factories, x.nbytes + y_bytes + packed.nbytes, settings)
            best = {
                kind: min(s.median_s for label, s in stats.items() if label.startswith(kind))
                for kind in ("csr", "pattern")
            }
            yield result(
                case=case,
                label=f"{name}  {layer.label} {pattern}",
                sparsity=1 - density,
                stats=stats,
                settings=settings,
                flops=layer.sparse_flops(settings.batch, packed.nnz),
                dense_flops=layer.dense_flops(settings.batch),
                error=error,
                ours=("pattern",),
                nnz=packed.nnz,
                csr_ratio=best["csr"] / best["pattern"],
            )
