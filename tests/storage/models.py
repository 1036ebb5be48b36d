"""Small models for the storage tests; importable by the fresh processes they start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecnn.nn import CSRConv2d, CSRLinear, FusedConv2d


def thinned(layer: nn.Conv2d | nn.Linear, density: float, seed: int = 0) -> nn.Conv2d | nn.Linear:
    """Set random weights to +0.0."""
    keep = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < density
    with torch.no_grad():
        layer.weight.copy_(torch.where(keep.to(layer.weight.device), layer.weight, 0.0))
    return layer


def sparse_stack(density: float = 0.1, seed: int = 0) -> nn.Sequential:
    """Sequential of known layers with every kind of tensor: raw, packed dense, CSR."""
    torch.manual_seed(seed)
    dense = thinned(nn.Conv2d(16, 24, 3, padding=1, bias=False), density, seed)
    conv = thinned(nn.Conv2d(24, 24, 3, stride=2, padding=(1, 0), groups=2), density, seed + 1)
    linear = thinned(nn.Linear(24 * 8 * 7, 10), density, seed + 2)
    assert isinstance(conv, nn.Conv2d) and isinstance(linear, nn.Linear)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(16, eps=1e-3, momentum=None),
        nn.PReLU(16),
        dense,
        nn.Sequential(FusedConv2d(24, 24, 1, activation="silu"), nn.Dropout(0.25)),
        CSRConv2d.from_dense(conv, activation="relu"),
        nn.AdaptiveMaxPool2d((8, 7)),
        nn.Flatten(),
        CSRLinear.from_dense(linear),
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    norm.running_mean.normal_()
    return model.eval()


class Block(nn.Module):
    """Convolution, norm, activation and a residual, of a type no file can construct."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x))) * self.scale + x


class Net(nn.Module):
    """A user's architecture."""

    def __init__(self, channels: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Block(channels), Block(channels)])
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def converted_net(density: float = 0.1) -> Net:
    """A `Net` as acceleration leaves it: sparse layers, folded norms and activations."""
    torch.manual_seed(3)
    net = Net().eval()
    first, second = net.blocks
    first.conv = CSRConv2d.from_dense(thinned(_with_bias(first.conv), density), activation="relu")
    first.bn, first.act = nn.Identity(), nn.Identity()
    second.conv = FusedConv2d.from_dense(_with_bias(second.conv), activation="relu")
    second.bn, second.act = nn.Identity(), nn.Identity()
    net.head = CSRLinear.from_dense(thinned(net.head, 0.3))
    return net


def _with_bias(conv: nn.Conv2d) -> nn.Conv2d:
    conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    return conv
