"""From scores to masks: the only place that counts.

Counts are exact and ties are broken by position, so a layer of equal weights loses exactly what
was asked (a threshold `score >= t` would keep or drop all of them). Everything runs on the CPU in
float64: the same weights give the same masks on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .budget import Budget
from .granularity import NM, layer
from .importance import SCOPES, Scope
from .protocols import Granularity, Importance, Selector, Stats
from .targets import Target


@dataclass(frozen=True)
class TopK:
    """Keep the groups with the highest scores.

    The lowest groups are dropped, in ascending order of score, until the number of dropped
    entries is nearest to the budget (between two equally near ones the smaller). With groups of
    equal size that is round(sparsity * n_groups) groups. Of equal scores the one that comes first
    is kept, layers taken by name: the result does not depend on the order of `targets`.

    Cost: O(entries) per layer for groups of equal size, O(n log n) in the groups otherwise.

    Attributes:
        scope: "layer": every layer meets the budget; "global": all layers share one budget, so
            that layers with low scores lose more.
        floor: groups that every layer keeps whatever the budget says (their best ones). None
            means 1, so that no layer is cut through, except 0 for the granularity "layer".

    Raises:
        ValueError: a bad scope or floor.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    uses_scores: ClassVar[bool] = True
    uses_budget: ClassVar[bool] = True

    scope: Scope = "layer"
    floor: int | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"TopK: expected scope 'layer' or 'global', got {self.scope!r}")
        if self.floor is not None and (
            isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 0
        ):
            raise ValueError(f"TopK: expected floor to be an int >= 0, got {self.floor!r}")

    def check(self, targets: Sequence[Target], granularity: Granularity, budget: Budget) -> None:
        """Refuse what cannot be selected, before any work.

        Raises:
            ValueError: the granularity "layer" with the scope "layer", a count that a layer does
                not have, or an n:m constraint that a layer or the budget does not fit.
        """
        if granularity == layer and self.scope == "layer":
            raise ValueError(
                "TopK: expected scope 'global' for granularity 'layer', got 'layer'; a layer alone "
                "has nothing to compete with"
            )
        if isinstance(granularity, NM):
            _check_nm(targets, granularity, budget)
        elif budget.count is not None:
            counts = {t.name: granularity.n_groups(t) for t in targets}
            if self.scope == "global":
                counts = {"all layers together": sum(counts.values())}
            short = [f"{name!r} has {n}" for name, n in counts.items() if n < budget.count]
            if short:
                raise ValueError(
                    f"TopK: expected count at most the number of groups, got {budget.count} where "
                    f"{', '.join(short[:5])}"
                )

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per group; see `Selector.select` for shapes.

        Raises:
            ValueError: no budget, or what `check` refuses.
        """
        if budget is None:
            raise ValueError("TopK: expected a budget, got None")
        self.check(targets, granularity, budget)
        ranked = {t: alive_first(scores[t], granularity, t, current.get(t)) for t in targets}
        if isinstance(granularity, NM):
            return {t: _top_of_windows(ranked[t], granularity, t) for t in targets}
        floor = self.floor if self.floor is not None else int(granularity != layer)
        ordered = sorted(targets, key=lambda t: t.name)
        pools = [ordered] if self.scope == "global" else [[t] for t in ordered]
        keep: dict[Target, Tensor] = {}
        for pool in pools:
            keep.update(_keep_best(pool, ranked, granularity, budget, floor))
        return {t: keep[t] for t in targets}


def score_targets(
    importance: Importance,
    targets: Sequence[Target],
    granularity: Granularity,
    stats: Stats | None,
) -> dict[Target, Tensor]:
    """Group scores of all targets.

    Returns:
        (n_groups,) float64 on the CPU per target.

    Raises:
        ValueError: scores of another shape, or NaN (a diverged weight) in a layer.
    """
    scores = {}
    for t in targets:
        own = getattr(importance, "group_score", None)
        score = own(t, granularity, stats) if own is not None else importance.score(t, stats)
        score = score.detach().to("cpu", torch.float64)
        if own is None and score.shape == t.shape:
            score = granularity.reduce(score, t, getattr(importance, "reduction", "mean"))
        if tuple(score.shape) != (granularity.n_groups(t),):
            raise ValueError(
                f"{type(importance).__name__}: expected scores of shape {tuple(t.shape)} or "
                f"({granularity.n_groups(t)},) for layer {t.name!r}, got {tuple(score.shape)}"
            )
        if score.isnan().any():
            raise ValueError(
                f"{type(importance).__name__}: expected scores without NaN, got "
                f"{int(score.isnan().sum())} in layer {t.name!r}; is its weight finite?"
            )
        scores[t] = score
    return scores


def group_sizes(granularity: Granularity, t: Target) -> Tensor:
    """Entries per group, (n_groups,) int64."""
    return granularity.reduce(torch.ones(t.shape, dtype=torch.int64), t, "sum").to(torch.int64)


def alive_first(
    score: Tensor, granularity: Granularity, t: Target, current: Tensor | None
) -> Tensor:
    """Rank groups without a living entry last: what is dead stays dead and counts as dropped."""
    if current is None or bool(current.all()):
        return score
    dead = ~granularity.reduce(current, t, "max").bool()
    return score.masked_fill(dead, -math.inf)


def _keep_best(
    pool: Sequence[Target],
    scores: Mapping[Target, Tensor],
    granularity: Granularity,
    budget: Budget,
    floor: int,
) -> dict[Target, Tensor]:
    """Spend one budget over the layers of `pool`; each keeps its best `floor` groups."""
    sizes = {t: group_sizes(granularity, t) for t in pool}
    if budget.count is not None:
        units = {t: torch.ones_like(sizes[t]) for t in pool}
    else:
        units = sizes
    reserved = {t: top(scores[t], min(floor, scores[t].numel())) for t in pool}
    total = sum(int(units[t].sum()) for t in pool)
    free_scores = torch.cat([scores[t][~reserved[t]] for t in pool])
    free_units = torch.cat([units[t][~reserved[t]] for t in pool])
    free_keep = drop_lowest(free_scores, free_units, budget.to_drop(total))
    keep, start = {}, 0
    for t in pool:
        flags = reserved[t].clone()
        count = int((~flags).sum())
        flags[~reserved[t]] = free_keep[start : start + count]
        start += count
        keep[t] = flags
    return keep


def top(scores: Tensor, k: int) -> Tensor:
    """Flags of exactly k highest scores; of equal ones the first. O(n)."""
    n = scores.numel()
    if k <= 0:
        return torch.zeros(n, dtype=torch.bool)
    if k >= n:
        return torch.ones(n, dtype=torch.bool)
    threshold = scores.kthvalue(n - k + 1).values
    keep = scores > threshold
    missing = k - int(keep.sum())
    keep[(scores == threshold).nonzero().flatten()[:missing]] = True
    return keep


def drop_lowest(scores: Tensor, units: Tensor, target: float) -> Tensor:
    """Drop groups in ascending order of score until the dropped units are nearest to `target`.

    Args:
        scores: (n,) float64 on the CPU.
        units: (n,) int64, what each group counts.
        target: units to drop.

    Returns:
        (n,) bool, True = keep; of equal scores the last goes first. O(n), or O(n log n) if the
        units differ.
    """
    n = scores.numel()
    if n == 0:
        return torch.zeros(0, dtype=torch.bool)
    size = int(units[0])
    if bool((units == size).all()):
        dropped = min(max(math.ceil(target / size - 0.5), 0), n)
        return top(scores, n - dropped)
    # Stable and descending, then reversed: of equal scores the last goes first, as in `_top`.
    order = torch.argsort(scores, descending=True, stable=True).flip(0)
    after = torch.cat([torch.zeros(1, dtype=torch.int64), units[order].cumsum(0)])
    dropped = int((after.double() - target).abs().argmin())
    keep = torch.ones(n, dtype=torch.bool)
    keep[order[:dropped]] = False
    return keep


def _check_nm(targets: Sequence[Target], granularity: NM, budget: Budget) -> None:
    n, m = granularity.n, granularity.m
    if budget.fraction != 1.0 or budget.count is not None:
        raise ValueError(
            f"TopK: expected granularity {granularity} with the whole density {n}/{m} at once, got "
            f"{budget.to_dict()}; use OneShot and leave the budget out"
        )
    sparsity = budget.target_sparsity
    assert sparsity is not None
    if abs(sparsity - (1 - n / m)) > 1e-6:
        raise ValueError(
            f"TopK: expected sparsity {1 - n / m:g} for granularity {granularity}, got "
            f"{sparsity:g}; leave the budget out"
        )
    misfits = [f"{t.name!r} ({t.shape[1]})" for t in targets if t.shape[1] % m]
    if misfits:
        raise ValueError(
            f"TopK: expected a multiple of {m} input channels per conv group for granularity "
            f"{granularity}, got {', '.join(misfits)}; leave these layers out (config None)"
        )


def _top_of_windows(scores: Tensor, granularity: NM, t: Target) -> Tensor:
    """Exactly n of every m consecutive input channels, ties to the first channel."""
    groups, rows, channels, spatial = t.grouped_shape
    m = granularity.m
    windows = scores.reshape(groups * rows, channels // m, m, spatial).movedim(2, 3)
    best = torch.argsort(windows, dim=-1, descending=True, stable=True)[..., : granularity.n]
    keep = torch.zeros(windows.shape, dtype=torch.bool).scatter_(-1, best, True)
    return keep.movedim(3, 2).reshape(-1)


def plan_masks(
    targets: Sequence[Target],
    granularity: Granularity,
    budget: Budget | None,
    importance: Importance | None,
    selector: Selector,
    stats: Stats | None,
    current: Mapping[Target, Tensor],
) -> tuple[dict[Target, Tensor], dict[Target, Tensor]]:
    """Score, select and expand without touching the model.

    Args:
        targets: the weights to decide about.
        granularity: how entries are grouped.
        budget: how much may stay.
        importance: None if the selector needs no scores.
        selector: makes the choice.
        stats: calibration results for whoever needs them.
        current: bool, shape of W on the CPU per target: entries that may live.

    Returns:
        Keep flags per group, and masks of W's shape: kept and allowed to live. On the CPU.

    Raises:
        ValueError: bad scores, or a selector that answers with other shapes or layers.
    """
    scores = {} if importance is None else score_targets(importance, targets, granularity, stats)
    keep = selector.select(targets, scores, granularity, budget, stats, current)
    masks = {}
    for t in targets:
        flags = keep.get(t)
        if flags is None or flags.dtype != torch.bool:
            raise ValueError(
                f"{type(selector).__name__}: expected bool keep flags for layer {t.name!r}, got "
                f"{None if flags is None else flags.dtype}"
            )
        masks[t] = granularity.expand(flags.cpu(), t) & current[t]
    return keep, masks
