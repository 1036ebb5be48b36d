"""Importances that look at the weights alone, beyond their magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .granularity import element
from .importance import PruneConfig, register
from .protocols import Granularity, Stats
from .saliency import measured, only_filters
from .targets import Target


@register
@dataclass(frozen=True)
class LAMP(PruneConfig):
    """Layer-adaptive magnitude: w_u^2 / sum of w_v^2 over the layer's v with |w_v| >= |w_u|.

    Within a layer the order is that of |w|; between layers the score is a share of what would be
    left, so the scope is "global" unless given. The best entry of every layer scores 1. For
    groups, w^2 is the sum over the group. Of equal entries the later one counts as the smaller.
    Cost: a sort per layer. Lee, Park, Mo, Ahn, Shin, "Layer-adaptive Sparsity for the
    Magnitude-based Pruning", ICLR 2021.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is None:
            object.__setattr__(self, "scope", "global")

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """Of single entries, shape of W, in [0, 1]."""
        return self.group_score(t, element, stats).reshape(t.shape)

    def group_score(self, t: Target, granularity: Granularity, stats: Stats | None) -> Tensor:
        """(n_groups,) in [0, 1]."""
        squares = granularity.reduce(t.values().square(), t, "sum").reshape(-1)
        order = squares.argsort(descending=True, stable=True)
        ranked = squares[order]
        # Zeros have no share of anything; a layer of zeros would divide 0 by 0.
        shares = torch.where(ranked > 0, ranked / ranked.cumsum(0), 0.0)
        return torch.empty_like(squares).scatter_(0, order, shares)


@register
@dataclass(frozen=True)
class FPGM(PruneConfig):
    """Distance of a filter to all others: sum_j ||W_k - W_j||_2, j in the same conv group.

    A filter near the geometric median of its layer can be replaced by the others. Only filters of
    one conv group read the same channels, so only those are compared. Cost: O(K^2/G) distances.
    He, Liu, Wang, Hu, Yang, "Filter Pruning via Geometric Median for Deep Convolutional Neural
    Networks Acceleration", CVPR 2019.

    Raises:
        ValueError: another granularity than "filter", or a layer with one filter per conv group.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        only_filters(self)

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """(K,)."""
        groups, rows = t.grouped_shape[:2]
        if rows < 2:
            raise ValueError(
                f"FPGM: expected at least two filters per conv group in layer {t.name!r}, got "
                f"{rows}; give this layer another importance"
            )
        filters = t.values().reshape(groups, rows, -1)
        exact = "donot_use_mm_for_euclid_dist"  # equal filters must be at distance 0
        return torch.cdist(filters, filters, compute_mode=exact).sum(2).reshape(-1)


@register
@dataclass(frozen=True)
class BNScale(PruneConfig):
    """Network slimming: |gamma| of the batch norm that follows the layer.

    The batch norm is found by running one calibration batch. Meant after training with an L1
    penalty on gamma, which makes the scales of useless maps small. Liu, Li, Shen, Huang, Yan,
    Zhang, "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.

    Raises:
        ValueError: another granularity than "filter". The collector refuses layers that no batch
            norm with a scale reads.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        only_filters(self)

    @property
    def needs(self) -> frozenset[str]:
        """The scales."""
        return frozenset({"bn_scale"})

    def score(self, t: Target, stats: Stats | None) -> Tensor:
        """|gamma|, (K,)."""
        return measured(stats, "bn_scale", t)
