"""Kernels predicted from a few of their positions: a fixed smooth basis, learned weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..method import Factors, Method, Stage, register_method
from ..problem import LayerProblem
from ..solvers.ridge import (
    empirical_covariance,
    gaussian_kernel,
    observed_positions,
    product_of,
    ridge_dictionary,
    telling_positions,
)

Kernel = Literal["gaussian", "covariance"]


@dataclass(frozen=True)
class Denil(Method):
    """Every kernel slice as a sum of a fixed functions over the kh kw positions: ``W = U V``.

    U (kh kw, a) is the dictionary of kernel ridge regression from a observed positions that lie
    evenly on the kernel (see `predict_weights`); V is learned, and starts as the least-squares
    solution for the layer's weights. The weights at the observed positions themselves would be
    another start, never a closer one.

    Chain: per channel a fixed filters kh x kw, then a learned 1x1 S a -> T. MACs
    ``S a (kh kw + T) P_out``, S a T learned weights, full rank kh kw, exact there at lam = 0. A
    Gaussian is separable: where the observed positions are all pairs of some rows and some columns
    (kh, kw > 1, lam = 0), the fixed filters run as kh x 1 and 1 x kw.

    With `across_channels` the positions are those of whole filters, S kh kw of them, and the
    kernel is the covariance over the layer's T filters; observed are those that tell most
    (`telling_positions`). Chain: a fixed filters kh x kw over all channels, then a learned 1x1
    a -> T, the form of `ChannelSVD`: ``a (S kh kw + T) P_out`` MACs, a T learned weights, full rank
    min(T, S kh kw). At the same rank `ChannelSVD` is closer: its first stage is free. Denil,
    Shakibi, Dinh, Ranzato, de Freitas, "Predicting parameters in deep learning", NIPS 2013.

    Attributes:
        kernel: "gaussian", or "covariance": the second moments of all slices of the layer, which
            fits it better and is not smooth.
        bandwidth: of the Gaussian, in positions.
        lam: ridge.
        across_channels: one dictionary for whole filters; with kernel "covariance".
    """

    kernel: Kernel = "gaussian"
    bandwidth: float = 1.0
    lam: float = 0.0
    across_channels: bool = False
    name: ClassVar[str] = "denil"

    def __post_init__(self) -> None:
        if self.kernel not in ("gaussian", "covariance"):
            raise ValueError(
                f"Denil: expected kernel 'gaussian' or 'covariance', got {self.kernel!r}"
            )
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(f"Denil: expected bandwidth > 0, got {self.bandwidth}")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ValueError(f"Denil: expected lam >= 0, got {self.lam}")
        if not isinstance(self.across_channels, bool):
            raise TypeError(
                f"Denil: expected across_channels a bool, got {self.across_channels!r}"
            )
        if self.across_channels and self.kernel != "covariance":
            raise ValueError(
                "Denil: expected kernel 'covariance' with across_channels, got "
                f"{self.kernel!r}: channels have no order in which weights could be smooth"
            )

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """All positions, or as many as there are independent filters."""
        if self.across_channels:
            return (min(p.T, p.S * p.kh * p.kw),)
        return (p.kh * p.kw,)

    def _product(self, p: LayerProblem, rank: int) -> tuple[Tensor, Tensor] | None:
        if self.kernel != "gaussian" or self.lam > 0 or min(p.kh, p.kw) == 1:
            return None
        return product_of(observed_positions((p.kh, p.kw), rank), (p.kh, p.kw))

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """One or two fixed depthwise stages, or one that is not, and a learned 1x1."""
        if self.across_channels:
            (rank,) = ranks
            return [
                Stage(p.S, rank, (p.kh, p.kw), axes="hw", fixed=True), Stage(rank, p.T),
            ]  # fmt: skip
        wide = p.S * ranks[0]
        pair = self._product(p, ranks[0])
        if pair is None:
            return [Stage(p.S, wide, (p.kh, p.kw), p.S, "hw", fixed=True), Stage(wide, p.T)]
        tall = p.S * len(pair[0])
        return [
            Stage(p.S, tall, (p.kh, 1), p.S, "h", fixed=True),
            Stage(tall, wide, (1, p.kw), tall, "w", fixed=True),
            Stage(wide, p.T),
        ]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The dictionary, and least squares for the weights."""
        if self.across_channels:
            filters = p.weight[group].flatten(1).T  # (S kh kw, T)
            kernel = empirical_covariance(filters)
            basis = ridge_dictionary(kernel, telling_positions(kernel, ranks[0]), self.lam)
            learned = filters.T @ torch.linalg.pinv(basis).T
            return Factors(
                [basis.T.reshape(-1, p.S, p.kh, p.kw), learned[:, :, None, None]]
            )
        grid, weight = (p.kh, p.kw), p.weight[group].flatten(2)
        pair = self._product(p, ranks[0])
        if pair is None:
            kernel = (
                gaussian_kernel(grid, self.bandwidth)
                if self.kernel == "gaussian"
                else empirical_covariance(p.weight.reshape(-1, p.kh * p.kw).T)
            )
            basis = ridge_dictionary(kernel, observed_positions(grid, ranks[0]), self.lam)
            fixed = [basis.T.reshape(-1, 1, p.kh, p.kw).repeat(p.S, 1, 1, 1)]
        else:
            tall, flat = (
                ridge_dictionary(gaussian_kernel((n, 1), self.bandwidth), some, 0.0)
                for n, some in zip(grid, pair, strict=True)
            )
            basis = torch.kron(tall, flat)
            fixed = [
                tall.T.repeat(p.S, 1)[:, None, :, None],
                flat.T.repeat(p.S * len(pair[0]), 1)[:, None, None, :],
            ]
        learned = weight @ torch.linalg.pinv(basis).T
        return Factors([*fixed, learned.flatten(1)[:, :, None, None]])


register_method("denil", Denil)
