"""Suite `depthwise`: depthwise layers of real networks against the framework's grouped ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecnn
from bench.cases import ConvLayer, random_input, sparse_weight
from bench.suite import LAYOUTS, Settings, in_layouts, measured, result
from bench.timing import Run
from tests import reference, tolerance


class DepthwiseLayer(ConvLayer):
    """One filter per channel."""

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(K, 1, R, S)."""
        return self.k, 1, self.kernel, self.kernel

    @property
    def label(self) -> str:
        """Readable description."""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.c} @{self.h}"


LAYERS: dict[str, DepthwiseLayer] = {
    layer.name: layer
    for layer in (
        DepthwiseLayer("a", 96, 96, 56, 56, 3),
        DepthwiseLayer("b", 576, 576, 14, 14, 3),
        DepthwiseLayer("c", 240, 240, 28, 28, 5),
        DepthwiseLayer("d", 144, 144, 56, 56, 3, stride=2),
        DepthwiseLayer("e", 32, 32, 112, 112, 3),
        DepthwiseLayer("f", 960, 960, 7, 7, 3),
        DepthwiseLayer("g", 672, 672, 14, 14, 5),
        DepthwiseLayer("h", 96, 96, 56, 56, 7),
    )
}
NAMES = tuple(LAYERS)
QUICK = ("b", "f")
DENSITIES = (1.0,)
QUICK_DENSITIES = (1.0,)


def verify(
    layer: DepthwiseLayer,
    weight: Tensor,
    x: Tensor,
    run: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> float:
    """Compare a kernel with the float64 reference on the first and the last image.

    Returns:
        Largest absolute difference.

    Raises:
        AssertionError: a difference is out of the derived bound: there is nothing to time.
    """
    geometry: dict[str, Any] = {
        "stride": (layer.stride,) * 2, "padding": (layer.padding,) * 4, "groups": layer.c,
    }  # fmt: skip
    images = sorted({0, x.shape[0] - 1})
    picked = x[images]
    want = reference.conv2d(picked, weight, **geometry)
    magnitude = reference.conv2d_magnitude(picked, weight, **geometry)
    got = run(x)[images].double().cpu()
    bound = tolerance.conv_bound(magnitude, want, layer.kernel**2, dtype)
    tolerance.assert_within(got, want, bound, layer.label)
    return float((got - want).abs().max())


def contestants(
    layer: DepthwiseLayer, weight: Tensor, x: Tensor
) -> tuple[dict[str, Callable[[], Run]], dict[str, Callable[[Tensor], Tensor]]]:
    """Factories with buffers of their own for the timer, and plain functions for the check."""
    stride, pad, groups = layer.stride, layer.padding, layer.c

    def ours(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        own = weight.clone()
        return lambda image: sparsecnn.ops.depthwise_conv2d(image, own, stride=stride, padding=pad)

    def dense(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        own = weight.clone(memory_format=form)
        return lambda image: F.conv2d(image, own, None, stride, pad, 1, groups)

    factories = {**in_layouts("dense", x, dense), **in_layouts("depthwise", x, ours)}

    def check(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        run = ours(form)
        return lambda image: run(image.contiguous(memory_format=form))

    return factories, {f"depthwise {name}": check(form) for name, form in LAYOUTS.items()}


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure every layer; one row of the results at a time."""
    for name in settings.names:
        layer = LAYERS[name]
        x = random_input(layer, settings.batch).to(settings.device, settings.dtype)
        weight = sparse_weight(layer, 1.0).to(settings.device, settings.dtype)
        factories, checks = contestants(layer, weight, x)
        error = max(verify(layer, weight, x, run, settings.dtype) for run in checks.values())
        p, q = layer.out_size
        touched = x.nbytes + settings.batch * layer.k * p * q * x.element_size()
        stats = measured(factories, touched, settings)
        fastest = min(s.median_s for n, s in stats.items() if n.startswith("depthwise"))
        yield result(
            case=name,
            label=f"{name}  {layer.label}",
            sparsity=0.0,
            stats=stats,
            settings=settings,
            flops=layer.dense_flops(settings.batch),
            dense_flops=layer.dense_flops(settings.batch),
            error=error,
            ours=("depthwise",),
            gb_per_s=touched / fastest * 1e-9,
        )
