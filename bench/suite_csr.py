"""Suite `csr`: one layer at a time, our sparse convolution against the dense one, both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecnn
from bench.cases import DENSITIES, LAYERS, ConvLayer, random_input, sparse_weight
from bench.suite import LAYOUTS, Settings, in_layouts, measured, result
from bench.timing import Run
from tests import reference, tolerance

NAMES = tuple(LAYERS)
QUICK = ("a", "c", "f")
QUICK_DENSITIES = (0.2, 0.1)
__all__ = ["DENSITIES", "NAMES", "QUICK", "QUICK_DENSITIES", "contestants", "rows", "verify"]


def verify(
    layer: ConvLayer, weight: Tensor, x: Tensor, run: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> float:
    """Compare a kernel with the float64 reference on the first and the last image.

    Args:
        layer: the geometry.
        weight: dense (K, C, R, S) as the kernel has it.
        x: (N, C, H, W).
        run: the kernel.
        dtype: of the data.

    Returns:
        Largest absolute difference.

    Raises:
        AssertionError: a difference is out of the derived bound: there is nothing to time.
    """
    pad = layer.padding
    geometry: dict[str, Any] = {"stride": (layer.stride,) * 2, "padding": (pad,) * 4}
    images = sorted({0, x.shape[0] - 1})
    picked = x[images]
    want = reference.conv2d(picked, weight, **geometry)
    magnitude = reference.conv2d_magnitude(picked, weight, **geometry)
    terms = int((weight != 0).flatten(1).sum(1).max())
    got = run(x)[images].double().cpu()
    bound = tolerance.conv_bound(magnitude, want, terms, dtype)
    tolerance.assert_within(got, want, bound, layer.label)
    return float((got - want).abs().max())


def contestants(
    layer: ConvLayer, weight: Tensor, x: Tensor
) -> tuple[dict[str, Callable[[], Run]], dict[str, Callable[[Tensor], Tensor]]]:
    """Factories with buffers of their own for the timer, and plain functions for the check."""
    packed = sparsecnn.CSRWeight.from_dense(weight)
    stride, pad = layer.stride, layer.padding

    def sparse(image: Tensor, w: sparsecnn.CSRWeight = packed) -> Tensor:
        return sparsecnn.ops.csr_conv2d(image, w, stride=stride, padding=pad)

    def dense(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        own = weight.clone(memory_format=form)
        return lambda image: F.conv2d(image, own, None, stride, pad)

    def own_sparse(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        own = sparsecnn.CSRWeight(
            packed.values.clone(), packed.col_idx.clone(), packed.row_ptr.clone(), packed.shape
        )
        return lambda image: sparse(image, own)

    factories = {**in_layouts("dense", x, dense), **in_layouts("csr", x, own_sparse)}
    checks = {
        f"csr {name}": lambda image, form=form: sparse(image.contiguous(memory_format=form))
        for name, form in LAYOUTS.items()
    }
    return factories, checks  # type: ignore[return-value]


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure every layer at every density; one row of the results at a time."""
    for name in settings.names:
        layer = LAYERS[name]
        x = random_input(layer, settings.batch).to(settings.device, settings.dtype)
        for density in settings.densities:
            weight = sparse_weight(layer, density).to(settings.device, settings.dtype)
            factories, checks = contestants(layer, weight, x)
            error = max(verify(layer, weight, x, run, settings.dtype) for run in checks.values())
            nnz = int(weight.count_nonzero())
            p, q = layer.out_size
            y_bytes = settings.batch * layer.k * p * q * x.element_size()
            yield result(
                case=name,
                label=f"{name}  {layer.label}",
                sparsity=1 - density,
                stats=measured(factories, x.nbytes + y_bytes + nnz * 8, settings),
                settings=settings,
                flops=layer.sparse_flops(settings.batch, nnz),
                dense_flops=layer.dense_flops(settings.batch),
                error=error,
                ours=("csr",),
                nnz=nnz,
            )
