"""Low rank of the responses instead of the weights, with the ReLU taken into account."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..method import Factors, Method, Stage, chain_macs, register_method
from ..moments import Moments
from ..problem import LayerProblem, UnsupportedLayer
from ..solvers.response import (
    AffineLowRank,
    principal_projection,
    reduced_rank_regression,
    zhang_nonlinear,
)
from ..solvers.svd import vh_closed_form, vh_matrix

Variant = Literal["2d", "3d"]


@dataclass(frozen=True)
class Zhang(Method):
    r"""The layer's responses through r dimensions: ``y ~ P (Q' W x) + b + P Q' b0``.

    The map ``M = P Q'`` and b minimize the error of the responses, or with `nonlinear` of what the
    ReLU makes of them, over calibration data (Zhang, Zou, He, Sun, "Accelerating very deep
    convolutional networks for classification and detection", TPAMI 2016). Chain "2d": r filters
    kh x kw, then 1x1, ``r (kh kw S + T)`` MACs per output position; "3d" splits the filters once
    more, V x H by the closed form of Tai et al. (ICLR 2016), K of them: vertical S -> K, horizontal
    K -> r, 1x1 r -> T.

    Where the moments have responses from a compressed network beside the original ones, the map
    goes from the former to the latter (asymmetric): it corrects errors of the layers before, and
    then differs from the layer even at full rank. Otherwise rank T is the layer.

    Ranks: (r,), or (r, K) for "3d".

    Attributes:
        nonlinear: a ReLU follows. A batch norm between them is folded into the layer first.
        variant: "2d" or "3d".

    Raises:
        TypeError: nonlinear is no bool.
        ValueError: an unknown variant.

    Cost: O(n T^2) and an SVD (T, T), 50 times with `nonlinear`; "3d" one more SVD.
    """

    nonlinear: bool = True
    variant: Variant = "2d"
    name: ClassVar[str] = "zhang"

    @property
    def needs_data(self) -> bool:
        """It works on responses."""
        return True

    @property
    def needs_patches(self) -> bool:
        """Responses are enough."""
        return False

    def __post_init__(self) -> None:
        if not isinstance(self.nonlinear, bool):
            raise TypeError(f"Zhang: expected nonlinear a bool, got {self.nonlinear!r}")
        if self.variant not in ("2d", "3d"):
            raise ValueError(f"Zhang: expected variant '2d' or '3d', got {self.variant!r}")

    def check(self, p: LayerProblem) -> None:
        """Raise `UnsupportedLayer` for "3d" where there is no kernel to split."""
        if self.variant == "3d" and p.kh * p.kw == 1:
            raise UnsupportedLayer(
                f"factorize: {p.name}: method 'zhang' of variant '3d' splits kernels, the layer is "
                "1x1; use variant '2d'"
            )

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """T, and for "3d" min(S kh, T kw)."""
        return (p.T,) if self.variant == "2d" else (p.T, min(p.S * p.kh, p.T * p.kw))

    def clamp(self, p: LayerProblem, ranks: Sequence[int]) -> tuple[int, ...]:
        """Between 1 and full; r filters need no more than ``r kw`` pairs."""
        clamped = super().clamp(p, ranks)
        if self.variant == "2d":
            return clamped
        return clamped[0], min(clamped[1], clamped[0] * p.kw)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Filters, or vertical and horizontal ones, then 1x1."""
        if self.variant == "2d":
            return [Stage(p.S, ranks[0], (p.kh, p.kw), axes="hw"), Stage(ranks[0], p.T)]
        rank, pairs = ranks
        return [
            Stage(p.S, pairs, (p.kh, 1), axes="h"),
            Stage(pairs, rank, (1, p.kw), axes="w"),
            Stage(rank, p.T),
        ]

    def ranks_for(self, p: LayerProblem, speedup: float) -> tuple[int, ...]:
        """The largest ranks at a speedup in MACs, both parts of "3d" made equally much faster.

        The paper makes the split into filters and 1x1, and that of the filters into V x H, each
        sqrt(v) times faster. The 1x1 stage gains by the first only: here it is the least common
        speedup of the parts at which the whole chain is v times faster.

        Args:
            p: the layer; needs no data.
            speedup: v > 1.

        Raises:
            ValueError: rank 1 is dearer.
        """
        allowed = p.dense_macs / speedup

        def ranks(part: float) -> tuple[int, ...]:
            each = chain_macs(p, Zhang(variant="2d").stages(p, (1,)))
            rank = min(p.T, max(1, math.floor(p.dense_macs / (part * each) + 1e-9)))
            return (rank,) if self.variant == "2d" else (rank, self.pairs_for(p, rank, part))

        # Where both ranks are 1, and where the 1x1 stage would be free.
        high, low = float(p.dense_macs), speedup if self.variant == "2d" else math.sqrt(speedup)
        least = chain_macs(p, self.stages(p, ranks(high)))
        if least > allowed:
            raise ValueError(
                f"factorize: {p.name}: expected a target within reach of method 'zhang', got "
                f"{speedup:g} times fewer MACs; rank 1 has {least} of {allowed:.0f} allowed"
            )
        if chain_macs(p, self.stages(p, ranks(low))) <= allowed:
            return ranks(low)
        for _ in range(60):
            middle = (low + high) / 2
            if chain_macs(p, self.stages(p, ranks(middle))) <= allowed:
                high = middle
            else:
                low = middle
        return ranks(high)

    def pairs_for(self, p: LayerProblem, rank: int, speedup: float) -> int:
        """K at which V x H is so many times faster than r filters kh x kw; at least 1."""
        pair = chain_macs(p, self.stages(p, (rank, 1))[:2])
        filters = rank * p.dense_macs // p.T
        _, bound = self.clamp(p, (rank, p.S * p.kh))
        return min(bound, max(1, math.floor(filters / (speedup * pair) + 1e-9)))

    def spectra(self, p: LayerProblem) -> list[Tensor]:
        """Eigenvalues of the responses' covariance, and for "3d" squared values of V x H."""
        values = [pca_eigenvalues(p)]
        if self.variant == "3d":
            energies = [torch.linalg.svdvals(vh_matrix(w)).square() for w in p.weight]
            values.append(torch.stack(energies).sum(0))
        return values

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """The map, multiplied into the filters.

        Raises:
            ValueError: no moments, those of another layer, or fewer samples than the rank needs.
        """
        found = self._map(p, ranks[0], group)
        weight = p.weight[group]
        filters = torch.tensordot(found.right, weight, dims=1)
        own = torch.zeros(p.T, dtype=weight.dtype)
        if p.bias is not None:
            own = p.bias.reshape(p.groups, p.T)[group]
        bias = found.bias + found.left @ (found.right @ own)
        if self.variant == "2d":
            filters, left = _balanced(filters, found.left)
            return Factors([filters, left[:, :, None, None]], bias=bias)
        # P has orthonormal columns: what V x H loses of the filters, the layer loses.
        vertical, horizontal, _ = vh_closed_form(filters, ranks[1])
        horizontal, left = _balanced(horizontal, found.left)
        return Factors(
            [vertical[:, :, :, None], horizontal[:, :, None, :], left[:, :, None, None]],
            bias=bias,
        )

    def _map(self, p: LayerProblem, rank: int, group: int) -> AffineLowRank:
        moments = moments_of(p)
        if rank == p.T and not moments.asymmetric:
            identity = torch.eye(p.T, dtype=p.weight.dtype)
            return AffineLowRank(identity, identity, p.weight.new_zeros(p.T))
        count = min(moments.count, moments.limit)
        if count <= rank:
            raise ValueError(
                f"factorize: {p.name}: expected more than {rank} calibration samples for rank "
                f"{rank}, got {count}; pass more images or positions"
            )
        if not self.nonlinear and not moments.asymmetric:
            return principal_projection(moments.cov_out()[group], moments.mean_out()[group], rank)
        y, y_hat = (part[group].T for part in moments.responses())
        if self.nonlinear:
            return zhang_nonlinear(y, y_hat, rank)
        return AffineLowRank(*reduced_rank_regression(y, y_hat, rank)[:3])


def moments_of(p: LayerProblem) -> Moments:
    """The calibration statistics of a layer.

    Raises:
        ValueError: there are none, or those of another layer.
    """
    if p.moments is None:
        raise ValueError(
            f"factorize: {p.name}: expected calibration data for methods on responses, got none; "
            "pass calib"
        )
    shape = tuple(p.moments.mean_out().shape)
    if shape != (p.groups, p.T):
        raise ValueError(
            f"factorize: {p.name}: expected moments of {p.groups} groups of {p.T} filters, got "
            f"{shape[0]} of {shape[1]}"
        )
    return p.moments


def pca_eigenvalues(p: LayerProblem) -> Tensor:
    """Eigenvalues (T,) of the covariance of the responses, descending, summed over groups.

    Raises:
        ValueError: see `moments_of`.
    """
    values: Tensor = torch.linalg.eigvalsh(moments_of(p).cov_out())
    return values.flip(-1).clamp(min=0).sum(0)


def _balanced(filters: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Share the scale of component i evenly: ``filters[i]`` and ``left[:, i]`` of equal norm."""
    ours = filters.flatten(1).norm(dim=1)
    theirs = left.norm(dim=0)
    scale = torch.where((ours > 0) & (theirs > 0), (theirs / ours).sqrt(), 1.0)
    shape = (-1,) + (1,) * (filters.dim() - 1)
    return filters * scale.reshape(shape), left / scale


register_method("zhang", Zhang)
