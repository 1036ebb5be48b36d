"""What lives or dies together: partitions of the entries of a weight.

W is read as (G, K/G, C/G, R*S): conv groups, filters of a group, input channels of a group,
positions in a kernel; a linear weight has G = R*S = 1. A partition of the first kind fixes some
of these axes and gathers the others, so scores reduce over axes and masks expand over them:

| name     | group                      | n_groups  | gathers           |
|----------|----------------------------|-----------|-------------------|
| element  | one entry                  | K*C/G*R*S | nothing           |
| kernel   | W[k, c]                    | K*C/G     | R*S               |
| filter   | W[k]                       | K         | C/G, R*S          |
| channel  | W[:, c] of its conv group  | C         | K/G, R*S          |
| shape    | W[:, c, r, s], likewise    | C*R*S     | K/G               |
| layer    | W                          | 1         | all               |
| winograd | one entry, Winograd domain | K*C/G*16  | nothing           |

With G > 1 an input channel is read only by the filters of its conv group, so "channel" and
"shape" are per conv group; a depthwise convolution (C/G = 1) has channel = its own filters.
"filter" zeroes weights only: bias and batch norm of that map stay until the map is removed.
Granularities: Anwar & Sung, "Coarse Pruning of CNNs with Random Masks" (2016, arXiv 1512.08571).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from sparsecnn.nn.winograd_relu import WinogradReLUConv2d

from .targets import Target

HOW = ("sum", "mean", "max", "min", "l1", "l2")


@dataclass(frozen=True)
class Axes:
    """A partition that gathers whole axes of (G, K/G, C/G, R*S).

    Attributes:
        name: what `str` gives and `parse` reads.
        gathered: the axes inside a group, ascending.
    """

    name: str
    gathered: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def n_groups(self, t: Target) -> int:
        """Number of groups: the product of the axes that are not gathered."""
        count = 1
        for axis, size in enumerate(t.grouped_shape):
            if axis not in self.gathered:
                count *= size
        return count

    def reduce(self, x: Tensor, t: Target, how: str = "l2") -> Tensor:
        """Reduce over each group.

        Args:
            x: shape of W.
            t: whose weight.
            how: "sum", "mean", "max", "min", "l1" or "l2" (the norms of a group).

        Returns:
            (n_groups,), dtype of x except that sums of integers and bools are int64.

        Raises:
            ValueError: x has another shape or `how` is unknown.
        """
        _check_like_weight(x, t, self)
        return _reduce(x.reshape(t.grouped_shape), self.gathered, how).reshape(-1)

    def expand(self, g: Tensor, t: Target) -> Tensor:
        """Give every entry the value of its group.

        Args:
            g: (n_groups,).
            t: whose weight.

        Returns:
            Shape of W, contiguous.

        Raises:
            ValueError: g has another shape.
        """
        _check_per_group(g, t, self, self.n_groups(t))
        shape = t.grouped_shape
        kept = [1 if axis in self.gathered else size for axis, size in enumerate(shape)]
        return g.reshape(kept).expand(shape).reshape(t.shape).contiguous()


@dataclass(frozen=True)
class Block:
    """Blocks of bh rows and bw columns of the lowered weight (K, C/G*R*S), e.g. for BSR kernels.

    Rows of a block lie in one conv group. Blocks at the lower and right edge are smaller where
    the sizes do not divide; every entry is in exactly one block.

    Attributes:
        bh: filters per block.
        bw: consecutive columns (c*R + r)*S + s per block.

    Raises:
        ValueError: a size below 1.
    """

    bh: int
    bw: int

    def __post_init__(self) -> None:
        for name, size in (("bh", self.bh), ("bw", self.bw)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"block: expected {name} to be an int >= 1, got {size!r}")

    def __str__(self) -> str:
        return f"block({self.bh},{self.bw})"

    def _grid(self, t: Target) -> tuple[int, int, int, int, int]:
        """(G, rows of a group, columns, blocks per column, blocks per row)."""
        groups, rows, channels, spatial = t.grouped_shape
        columns = channels * spatial
        return groups, rows, columns, -(-rows // self.bh), -(-columns // self.bw)

    def n_groups(self, t: Target) -> int:
        """Number of blocks, ragged ones included."""
        groups, _, _, down, across = self._grid(t)
        return groups * down * across

    def reduce(self, x: Tensor, t: Target, how: str = "l2") -> Tensor:
        """Shape of W -> (n_groups,); see `Axes.reduce`."""
        _check_like_weight(x, t, self)
        groups, rows, columns, down, across = self._grid(t)
        if how == "mean":
            sizes = self.reduce(torch.ones(t.shape, device=x.device), t, "sum")
            return self.reduce(x, t, "sum") / sizes.to(x.dtype)
        padded = x.new_full((groups, down * self.bh, across * self.bw), _neutral(x, how))
        padded[:, :rows, :columns] = x.reshape(groups, rows, columns)
        blocks = padded.reshape(groups, down, self.bh, across, self.bw)
        return _reduce(blocks, (2, 4), how).reshape(-1)

    def expand(self, g: Tensor, t: Target) -> Tensor:
        """(n_groups,) -> shape of W."""
        _check_per_group(g, t, self, self.n_groups(t))
        groups, rows, columns, down, across = self._grid(t)
        blocks = g.reshape(groups, down, 1, across, 1).expand(-1, -1, self.bh, -1, self.bw)
        padded = blocks.reshape(groups, down * self.bh, across * self.bw)
        return padded[:, :rows, :columns].reshape(t.shape).contiguous()


@dataclass(frozen=True)
class Strided:
    """Every stride-th position of the kernels of an input channel, for all filters of its group.

    Group (c, offset) holds W[:, c, r, s] with (r*S + s) % stride = offset, so that a pruned group
    is a set of whole columns of the lowered weight: the strided intra-kernel sparsity of Anwar,
    Hwang & Sung, "Structured Pruning of Deep Convolutional Neural Networks" (2017), shared by the
    kernels that read one map. Kernels with fewer positions than `stride` have one group each.

    Attributes:
        stride: distance of the positions in a group.

    Raises:
        ValueError: a stride below 1.
    """

    stride: int

    def __post_init__(self) -> None:
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"strided: expected stride to be an int >= 1, got {self.stride!r}")

    def __str__(self) -> str:
        return f"strided({self.stride})"

    def n_groups(self, t: Target) -> int:
        """C * min(stride, R*S)."""
        groups, _, channels, spatial = t.grouped_shape
        return groups * channels * min(self.stride, spatial)

    def reduce(self, x: Tensor, t: Target, how: str = "l2") -> Tensor:
        """Shape of W -> (n_groups,); see `Axes.reduce`."""
        _check_like_weight(x, t, self)
        if how == "mean":
            sizes = self.reduce(torch.ones(t.shape, device=x.device), t, "sum")
            return self.reduce(x, t, "sum") / sizes.to(x.dtype)
        groups, rows, channels, spatial = t.grouped_shape
        stride = min(self.stride, spatial)
        turns = -(-spatial // stride)
        padded = x.new_full((groups, rows, channels, turns * stride), _neutral(x, how))
        padded[..., :spatial] = x.reshape(t.grouped_shape)
        return _reduce(padded.reshape(groups, rows, channels, turns, stride), (1, 3), how).flatten()

    def expand(self, g: Tensor, t: Target) -> Tensor:
        """(n_groups,) -> shape of W."""
        _check_per_group(g, t, self, self.n_groups(t))
        groups, rows, channels, spatial = t.grouped_shape
        stride = min(self.stride, spatial)
        turns = -(-spatial // stride)
        offsets = g.reshape(groups, 1, channels, 1, stride).expand(-1, rows, -1, turns, -1)
        entries = offsets.reshape(groups, rows, channels, turns * stride)[..., :spatial]
        return entries.reshape(t.shape).contiguous()


@dataclass(frozen=True)
class NM(Axes):
    """Single entries under a constraint: exactly n kept of every m consecutive input channels.

    The window runs along C/G at a fixed filter and kernel position, the direction in which sparse
    matrix units compress (2:4: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021).
    The selector enforces it and needs no budget: the density is n/m.

    Attributes:
        n: entries kept per window.
        m: window length; C/G must be a multiple of it.

    Raises:
        ValueError: not 1 <= n <= m.
    """

    n: int = 2
    m: int = 4

    def __init__(self, n: int = 2, m: int = 4) -> None:
        for name, size in (("n", n), ("m", m)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise ValueError(f"NM: expected {name} to be an int, got {size!r}")
        if not 1 <= n <= m:
            raise ValueError(f"NM: expected 1 <= n <= m, got n={n}, m={m}")
        object.__setattr__(self, "name", f"{n}:{m}")
        object.__setattr__(self, "gathered", ())
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)


@dataclass(frozen=True)
class Winograd(Axes):
    """Single entries of a weight that is kept in the Winograd domain, (K, C/G, 4, 4).

    The zeros then are multiplications left out (Liu et al., "Efficient Sparse-Winograd
    Convolutional Neural Networks", ICLR 2018). Zeros of a spatial weight are not: the transform
    fills them, so convolutions are refused.
    """

    def n_groups(self, t: Target) -> int:
        """Number of entries.

        Raises:
            ValueError: the layer is no `WinogradReLUConv2d`.
        """
        if not isinstance(t.module, WinogradReLUConv2d):
            kind = parametrize.type_before_parametrizations(t.module).__name__
            raise ValueError(
                f"{self}: expected layer {t.name!r} to be a WinogradReLUConv2d, got {kind}; pruned "
                "spatial weights lose their zeros in the transform"
            )
        return super().n_groups(t)

    def reduce(self, x: Tensor, t: Target, how: str = "l2") -> Tensor:
        """Shape of W -> (n_groups,); see `Axes.reduce`."""
        self.n_groups(t)
        return super().reduce(x, t, how)


element = Axes("element", ())
kernel = Axes("kernel", (3,))
filter_ = Axes("filter", (2, 3))
channel = Axes("channel", (1, 3))
shape = Axes("shape", (1,))
layer = Axes("layer", (0, 1, 2, 3))
winograd = Winograd("winograd", ())
neuron = filter_  # a unit of a linear layer is a row of its weight: the same partition
_NAMED = {g.name: g for g in (element, kernel, filter_, channel, shape, layer, winograd)}
_NAMED["neuron"] = neuron


def block(bh: int, bw: int) -> Block:
    """Blocks of bh filters by bw lowered columns; see `Block`."""
    return Block(bh, bw)


def strided(stride: int) -> Strided:
    """Every stride-th kernel position of an input channel; see `Strided`."""
    return Strided(stride)


def parse(spec: object) -> Axes | Block | Strided:
    """A granularity from its text form, e.g. of a TOML file; the inverse of `str`.

    Args:
        spec: "element", "kernel", "filter", "channel", "shape", "layer", "winograd", "neuron",
            "block(bh,bw)", "strided(s)" or "n:m"; a granularity is returned as it is.

    Raises:
        TypeError: neither text nor a granularity of this module.
        ValueError: unknown text.
    """
    if isinstance(spec, (Axes, Block, Strided)):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"granularity: expected a name or a granularity, got {spec!r}")
    text = spec.strip()
    if text in _NAMED:
        return _NAMED[text]
    blocks = re.fullmatch(r"block\(\s*(\d+)\s*,\s*(\d+)\s*\)", text)
    if blocks:
        return Block(int(blocks[1]), int(blocks[2]))
    steps = re.fullmatch(r"strided\(\s*(\d+)\s*\)", text)
    if steps:
        return Strided(int(steps[1]))
    ratio = re.fullmatch(r"(\d+):(\d+)", text)
    if ratio:
        return NM(int(ratio[1]), int(ratio[2]))
    raise ValueError(
        f"granularity: expected one of {', '.join(_NAMED)}, 'block(bh,bw)', 'strided(s)' or 'n:m', "
        f"got {spec!r}"
    )


def _reduce(x: Tensor, axes: tuple[int, ...], how: str) -> Tensor:
    """Reduce `axes` of x; no axes means groups of one entry."""
    if how not in HOW:
        raise ValueError(f"granularity: expected how to be one of {', '.join(HOW)}, got {how!r}")
    if not axes:
        return x.abs() if how in ("l1", "l2") else x
    if how == "max":
        return x.amax(axes)
    if how == "min":
        return x.amin(axes)
    if how == "l1":
        return x.abs().sum(axes)
    if how == "l2":
        norm: Tensor = torch.linalg.vector_norm(x, dim=axes)
        return norm
    return x.mean(axes) if how == "mean" else x.sum(axes)


def _neutral(x: Tensor, how: str) -> float | bool:
    """What padding holds so that it does not change the result of a reduction."""
    if how not in ("max", "min"):
        return 0
    if x.dtype == torch.bool:
        return how == "min"
    if x.is_floating_point():
        return -torch.inf if how == "max" else torch.inf
    limits = torch.iinfo(x.dtype)
    return limits.min if how == "max" else limits.max


def _check_like_weight(x: Tensor, t: Target, granularity: object) -> None:
    if x.shape != t.shape:
        raise ValueError(
            f"{granularity}: expected x of shape {tuple(t.shape)} like layer {t.name!r}, got "
            f"{tuple(x.shape)}"
        )


def _check_per_group(g: Tensor, t: Target, granularity: object, n_groups: int) -> None:
    if tuple(g.shape) != (n_groups,):
        raise ValueError(
            f"{granularity}: expected g of shape ({n_groups},) for layer {t.name!r}, got "
            f"{tuple(g.shape)}"
        )
