"""Suite `winograd`: 3x3 layers of stride 1 in the Winograd domain, dense and sparse.

A case is a layer and the edge of the output tiles, e.g. `a:F4`. The density is that of the taps:
the kept ones are drawn at random. The rival is the dense layer in its better layout; what the
direct sparse kernel takes for the same number of stored values per output is in the suite `csr`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsecnn
from bench.cases import LAYERS, ConvLayer, random_input, sparse_weight
from bench.suite import LAYOUTS, Settings, in_layouts, measured, result
from bench.timing import Run
from tests import reference, tolerance

NAMES = tuple(
    f"{name}:F{tile}"
    for name, layer in LAYERS.items()
    if layer.kernel == 3 and layer.stride == 1
    for tile in (2, 4)
)
QUICK = ("a:F4", "c:F4", "d:F2")
DENSITIES = (1.0, 0.3, 0.2, 0.1)
QUICK_DENSITIES = (1.0, 0.2)


def winograd_weight(
    layer: ConvLayer, tile: int, density: float, *, seed: int = 2
) -> sparsecnn.WinogradWeight:
    """The transform of a random weight, of which a share `density` of the taps is kept."""
    packed = sparsecnn.WinogradWeight.from_dense(sparse_weight(layer, 1.0), tile=tile)
    if density == 1:
        return packed
    taps = packed.taps()
    order = torch.randperm(taps.numel(), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(taps.numel())
    mask[order[: round(density * taps.numel())]] = density**-0.5
    return sparsecnn.WinogradWeight.from_taps(taps * mask.reshape(taps.shape), sparse=True)


def verify(
    layer: ConvLayer,
    packed: sparsecnn.WinogradWeight,
    x: Tensor,
    run: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> float:
    """Compare with the float64 reference on the first and the last image.

    Returns:
        Largest absolute difference.

    Raises:
        AssertionError: a difference is out of the derived bound: there is nothing to time.
    """
    geometry: dict[str, Any] = {"padding": (layer.padding,) * 4}
    images = sorted({0, x.shape[0] - 1})
    picked, taps = x[images], packed.taps()
    want = reference.winograd_conv2d(picked, taps, **geometry)
    magnitude = reference.winograd_magnitude(picked, taps, **geometry)
    bound = tolerance.winograd_bound(magnitude, want, layer.c, 0, packed.tile, dtype)
    got = run(x)[images].double().cpu()
    tolerance.assert_within(got, want, bound, layer.label)
    return float((got - want).abs().max())


def contestants(
    layer: ConvLayer, packed: sparsecnn.WinogradWeight, x: Tensor
) -> tuple[dict[str, Callable[[], Run]], Callable[[Tensor], Tensor]]:
    """Factories with buffers of their own for the timer, and our function for the check."""
    pad = layer.padding

    def ours(image: Tensor) -> Tensor:
        return sparsecnn.ops.winograd_conv2d(image, packed, padding=pad)

    def dense(form: torch.memory_format) -> Callable[[Tensor], Tensor]:
        own = sparse_weight(layer, 1.0).to(x.device, x.dtype).contiguous(memory_format=form)
        return lambda image: F.conv2d(image, own, None, 1, pad)

    factories = {
        **in_layouts("dense", x, dense),
        **in_layouts("winograd", x, lambda form: ours),
    }
    return factories, ours


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure every layer and tile at every density; one row of the results at a time."""
    for case in settings.names:
        name, _, tile = case.partition(":F")
        layer = LAYERS[name]
        x = random_input(layer, settings.batch).to(settings.device, settings.dtype)
        for density in settings.densities:
            weight = winograd_weight(layer, int(tile), density)
            packed = sparsecnn.WinogradWeight.from_taps(
                weight.taps().to(settings.device, settings.dtype), sparse=weight.is_sparse
            )
            factories, ours = contestants(layer, packed, x)
            images = [x.contiguous(memory_format=form) for form in LAYOUTS.values()]
            error = max(verify(layer, packed, image, ours, settings.dtype) for image in images)
            p, q = layer.out_size
            tiles = -(-p // packed.tile) * -(-q // packed.tile)
            y_bytes = settings.batch * layer.k * p * q * x.element_size()
            yield result(
                case=case,
                label=f"{name}  {layer.label} F({tile})",
                sparsity=1 - density,
                stats=measured(factories, x.nbytes + y_bytes + packed.nbytes, settings),
                settings=settings,
                flops=2 * packed.nnz * settings.batch * tiles,
                dense_flops=layer.dense_flops(settings.batch),
                error=error,
                ours=("winograd",),
                nnz=packed.nnz,
            )
