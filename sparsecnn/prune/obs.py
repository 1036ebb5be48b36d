r"""Optimal brain surgeon: delete the weight that costs least when all others may answer.

For a trained network the loss around the weights w is E + d^T H d / 2. Deleting w_q with the best
answer of the others costs and needs

    L_q = w_q^2 / (2 [H^-1]_qq),    d = -(w_q / [H^-1]_qq) H^-1 e_q,

and a whole set S of weights

    d = -H^-1[:, S] (H^-1[S, S])^-1 w_S,

which is what deleting its members one after the other, each with the inverse Hessian of those
that are left, adds up to. H is the Gauss-Newton matrix (1/N) sum_n J_n^T C_n J_n with
J_n = d(output)/dw and C_n = d2(loss)/d(output)2 of sample n: diag(p) - p p^T for cross entropy.

Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 5
(1992); other losses than the squared error: Hassibi, Stork, Wolff, "Optimal Brain Surgeon:
Extensions and performance comparisons", NIPS 6 (1993). Blocks of H per filter or of fixed size,
for weights of which a full H does not fit, are a choice of this package, and so is one H per layer:
curvature between layers is left out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import gauss_newton
from .budget import Budget
from .granularity import element
from .importance import SCOPES, Scope
from .protocols import Granularity, Stats
from .targets import Target


def cost(values: Tensor, inverse: Tensor) -> Tensor:
    """L_q of every weight, (n,) from w (n,) and H^-1 (n, n); infinite for deleted ones."""
    diagonal = inverse.diagonal()
    return torch.where(diagonal > 0, values.square() / (2 * diagonal), math.inf)


def delete_(values: Tensor, inverse: Tensor, q: int) -> None:
    """Delete weight q in place: move the others, and make H^-1 that of the reduced H.

    Row and column q of H^-1 become 0, so that later deletions leave weight q at 0.

    Args:
        values: w, (n,) float64.
        inverse: H^-1, (n, n) float64; [q, q] positive.
        q: the weight.

    Cost: O(n^2).
    """
    column = inverse[:, q].clone()
    scale = float(column[q])
    values -= float(values[q]) / scale * column
    inverse.addr_(column, column, alpha=-1 / scale)
    values[q] = 0
    inverse[q] = 0
    inverse[:, q] = 0


def delete_together(values: Tensor, inverse: Tensor, dropped: Tensor) -> Tensor:
    """The weights after the change of least cost that makes all dropped ones 0.

    Args:
        values: w, (n,) float64.
        inverse: H^-1, (n, n) float64.
        dropped: the set S, (n,) bool.

    Returns:
        (n,), exactly 0 at S.

    Cost: O(|S|^3 + n |S|).
    """
    columns = inverse[:, dropped]
    pressure: Tensor = torch.linalg.solve(columns[dropped], values[dropped])
    return (values - columns @ pressure).masked_fill(dropped, 0)


def _checked(what: str, block: object, damping: object) -> None:
    is_size = isinstance(block, int) and not isinstance(block, bool) and block >= 1
    if not (block is None or block == "row" or is_size):
        raise ValueError(f"{what}: expected block None, 'row' or an int >= 1, got {block!r}")
    if not isinstance(damping, float) or not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"{what}: expected damping to be a float > 0, got {damping!r}")


@dataclass(frozen=True)
class SequentialOBS:
    """Delete one weight after the other, always the one of least L_q, H^-1 following.

    Selects only; `OBSUpdate` moves the weights. The quadratic model of the loss is good for small
    steps: at high sparsity let the schedule prune in several events (`Iterative`), H is measured
    anew at each.

    Attributes:
        block: None: one H for all weights of a layer, at most `gauss_newton.MAX_BLOCK`; "row":
            one per filter or neuron; an int: one per so many consecutive weights.
        damping: alpha, see `gauss_newton.inverse_hessian`.
        scope: "layer": every layer meets the budget; "global": costs are compared across layers.

    Raises:
        ValueError: a bad block, damping or scope.

    Cost: O(b^2) per deletion in a block of b weights.
    """

    uses_scores: ClassVar[bool] = False
    uses_budget: ClassVar[bool] = True

    block: gauss_newton.BlockSize = None
    damping: float = 1e-6
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        _checked("SequentialOBS", self.block, self.damping)
        if self.scope not in SCOPES:
            raise ValueError(
                f"SequentialOBS: expected scope 'layer' or 'global', got {self.scope!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The inverse Hessian in the blocks asked for."""
        return frozenset({gauss_newton.need(self.block, self.damping)})

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per entry; every layer keeps at least one. See `Selector.select`.

        Raises:
            ValueError: another granularity than "element", or no budget or statistics.
        """
        if granularity != element:
            raise ValueError(f"SequentialOBS: expected granularity 'element', got {granularity}")
        if budget is None or stats is None:
            missing = "a budget" if budget is None else "statistics"
            raise ValueError(f"SequentialOBS: expected {missing}, got None")
        (need,) = self.needs
        keep = {t: current[t].reshape(-1).clone() for t in targets}
        # By name, so that ties between layers do not depend on the order of `targets`.
        ordered = sorted(targets, key=lambda t: t.name)
        for pool in [ordered] if self.scope == "global" else [[t] for t in ordered]:
            total = sum(keep[t].numel() for t in pool)
            gone = sum(int((~keep[t]).sum()) for t in pool)
            _drop_cheapest(pool, keep, stats, need, math.ceil(budget.to_drop(total) - 0.5) - gone)
        return keep


def _drop_cheapest(
    pool: Sequence[Target], keep: dict[Target, Tensor], stats: Stats, need: str, count: int
) -> None:
    """Clear `count` flags. Blocks do not touch each other: only a changed one is ranked anew."""
    if count <= 0:
        return
    blocks: list[tuple[Target, int, Tensor, Tensor]] = []
    for t in pool:
        inverse = stats.get(need, t).to("cpu", torch.float64)
        size = inverse.shape[-1]
        values = t.values().reshape(-1)
        for number, part in enumerate(inverse):
            start = number * size
            own = values[start : start + size].clone()
            own_inverse = part[: len(own), : len(own)].clone()
            # What is dead already is coupled to nothing and has no cost.
            dead = ~keep[t][start : start + size]
            own_inverse[dead] = 0
            own_inverse[:, dead] = 0
            blocks.append((t, start, own, own_inverse))

    def cheapest(number: int) -> tuple[float, int, int]:
        costs = cost(*blocks[number][2:])
        q = int(costs.argmin())  # the first of equal ones
        return float(costs[q]), number, q

    left = {t: int(keep[t].sum()) for t in pool}
    queue = [cheapest(number) for number in range(len(blocks))]
    heapq.heapify(queue)
    while count > 0 and queue:
        price, number, q = heapq.heappop(queue)
        t, start, values, inverse = blocks[number]
        if price == math.inf or left[t] <= 1:
            continue  # the block is empty, or its layer keeps its last weight
        delete_(values, inverse, q)
        keep[t][start + q] = False
        left[t] -= 1
        count -= 1
        heapq.heappush(queue, cheapest(number))


@dataclass(frozen=True)
class OBSUpdate:
    """Move the surviving weights to the optimum for the weights that go.

    Fits every selector of single entries, not only `SequentialOBS`.

    Attributes:
        block: as in `SequentialOBS`; equal settings share one measurement.
        damping: likewise.

    Raises:
        ValueError: a bad block or damping.

    Cost: O(b^3) per block of b weights.
    """

    block: gauss_newton.BlockSize = None
    damping: float = 1e-6

    def __post_init__(self) -> None:
        _checked("OBSUpdate", self.block, self.damping)

    @property
    def needs(self) -> frozenset[str]:
        """The inverse Hessian in the blocks asked for."""
        return frozenset({gauss_newton.need(self.block, self.damping)})

    def apply(self, t: Target, keep: Tensor, stats: Stats | None) -> None:
        """Update `t.dense` in place; see `Compensator.apply`.

        Weights that are dead already have no derivative through their mask, so that H couples
        them to nothing.

        Raises:
            ValueError: flags of groups, or no statistics.
        """
        values = t.values().flatten().clone()
        if keep.numel() != values.numel():
            raise ValueError(
                f"OBSUpdate: expected one flag for each of the {values.numel()} weights of "
                f"{t.name!r} (granularity 'element'), got {keep.numel()}"
            )
        if stats is None:
            raise ValueError("OBSUpdate: expected statistics, got None")
        (need,) = self.needs
        dropped = ~keep.reshape(-1).cpu()
        start = 0
        for inverse in stats.get(need, t).to("cpu", torch.float64):
            part = slice(start, start + len(inverse))
            n = len(values[part])
            values[part] = delete_together(values[part], inverse[:n, :n], dropped[part])
            start += len(inverse)
        t.dense.copy_(values.reshape(t.shape))
