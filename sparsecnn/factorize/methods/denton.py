"""Methods that sort filters and channels first: shared colours, and blocks of low rank.

Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting Linear Structure Within Convolutional Networks
for Efficient Evaluation", NIPS 2014. Its third scheme, one SVD of a linear layer, is `fc_svd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..method import Factors, Method, Stage, register_method
from ..problem import LayerProblem, UnsupportedLayer
from ..solvers.denton import (
    bicluster,
    blocks_of,
    exact_terms,
    monochromatic,
    outer_product,
    two_svds,
)


@dataclass(frozen=True)
class Monochromatic(Method):
    """Few mixes of the input channels, the colours; every filter reads one: ``W_t ~ c_j v_t^T``.

    1x1 S -> C', then kh x kw with C' groups of T/C' filters, then the filters back in their order.
    MACs ``S C' P_in + T kh kw P_out``. Meant for first layers, whose filters read few channels;
    their own rank-1 error is never undone: even at C' = T, the greatest rank, the chain equals the
    layer only where every filter is one mix of the channels times one kernel (S = 1, or 1x1).

    The rank is C'. All colours have as many filters: C' divides T, and other ranks are rounded
    down to the next divisor.
    """

    name: ClassVar[str] = "mono"

    @property
    def permuted(self) -> tuple[int, ...]:
        """The filters, back in their order."""
        return (2,)

    def check(self, p: LayerProblem) -> None:
        """No grouped layers."""
        _check_ungrouped(p, self.name)

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """A colour for each filter."""
        return (p.T,)

    def clamp(self, p: LayerProblem, ranks: Sequence[int]) -> tuple[int, ...]:
        """Between 1 and T, rounded down to a divisor of T."""
        (rank,) = super().clamp(p, ranks)
        return (next(c for c in range(rank, 0, -1) if p.T % c == 0),)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """1x1, then each filter on its colour.

        Raises:
            ValueError: the number of colours does not divide that of filters.
        """
        (colours,) = ranks
        if not 1 <= colours <= p.T or p.T % colours:
            raise ValueError(
                f"factorize: {p.name}: expected a number of colours that divides the {p.T} "
                f"filters, got {colours}"
            )
        return [Stage(p.S, colours), Stage(colours, p.T, (p.kh, p.kw), colours, "hw")]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """Clusters of directions, then colours and labels in turn."""
        found = monochromatic(p.weight[group], ranks[0], seed=p.seed)
        filters = found.labels.argsort(stable=True)
        weights = [found.colours[:, :, None, None], found.taps[filters][:, None]]
        return _sorted_factors(p, weights, {2: filters.argsort()}, filters)


@dataclass(frozen=True)
class _Biclustered(Method):
    """G clusters of input channels times H clusters of filters; blocks of low rank between them.

    Attributes:
        clusters_in: G, divides the input channels.
        clusters_out: H, divides the filters.
    """

    clusters_in: int = 2
    clusters_out: int = 2

    @property
    def permuted(self) -> tuple[int, ...]:
        """Channels by cluster, what is between the clusters, the filters."""
        return (0, 2, 3)

    def __post_init__(self) -> None:
        for name in ("clusters_in", "clusters_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} an integer >= 1, got {value!r}"
                )

    def check(self, p: LayerProblem) -> None:
        """No grouped layers, and clusters of equal size."""
        _check_ungrouped(p, self.name)
        for clusters, channels, what in (
            (self.clusters_in, p.S, "clusters_in to divide the {} input channels"),
            (self.clusters_out, p.T, "clusters_out to divide the {} filters"),
        ):
            if channels % clusters:
                raise UnsupportedLayer(
                    f"factorize: {p.name}: method {self.name!r}: expected "
                    f"{what.format(channels)}, got {clusters}"
                )

    def _block(self, p: LayerProblem) -> tuple[int, int, int, int]:
        """Filters, channels and taps of one block."""
        return p.T // self.clusters_out, p.S // self.clusters_in, p.kh, p.kw

    def _blocks(
        self, p: LayerProblem, group: int, ranks: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks (G H, T/H, S/G, kh, kw), channels and filters in their order."""
        weight = p.weight[group]
        labels = bicluster(
            weight, self.clusters_in, self.clusters_out, ranks=ranks, seed=p.seed
        )
        blocks, channels, filters = blocks_of(weight, *labels)
        return blocks.flatten(0, 1), channels, filters

    def _factors(
        self,
        p: LayerProblem,
        parts: tuple[Tensor, Tensor, Tensor],
        channels: Tensor,
        filters: Tensor,
    ) -> Factors:
        """The chain of first (G H, K1, s), middle (G H, K2, K1 or 1, kh, kw), last (G H, t, K2)."""
        first, middle, last = parts
        size = (self.clusters_in, self.clusters_out)
        rank = last.shape[2]
        # The last stage collects what all clusters of channels have for its cluster of filters.
        shuffle = torch.arange(size[0] * size[1] * rank).reshape(*size, rank)
        weights = [
            first.flatten(0, 1)[:, :, None, None],
            middle.flatten(0, 1),
            last.unflatten(0, size).permute(1, 2, 0, 3).reshape(p.T, -1)[:, :, None, None],
        ]
        orders = {0: channels, 2: shuffle.transpose(0, 1).flatten(), 3: filters.argsort()}
        return _sorted_factors(p, weights, orders, filters)


