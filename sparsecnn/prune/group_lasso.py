"""The group lasso: whole filters, channels, kernel positions or layers are pulled to zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .budget import check_share
from .granularity import parse
from .protocols import Granularity
from .regularization import Mode, check_choice, check_every, check_number, zero
from .selection import group_sizes
from .targets import Target


@dataclass(frozen=True)
class GroupLasso:
    """lam * sum_g ||w_g||_2 over the groups of one or several granularities.

    Mode "prox" is forward-backward splitting: after the optimizer's step every group becomes
    max(0, 1 - lr*lam / ||w_g||) * w_g, so that a group with ||w_g|| <= lr*lam is exactly 0 (Zhou,
    Alvarez, Porikli, "Less Is More: Towards Compact CNNs", ECCV 2016). Mode "subgrad" adds the
    penalty to the loss, which never gives an exact zero; `zero_below` then cuts small entries
    after each step, as in Wen et al., "Learning Structured Sparsity in Deep Neural Networks",
    NIPS 2016 (1e-4 in the authors' code). Growing columns of the lowered weight (granularity
    "shape") away is Lebedev & Lempitsky, "Fast ConvNets Using Group-wise Brain Damage", CVPR 2016.

    Several granularities are applied one after the other. That is the prox of their sum if every
    group of one lies inside a group of the next, smaller ones first; for groups that overlap
    (filter with shape) it is an approximation whose zeros are zeros of either.

    Groups hold weights only: bias and batch norm of a map stay until the map is removed (ours;
    Zhou et al. count the bias to its neuron). Cost: O(entries) per granularity and step.

    Attributes:
        granularity: a granularity or its name, or a sequence of them.
        lam: weight of the penalty, >= 0; one for all granularities or one for each.
        mode: "prox" or "subgrad".
        zero_below: entries with |w| < zero_below become 0; mode "subgrad" only.
        scale_by_size: times sqrt(|g|), so that groups of different size compete fairly (ours).
        every: apply the prox after every so many steps, by lr * lam * every: the sum of the
            steps' rates where lr has not changed between. Mode "prox" only.
        growth: added to lam at each step. Mode "prox" only: a penalty does not know the step.
        target_sparsity: a layer that has this share of its groups at zero is left alone from then
            on, so that a growing lam ends. Mode "prox" only.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or an option of the other mode.
    """

    granularity: str | Granularity | Sequence[str | Granularity]
    lam: float | Sequence[float]
    mode: Mode = "prox"
    zero_below: float = 0.0
    scale_by_size: bool = False
    every: int = 1
    growth: float = 0.0
    target_sparsity: float | None = None

    def __post_init__(self) -> None:
        given = self.granularity
        several = list(given) if isinstance(given, (list, tuple)) else [given]
        if not several:
            raise ValueError("GroupLasso: expected at least one granularity, got none")
        parsed = tuple(
            g if isinstance(g, Granularity) and not isinstance(g, type) else parse(g)
            for g in several
        )
        strengths = (
            tuple(self.lam) if isinstance(self.lam, (list, tuple)) else (self.lam,) * len(parsed)
        )
        if len(strengths) != len(parsed):
            raise ValueError(
                f"GroupLasso: expected one lam or {len(parsed)}, one per granularity, got "
                f"{len(strengths)}"
            )
        for lam in strengths:
            check_number("GroupLasso", "lam", lam)
        check_choice("GroupLasso", "mode", self.mode, get_args(Mode))
        check_number("GroupLasso", "zero_below", self.zero_below)
        check_number("GroupLasso", "growth", self.growth)
        check_every("GroupLasso", self.every)
        if self.target_sparsity is not None:
            check_share(self.target_sparsity, "target_sparsity", "GroupLasso")
        self._check_mode()
        object.__setattr__(self, "granularity", parsed)
        object.__setattr__(self, "lam", strengths)

    def _check_mode(self) -> None:
        if self.mode == "prox" and self.zero_below:
            raise ValueError(
                f"GroupLasso: expected zero_below 0 in mode 'prox', got {self.zero_below:g}; a "
                "proximal step gives exact zeros by itself"
            )
        if self.mode == "subgrad" and (
            self.every != 1 or self.growth or self.target_sparsity is not None
        ):
            raise ValueError(
                "GroupLasso: expected every, growth and target_sparsity only in mode 'prox', got "
                f"every={self.every}, growth={self.growth:g}, "
                f"target_sparsity={self.target_sparsity} in mode 'subgrad'"
            )

    @property
    def _terms(self) -> list[tuple[Granularity, float]]:
        assert isinstance(self.granularity, tuple) and isinstance(self.lam, tuple)
        return list(zip(self.granularity, self.lam, strict=True))

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """The penalty lam * sum_g ||w_g||_2 in mode "subgrad", else 0.

        The gradient of a group at zero is 0.
        """
        total = zero(targets)
        if self.mode == "prox":
            return total
        for granularity, lam in self._terms:
            for t in targets:
                # torch's vector_norm has the subgradient 0 at 0; sqrt(sum of squares) has NaN.
                norm = granularity.reduce(t.dense, t, "l2")
                total = total + lam * (norm * self._scale(granularity, t)).sum()
        return total

    @torch.no_grad()
    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Shrink every group by lr*lam, or cut entries below `zero_below` in mode "subgrad"."""
        if self.mode == "subgrad":
            for t in targets:
                t.dense.masked_fill_(t.dense.abs() < self.zero_below, 0)
            return
        if (step + 1) % self.every:
            return
        for granularity, lam in self._terms:
            threshold = lr * (lam + self.growth * step) * self.every
            for t in targets:
                self._shrink_(granularity, t, threshold)

    def _shrink_(self, granularity: Granularity, t: Target, threshold: float) -> None:
        norm = granularity.reduce(t.dense, t, "l2")
        if self.target_sparsity is not None:
            # Rounded as `TopK` does: a layer that it has pruned to the same share is done.
            if int((norm == 0).sum()) >= math.ceil(self.target_sparsity * norm.numel() - 0.5):
                return
        limit = threshold * self._scale(granularity, t)
        # NaN compares false, so that a diverged group stays visible.
        dead = norm <= limit
        t.dense.mul_(granularity.expand(1 - limit / norm, t))
        # Overwrites whatever a norm of 0 gave, and the -0 that a product would leave.
        t.dense.masked_fill_(granularity.expand(dead, t), 0)

    def _scale(self, granularity: Granularity, t: Target) -> Tensor:
        """(n_groups,) sqrt(|g|), or the scalar 1."""
        if not self.scale_by_size:
            return t.dense.new_ones(())
        return group_sizes(granularity, t).to(t.dense).sqrt()
