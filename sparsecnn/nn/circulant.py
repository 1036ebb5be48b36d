"""``CirculantLinear`` and ``CirculantPointwise``: d x d matrices made of d numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from sparsecnn.nn._common import inherit, own_bias

# From this d on y is computed by FFT, below as a dense product with circ(q). Measured on an AMD
# EPYC (AVX-512), one thread, float32, torch 2.13, d from 64 to 2048, in us, dense with making
# circ(q): d = 96 at batch 1 / 64: FFT 11 / 23, dense 9 / 22; d = 128: 11 / 23 and 10 / 32;
# d = 256: 12 / 35 and 16 / 99; d = 1024: 16 / 124 and 147 / 1700; d = 2048: 36 / 274 and 1063 /
# 8317. A prime d is the worst case: 1021: 140 / 1049 and 148 / 1707.
FFT_FROM = 128


def circulant(q: Tensor) -> Tensor:
    """The matrix with first column q: ``circ(q)[i, j] = q[(i - j) mod d]``, q (d,) to (d, d).

    ``circ(q) @ x`` is the circular convolution of q and x; the convention of
    `scipy.linalg.circulant`. The rows are windows of one vector of 2 d - 1 numbers.
    """
    turned = q.flip(0)
    return torch.cat([turned, turned[:-1]]).unfold(0, len(q), 1).flip(0)


def nearest_circulant(matrix: Tensor) -> Tensor:
    """The q (d,) with the least ||matrix - circ(q)||: the means over the d wrapped diagonals."""
    d = len(matrix)
    rows = torch.arange(d, device=matrix.device)
    return matrix[rows, (rows - rows[:, None]) % d].mean(1)


class _Circulant(nn.Module):
    """y = circ(q) D x + bias over one dimension of x."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    signs: Tensor | None

    def __init__(
        self,
        channels: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sign_flip: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(
                f"{type(self).__name__}: expected channels an integer >= 1, got {channels!r}"
            )
        self.channels = channels
        if not isinstance(sign_flip, bool):
            raise TypeError(
                f"{type(self).__name__}: expected sign_flip a bool, got {sign_flip!r:.80}"
            )
        device = torch.get_default_device() if device is None else torch.device(device)
        kind: Any = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        if device.type == "meta":  # nothing is drawn: a file may ask for any size
            self.weight = nn.Parameter(torch.empty(channels, **kind))
            self.bias = nn.Parameter(torch.empty(channels, **kind)) if bias else None
            self.register_buffer("signs", torch.empty(channels, **kind) if sign_flip else None)
            return
        source = torch.Generator().manual_seed(seed)
        # The variance of nn.Linear's initial weights: every entry of q stands in every row.
        bound = 1 / math.sqrt(channels)
        # On the CPU, whatever device is the default: the same numbers everywhere.
        cpu: Any = {"generator": source, "device": "cpu"}
        signs = torch.randint(2, (channels,), **cpu) * 2 - 1
        drawn = (2 * torch.rand(2, channels, dtype=torch.float64, **cpu) - 1) * bound
        self.weight = nn.Parameter(drawn[0].to(**kind))
        self.bias = nn.Parameter(drawn[1].to(**kind)) if bias else None
        self.register_buffer("signs", signs.to(**kind) if sign_flip else None)

    @classmethod
    def _projected(cls, layer: Any, matrix: Tensor, sign_flip: bool, seed: int) -> Self:
        """A layer with the flags, bias and hooks of another, nearest to its matrix (d, d)."""
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"{cls.__name__}: expected as many outputs as inputs, got {matrix.shape[1]} inputs "
                f"and {matrix.shape[0]} outputs"
            )
        self = cls(
            len(matrix), False, matrix.device, matrix.dtype, sign_flip=sign_flip, seed=seed
        )
        with torch.no_grad():
            # D D = 1: the matrix that circ(q) must be near to is W D.
            q = nearest_circulant((matrix if self.signs is None else matrix * self.signs).double())
            self.weight.copy_(q)
        self.weight.requires_grad_(layer.weight.requires_grad)
        self.bias = own_bias(layer)
        inherit(self, layer)
        return self

    @torch.no_grad()
    def _matrix(self) -> Tensor:
        """(d, d), detached, sharing no memory."""
        matrix: Tensor = self._signed().contiguous()
        return matrix

    def _signed(self) -> Tensor:
        matrix = circulant(self.weight)
        return matrix if self.signs is None else matrix * self.signs

    def _convolved(self, x: Tensor, dim: int) -> Tensor:
        """circ(q) D x along a negative dimension by FFT; half precision in float32."""
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        ones = (-1,) + (1,) * (-1 - dim)
        if self.signs is not None:
            x = x * self.signs.reshape(ones)
        spectrum = torch.fft.rfft(self.weight.to(exact)).reshape(ones)
        spectrum = spectrum * torch.fft.rfft(x.to(exact), dim=dim)
        y: Tensor = torch.fft.irfft(spectrum, n=self.channels, dim=dim).to(x.dtype)
        return y

    def _check(self, x: Tensor, dim: int, wanted: str) -> None:
        if x.dim() < -dim or x.shape[dim] != self.channels:
            raise ValueError(
                f"{type(self).__name__}: expected x {wanted} with {self.channels} channels, got "
                f"shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Channels, bias and sign flips."""
        return (
            f"{self.channels}, bias={self.bias is not None}, sign_flip={self.signs is not None}"
        )


class CirculantLinear(_Circulant):
    """A square ``nn.Linear`` whose matrix is circulant.

        y = circ(q) D x + bias = irfft(rfft(q) * rfft(D x)) + bias,   circ(q)[i, j] = q[(i-j) mod d]

    with d weights instead of d^2. D flips the signs of random inputs: without it a circulant sees
    every input through shifts of one filter, which structured inputs resonate with. (Cheng, Yu,
    Feris, Kumar, Choudhary, Chang, "An Exploration of Parameter Redundancy in Deep Networks with
    Circulant Projections", ICCV 2015.) A trained dense layer has little in common with its
    projection, `from_dense`: train it on.

    State dict: ``weight`` (d,), which is q, ``bias`` (d,), ``signs`` (d,). Half precision is
    computed in float32 by the FFT.

    Args:
        channels: d, inputs and outputs.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
        sign_flip: with D, or with the identity in its place.
        seed: of D and of the initial weights, which are those of ``nn.Linear`` in distribution.

    Raises:
        ValueError: channels < 1; inputs of another size.

    Cost: O(d log d) per row from d = 128 (`FFT_FROM`) on, below O(d^2).
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, sign_flip: bool = True, seed: int = 0) -> Self:
        """The nearest one: q is the means over the wrapped diagonals of W D.

        Raises:
            TypeError: no ``nn.Linear``.
            ValueError: inputs and outputs of different number.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"{cls.__name__}: expected linear an nn.Linear, got {type(linear).__name__}"
            )
        return cls._projected(linear, linear.weight.detach(), sign_flip, seed)

    def to_dense(self) -> nn.Linear:
        """The ``nn.Linear`` with weight circ(q) D, and this layer's flags and hooks."""
        matrix = self._matrix()
        linear = nn.Linear(len(matrix), len(matrix), self.bias is not None, "meta", matrix.dtype)
        linear.weight = nn.Parameter(matrix, requires_grad=self.weight.requires_grad)
        linear.register_parameter("bias", self.bias)
        inherit(linear, self)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to the same shape."""
        self._check(x, -1, "(..., d)")
        if self.channels < FFT_FROM:
            return F.linear(x, self._signed(), self.bias)
        y = self._convolved(x, -1)
        return y if self.bias is None else y + self.bias


class CirculantPointwise(_Circulant):
    """A 1x1 convolution of d to d channels whose matrix is circulant: `CirculantLinear` per pixel.

    Args:
        channels: d, inputs and outputs.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
        sign_flip: with D, or with the identity in its place.
        seed: of D and of the initial weights.

    Raises:
        ValueError: channels < 1; inputs of another size.

    Cost: O(d log d) per pixel from d = 128 (`FFT_FROM`) on, below O(d^2).
    """

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, sign_flip: bool = True, seed: int = 0) -> Self:
        """The nearest one: q is the means over the wrapped diagonals of W D.

        Raises:
            TypeError: no ``nn.Conv2d``.
            NotImplementedError: a kernel other than 1x1, or stride, padding or groups.
            ValueError: inputs and outputs of different number.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(
                f"{cls.__name__}: expected conv an nn.Conv2d, got {type(conv).__name__}"
            )
        for name, plain in (("kernel_size", (1, 1)), ("stride", (1, 1)), ("groups", 1)):
            if getattr(conv, name) != plain:
                raise NotImplementedError(
                    f"{cls.__name__}: expected {name} {plain}, got {getattr(conv, name)}"
                )
        if any(conv._reversed_padding_repeated_twice):
            raise NotImplementedError(
                f"{cls.__name__}: expected padding 0, got {conv.padding!r}"
            )
        return cls._projected(conv, conv.weight.detach()[:, :, 0, 0], sign_flip, seed)

    def to_dense(self) -> nn.Conv2d:
        """The 1x1 convolution with weight circ(q) D, and this layer's flags and hooks."""
        matrix = self._matrix()
        d = len(matrix)
        conv = nn.Conv2d(
            d, d, 1, bias=self.bias is not None, device="meta", dtype=matrix.dtype
        )
        conv.weight = nn.Parameter(
            matrix[:, :, None, None], requires_grad=self.weight.requires_grad
        )
        conv.register_parameter("bias", self.bias)
        inherit(conv, self)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        """(N, d, H, W) or (d, H, W) to the same shape."""
        self._check(x, -3, "(N, d, H, W) or (d, H, W)")
        if self.channels < FFT_FROM:
            return F.conv2d(x, self._signed()[:, :, None, None], self.bias)
        y = self._convolved(x, -3)
        return y if self.bias is None else y + self.bias[:, None, None]
