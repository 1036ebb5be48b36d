"""Suite `csr`: one layer at a time, our sparse convolution against the dense one, both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecnn
from bench.cases import LAYERS, ConvLayer, random_input, sparse_weight
from bench.timing import Run, measure
from tests import reference, tolerance

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


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

    def dense_factory(form: torch.memory_format) -> Callable[[], Run]:
        def make() -> Run:
            image = x.clone(memory_format=form)
            own = weight.clone(memory_format=form)
            return lambda: F.conv2d(image, own, None, stride, pad)

        return make

    def sparse_factory(form: torch.memory_format) -> Callable[[], Run]:
        def make() -> Run:
            image = x.clone(memory_format=form)
            own = sparsecnn.CSRWeight(
                packed.values.clone(), packed.col_idx.clone(), packed.row_ptr.clone(), packed.shape
            )
            return lambda: sparse(image, own)

        return make

    factories = {f"dense {name}": dense_factory(form) for name, form in LAYOUTS.items()}
    factories |= {f"csr {name}": sparse_factory(form) for name, form in LAYOUTS.items()}
    checks = {
        f"csr {name}": lambda image, form=form: sparse(image.contiguous(memory_format=form))
        for name, form in LAYOUTS.items()
    }
    return factories, checks  # type: ignore[return-value]


def rows(
    *,
    layers: Sequence[str],
    densities: Sequence[float],
    batch: int,
    device: str,
    dtype: torch.dtype,
    cold: bool,
    settle: int,
    runs: int,
    max_time_s: float | None,
    roof_gflops: float | None,
) -> Iterator[dict[str, Any]]:
    """Measure every layer at every density; one row of the results at a time.

    Args:
        layers: letters of `LAYERS`.
        densities: shares of nonzeros.
        batch: N.
        device: "cpu" or "cuda".
        dtype: of data and weights.
        cold: rotate buffers past the last-level cache.
        settle: untimed runs in front of each timed one of a warm measurement.
        runs: timed rounds of each measurement.
        max_time_s: budget of one measurement.
        roof_gflops: to give rates as a share of, if known.

    Yields:
        Plain dicts, see `row`.
    """
    for name in layers:
        layer = LAYERS[name]
        x = random_input(layer, batch).to(device, dtype)
        for density in densities:
            weight = sparse_weight(layer, density).to(device, dtype)
            factories, checks = contestants(layer, weight, x)
            error = max(verify(layer, weight, x, run, dtype) for run in checks.values())
            element = x.element_size()
            p, q = layer.out_size
            touched = x.nbytes + batch * layer.k * p * q * element + int(weight.count_nonzero()) * 8
            stats = measure(
                factories,
                cold_bytes=touched if cold else None,
                settle=settle,
                runs=runs,
                max_time_s=max_time_s,
                device=device,
            )
            yield row(layer, density, batch, weight, stats, error, roof_gflops)


def row(
    layer: ConvLayer,
    density: float,
    batch: int,
    weight: Tensor,
    stats: dict[str, Any],
    error: float,
    roof_gflops: float | None,
) -> dict[str, Any]:
    """One line of the results, plain data.

    Returns:
        Times in ms per call, spreads as IQR over median, rates in GFLOP/s of the better of our
        layouts, ratios of the best dense time to ours (above 1 we win).
    """
    ms = {name: s.median_s * 1e3 for name, s in stats.items()}
    ours = {name: t for name, t in ms.items() if name.startswith("csr")}
    dense = {name: t for name, t in ms.items() if name.startswith("dense")}
    best, best_dense = min(ours, key=ours.__getitem__), min(dense, key=dense.__getitem__)
    nnz = int(weight.count_nonzero())
    rate = layer.sparse_flops(batch, nnz) / ms[best] * 1e-6
    return {
        "case": layer.name,
        "label": layer.label,
        "sparsity": round(1 - density, 6),
        "batch": batch,
        "nnz": nnz,
        "ms": ms,
        "spread": {name: s.iqr_s / s.median_s for name, s in stats.items()},
        "runs": min(s.runs for s in stats.values()),
        "best": best,
        "best_dense": best_dense,
        "gflops": rate,
        "effective_gflops": layer.dense_flops(batch) / ms[best] * 1e-6,
        "roof_share": None if roof_gflops is None else rate / roof_gflops,
        "ratios": {name: ms[best_dense] / t for name, t in ours.items()},
        "ratio": ms[best_dense] / ms[best],
        "max_abs_error": error,
    }
