"""What may replace a layer: one table entry per kernel.

A kernel joins `accelerate` by one `Candidate` in `CANDIDATES`: whether it applies to a layer (the
reason when not) and how to build the layer. Dense is no entry: it is always a candidate, in both
memory layouts, and wins ties.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ..nn import (
    CSRConv2d,
    CSRLinear,
    DepthwiseConv2d,
    FusedConv2d,
    PatternConv2d,
    PointwiseConv2d,
    WinogradConv2d,
)
from ..nn._common import ConvDropIn
from ..nn.fused import covers
from .copy import LAYOUTS, in_layout

# A sparse kernel does one multiply-add per nonzero at about two thirds of the rate of a dense one,
# which does them all; with this share of nonzeros none has won, so the time to try is saved.
MAX_DENSITY = 0.7
# Filters that share their columns are multiplied at the rate of a dense layer.
MAX_PATTERN_DENSITY = 0.9
# A transformed weight has no zeros left. From about 72 % of them on, skipping them is as fast as
# the better transform (csr 2.2x at 70 %, 3.2x at 80 %, F(4) 2.6x to 2.8x) and takes an eighth of
# its memory. With fewer channels a group the transforms cost more than they save.
MIN_WINOGRAD_DENSITY, MIN_WINOGRAD_CHANNELS = 0.28, 8
OTHER_KIND = "not a "
"""How the reason starts of a kernel that is for layers of another kind."""
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
"""What the kernels take, by type of device."""

Dense: TypeAlias = "nn.Conv2d | nn.Linear"


@dataclass(eq=False)
class Layer:
    """A dense layer to find a kernel for.

    Attributes:
        module: convolution or linear layer with everything folded into its weight and bias.
        activation: fused into it, "none" for nothing.
        inputs: recorded input shape -> number of calls with it per forward pass.
        density: share of nonzero weights.
        allow_tf32: whether a float32 kernel may round to TF32, as the dense layer does.
    """

    module: Dense
    activation: str
    inputs: dict[tuple[int, ...], int]
    density: float
    allow_tf32: bool = False

    @property
    def layouts(self) -> tuple[str, ...]:
        """The memory layouts there are for its input: two for 4-d input, else one."""
        first = next(iter(self.inputs))
        return LAYOUTS if isinstance(self.module, nn.Conv2d) and len(first) == 4 else LAYOUTS[:1]

    @functools.cached_property
    def pattern(self) -> str:
        """Name of the structured pattern of the weight, "none" where there is none."""
        if not isinstance(self.module, nn.Conv2d) or self.density > MAX_PATTERN_DENSITY:
            return "none"
        return PatternConv2d.from_dense(self.module).pattern

    def key(self) -> tuple[object, ...]:
        """Equal for layers whose candidates take the same time: geometry and density class."""
        m = self.module
        weight = m.weight
        rows = weight.detach().flatten(1).ne(0).any(1)
        geometry: tuple[object, ...] = ()
        if isinstance(m, nn.Conv2d):
            geometry = (m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
        return (
            isinstance(m, nn.Conv2d), tuple(weight.shape), geometry, m.bias is None,
            self.activation, weight.dtype, weight.device, tuple(self.inputs.items()),
            round(self.density, 2), round(float(rows.float().mean()), 1),
            self.pattern, self.allow_tf32,
        )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A kernel that can replace a dense layer.

    Attributes:
        name: as in reports and in the argument `candidates`.
        applies: why the kernel cannot run the layer, or cannot win (it starts with `OTHER_KIND`
            where the kind of the layer says it); None when it may.
        build: the layer with this kernel, activation included.
        error_growth: its rounding over that of a direct sum of products.
    """

    name: str
    applies: Callable[[Layer], str | None]
    build: Callable[[Layer], nn.Module]
    error_growth: float = 1.0


def _refused(
    layer: Layer, dtypes: dict[str, tuple[torch.dtype, ...]] = DTYPES
) -> str | None:
    """What no kernel of ours takes, or cannot take in the dtypes of its devices."""
    m = layer.module
    dtype, device = m.weight.dtype, m.weight.device.type
    if dtype not in dtypes.get(device, ()):
        return f"no kernel for {str(dtype).removeprefix('torch.')} on {device}"
    if isinstance(m, nn.Conv2d):
        if m.padding_mode != "zeros":
            return f"padding_mode {m.padding_mode!r}"
        if any(len(shape) != 4 for shape in layer.inputs):
            return "input without a batch dimension"
    return None