@dataclass(frozen=True)
class BiclusterOuter(_Biclustered):
    """Biclustering with K outer products per block.

    Channels by cluster; 1x1 with G groups S -> G H K; kh x kw on every channel; channels by
    cluster of filters; 1x1 with H groups G H K -> T; filters back in their order. MACs
    ``S H K P_in + G H K kh kw P_out + T G K P_out``. The rank is K; from the product of the two
    shorter of T/H, S/G and kh kw on, the chain equals the layer.

    Attributes:
        clusters_in: G, divides the input channels.
        clusters_out: H, divides the filters.

    Raises:
        ValueError: fewer than one cluster.
    """

    name: ClassVar[str] = "bicluster_outer"

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """Terms that give any block."""
        return (max(exact_terms(self._block(p)), 1),)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Grouped 1x1, depthwise, grouped 1x1."""
        inner = self.clusters_in * self.clusters_out * ranks[0]
        return [
            Stage(p.S, inner, groups=self.clusters_in),
            Stage(inner, inner, (p.kh, p.kw), inner, "hw"),
            Stage(inner, p.T, groups=self.clusters_out),
        ]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """Clusters, then alternating least squares in every block."""
        blocks, channels, filters = self._blocks(p, group, (ranks[0], ranks[0]))
        a, b, c = outer_product(blocks, ranks[0])
        return self._factors(p, (b.mT, c[:, :, None], a), channels, filters)


@dataclass(frozen=True)
class BiclusterSVD(_Biclustered):
    """Biclustering with two successive SVDs per block.

    Channels by cluster; 1x1 with G groups S -> G H K1; kh x kw with G H groups of K1 -> K2;
    channels by cluster of filters; 1x1 with H groups G H K2 -> T; filters back in their order. MACs
    ``S H K1 P_in + G H K1 K2 kh kw P_out + T G K2 P_out``. Ranks are (K1, K2), full
    (S/G, T/H), less where a block has fewer independent slices.

    Attributes:
        clusters_in: G, divides the input channels.
        clusters_out: H, divides the filters.

    Raises:
        ValueError: fewer than one cluster.
    """

    name: ClassVar[str] = "bicluster_svd"

    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """Independent slices of a block."""
        t, s, kh, kw = self._block(p)
        return max(min(s, t * kh * kw), 1), max(min(t, s * kh * kw), 1)

    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Grouped 1x1, grouped kh x kw, grouped 1x1."""
        rank_in, rank_out = ranks
        blocks = self.clusters_in * self.clusters_out
        return [
            Stage(p.S, blocks * rank_in, groups=self.clusters_in),
            Stage(blocks * rank_in, blocks * rank_out, (p.kh, p.kw), blocks, "hw"),
            Stage(blocks * rank_out, p.T, groups=self.clusters_out),
        ]

    def spectra(self, p: LayerProblem) -> list[Tensor]:
        """Of both unfoldings of the blocks of the means' clusters, summed over the blocks."""
        blocks, _, _ = self._blocks(p, 0, None)
        return [
            torch.linalg.svdvals(matrices.flatten(2)).square().sum(0)
            for matrices in (blocks.transpose(1, 2), blocks)
        ]

    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """Clusters, then two SVDs in every block."""
        blocks, channels, filters = self._blocks(p, group, (ranks[0], ranks[1]))
        return self._factors(p, two_svds(blocks, *ranks), channels, filters)


def _check_ungrouped(p: LayerProblem, method: str) -> None:
    if p.groups > 1:
        raise UnsupportedLayer(
            f"factorize: {p.name}: method {method!r}: expected groups 1, got {p.groups}; clusters "
            "of channels would cross the groups"
        )


def _sorted_factors(
    p: LayerProblem, weights: list[Tensor], orders: dict[int, Tensor], filters: Tensor
) -> Factors:
    """Factors whose last stage has its outputs, and so the bias, in the order of `filters`."""
    kept = {
        place: index
        for place, index in orders.items()
        if not torch.equal(index, torch.arange(len(index)))
    }
    return Factors(weights, kept, None if p.bias is None else p.bias[filters])


register_method("mono", Monochromatic)
register_method("bicluster_outer", BiclusterOuter)
register_method("bicluster_svd", BiclusterSVD)
