"""The layers that are benchmarked: convolutions of real networks, by letter.

H x W is the size of the input; padding is half the kernel ("same" at stride 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvLayer:
    """One convolution without bias.

    Attributes:
        name: letter used in tables and files.
        c: input channels C.
        k: output channels K.
        h: input height H.
        w: input width W.
        kernel: R = S.
        stride: of both axes.
    """

    name: str
    c: int
    k: int
    h: int
    w: int
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> int:
        """Zeros on each side."""
        return self.kernel // 2

    @property
    def out_size(self) -> tuple[int, int]:
        """(P, Q)."""
        reach = 2 * self.padding - self.kernel
        return (self.h + reach) // self.stride + 1, (self.w + reach) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(K, C, R, S)."""
        return self.k, self.c, self.kernel, self.kernel

    @property
    def label(self) -> str:
        """Readable description."""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.c}>{self.k} @{self.h}"

    def dense_flops(self, batch: int) -> int:
        """2 * N * K * P * Q * C * R * S."""
        p, q = self.out_size
        return 2 * batch * p * q * math.prod(self.weight_shape)

    def sparse_flops(self, batch: int, nnz: int) -> int:
        """2 * N * P * Q * nnz: what a sparse kernel has to do."""
        p, q = self.out_size
        return 2 * batch * p * q * nnz


LAYERS: dict[str, ConvLayer] = {
    layer.name: layer
    for layer in (
        ConvLayer("a", 64, 64, 56, 56, 3),
        ConvLayer("b", 128, 128, 28, 28, 3),
        ConvLayer("c", 256, 256, 14, 14, 3),
        ConvLayer("d", 512, 512, 7, 7, 3),
        ConvLayer("e", 256, 64, 56, 56, 1),
        ConvLayer("f", 1024, 256, 14, 14, 1),
        ConvLayer("g", 512, 2048, 7, 7, 1),
        ConvLayer("h", 128, 128, 56, 56, 3, stride=2),
        ConvLayer("i", 256, 256, 56, 56, 3),
    )
}
DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)


def sparse_weight(layer: ConvLayer, density: float, *, seed: int = 0) -> Tensor:
    """A random weight with exactly round(density * size) nonzeros at random places.

    Args:
        layer: whose weight.
        density: share of nonzeros.
        seed: of places and values.

    Returns:
        (K, C, R, S) float32, scaled so that outputs have about the size of inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(layer.weight_shape)
    keep = torch.randperm(size, generator=generator)[: round(density * size)]
    weight = torch.zeros(size)
    scale = (size / layer.k * density) ** -0.5
    weight[keep] = scale * torch.randn(keep.numel(), generator=generator)
    return weight.reshape(layer.weight_shape)


def random_input(layer: ConvLayer, batch: int, *, seed: int = 1) -> Tensor:
    """A random (N, C, H, W) float32 input; never zeros, which a smart kernel could exploit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layer.c, layer.h, layer.w, generator=generator)