def _csr_applies(layer: Layer) -> str | None:
    reason = _refused(layer)
    if reason is not None:
        return reason
    if layer.density > MAX_DENSITY:
        return f"density {layer.density:.2f} above {MAX_DENSITY}"
    return None


def _csr_build(layer: Layer) -> nn.Module:
    m = layer.module
    if isinstance(m, nn.Conv2d):
        return CSRConv2d.from_dense(m, activation=layer.activation)
    return CSRLinear.from_dense(m, activation=layer.activation)


def _pattern_applies(layer: Layer) -> str | None:
    if not isinstance(layer.module, nn.Conv2d):
        return "not a convolution"
    reason = _refused(layer)
    if reason is not None:
        return reason
    if layer.density > MAX_PATTERN_DENSITY:
        return f"density {layer.density:.2f} above {MAX_PATTERN_DENSITY}"
    return "zeros without a pattern" if layer.pattern == "none" else None


def _depthwise_applies(layer: Layer) -> str | None:
    m = layer.module
    if not isinstance(m, nn.Conv2d) or m.groups != m.in_channels:
        return "not a depthwise convolution"
    return _refused(layer)


def _pointwise_applies(layer: Layer) -> str | None:
    m = layer.module
    if not isinstance(m, nn.Conv2d) or tuple(m.kernel_size) != (1, 1):
        return "not a 1x1 convolution"
    if m.groups != 1:
        return f"groups {m.groups}"
    if any(m._reversed_padding_repeated_twice):
        return f"padding {m.padding!r}"
    return _refused(layer)


def _pointwise_build(layer: Layer) -> nn.Module:
    assert isinstance(layer.module, nn.Conv2d)
    return PointwiseConv2d.from_dense(
        layer.module, activation=layer.activation, allow_tf32=layer.allow_tf32
    )


def _winograd_applies(layer: Layer, on_cuda: tuple[torch.dtype, ...]) -> str | None:
    m = layer.module
    if not isinstance(m, nn.Conv2d) or tuple(m.kernel_size) != (3, 3):
        return "not a 3x3 convolution"
    if tuple(m.stride) != (1, 1) or tuple(m.dilation) != (1, 1):
        return f"stride {tuple(m.stride)}, dilation {tuple(m.dilation)}"
    if layer.density < MIN_WINOGRAD_DENSITY:
        return f"density {layer.density:.2f} below {MIN_WINOGRAD_DENSITY}"
    if m.in_channels // m.groups < MIN_WINOGRAD_CHANNELS:
        return f"fewer than {MIN_WINOGRAD_CHANNELS} channels a group"
    # Short types round in the Winograd domain, where errors grow: F(2) on tensor cores is worth a
    # try, which the comparison with the dense layer may still refuse.
    return _refused(layer, {"cpu": (torch.float32,), "cuda": on_cuda})


def _conv_build(kind: type[ConvDropIn], **options: Any) -> Callable[[Layer], nn.Module]:
    def build(layer: Layer) -> nn.Module:
        assert isinstance(layer.module, nn.Conv2d)
        return kind.from_dense(layer.module, activation=layer.activation, **options)

    return build


CANDIDATES: dict[str, Candidate] = {
    candidate.name: candidate
    for candidate in (
        Candidate("csr", _csr_applies, _csr_build),
        Candidate("pattern", _pattern_applies, _conv_build(PatternConv2d)),
        Candidate("depthwise", _depthwise_applies, _conv_build(DepthwiseConv2d)),
        Candidate("pointwise", _pointwise_applies, _pointwise_build),
        Candidate(
            "winograd2",
            functools.partial(_winograd_applies, on_cuda=DTYPES["cuda"]),
            _conv_build(WinogradConv2d, tile=2),
            2.0,
        ),
        Candidate(
            "winograd4",
            functools.partial(_winograd_applies, on_cuda=(torch.float32,)),
            _conv_build(WinogradConv2d, tile=4),
            8.0,
        ),
    )
}


def build_dense(layer: Layer, layout: str) -> nn.Module:
    """The dense layer with its activation fused and its weight in a memory layout."""
    m = layer.module
    shared = {id(p): p for p in m.parameters()}
    if not isinstance(m, nn.Conv2d):
        return copy.deepcopy(m, shared)
    if layer.activation == "none" and not any(covers(m, shape) for shape in layer.inputs):
        built = copy.deepcopy(m, shared)
    else:
        built = FusedConv2d.from_dense(m, activation=layer.activation)
    built.weight = nn.Parameter(in_layout(built.weight.detach(), layout), m.weight.requires_grad)
    return built
