"""Regularizers: what pulls weights towards zero, or keeps them small, at every step.

A regularizer has a penalty, differentiated with the loss, and a proximal step after the
optimizer's step. Only the proximal step gives exact zeros: a subgradient jumps over 0 for ever.
Its size is lr * lam with the learning rate of the weight's own parameter group now. Under Adam
that scalar rate is used too, not Adam's per-entry rate. The penalty of this module's proximal
regularizers is 0, so that nothing is counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from .budget import Budget
from .granularity import Axes, Block, filter_, parse
from .selection import top
from .targets import Target

Mode = Literal["prox", "subgrad"]
UnitBiasKind = Literal["hyperbolic", "exponential"]


@dataclass(frozen=True)
class L1:
    """lam * sum |W|: sparse weights by shrinkage or by the subgradient.

    "prox" applies S(w, lr*lam) = sgn(w) * max(|w| - lr*lam, 0) after each step, which gives exact
    zeros; "subgrad" adds the penalty to the loss and gives none. Collins & Kohli, "Memory Bounded
    Deep Convolutional Networks" (2014, arXiv 1412.1442). Cost: O(entries) per step.

    Attributes:
        lam: weight of the penalty, >= 0.
        mode: "prox" or "subgrad".

    Raises:
        TypeError: lam is not a number.
        ValueError: a value out of range.
    """

    lam: float
    mode: Mode = "prox"

    def __post_init__(self) -> None:
        check_number("L1", "lam", self.lam)
        check_choice("L1", "mode", self.mode, get_args(Mode))

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """The penalty lam * sum |W| in mode "subgrad", else 0."""
        if self.mode == "prox":
            return zero(targets)
        return self.lam * sum((t.dense.abs().sum() for t in targets), zero(targets))

    @torch.no_grad()
    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Soft threshold by lr*lam in mode "prox"."""
        if self.mode == "prox":
            for t in targets:
                shrink_(t.dense, lr * self.lam)


@dataclass(frozen=True)
class L0Ball:
    """Projection of each layer on {W : ||W||_0 <= k}: the k largest |w| stay, the rest is zeroed.

    Exactly k entries stay, of equal ones the first. Between two projections nothing is frozen:
    a zeroed weight with a gradient moves again, so finish with a pruning event of a `Pruner`.
    Collins & Kohli, "Memory Bounded Deep Convolutional Networks" (2014, arXiv 1412.1442).
    Cost: O(entries) per projection, on the CPU in float64.

    Attributes:
        density: share of entries to keep per layer, in [0, 1].
        count: k itself; a layer of fewer entries keeps them all. Give one of the two.
        every: project after every so many steps.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: not exactly one of density and count, or a value out of range.
    """

    density: float | None = None
    count: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if (self.density is None) == (self.count is None):
            given = "none" if self.density is None else "both"
            raise ValueError(f"L0Ball: expected exactly one of density and count, got {given}")
        Budget(density=self.density, count=self.count)
        check_every("L0Ball", self.every)

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """0: the ball is a constraint."""
        return zero(targets)

    @torch.no_grad()
    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Project after steps every, 2 * every, ...; the radius does not depend on lr."""
        if (step + 1) % self.every:
            return
        for t in targets:
            size = t.values().abs().flatten()
            n = size.numel()
            budget = Budget(density=self.density, count=self.count)
            # Rounded as `TopK` does, so that a mask of the same budget agrees with the ball.
            kept = n - min(max(math.ceil(budget.to_drop(n) - 0.5), 0), n)
            keep = top(size, kept).reshape(t.shape).to(t.dense.device)
            t.dense.masked_fill_(~keep, 0)


@dataclass(frozen=True)
class UnitBias:
    r"""A penalty that pulls small units more than large ones, so that units vanish whole.

    With w_i = sum_j \|w_ij\| over the incoming weights of unit i (a filter of a convolution, a row
    of a linear layer), the penalty is beta * B and its pull on w_ij is beta * sgn(w_ij) times

    | kind          | B                               | slope                 |
    |---------------|---------------------------------|-----------------------|
    | "hyperbolic"  | sum_i w_i / (1 + lam * w_i)     | 1 / (1 + lam * w_i)^2 |
    | "exponential" | sum_i 1 - exp(-lam * w_i)       | lam * exp(-lam * w_i) |

    L1 pulls every unit alike and L2 large ones most. After each step, entries that the next pull
    would carry across 0 are set to 0; without this they would swing around it (ours). This assumes
    steps of lr times the gradient: with momentum the swing is wider and small units may not
    settle. The network is trained with it from the start, and units at 0 are removed afterwards.
    Hanson & Pratt, "Comparing Biases for Minimal Network Construction with Back-Propagation",
    NIPS 1 (1988). The scaling of lam is ours. Cost: O(entries) per step.

    Attributes:
        kind: "hyperbolic" or "exponential".
        lam: how soon the pull fades as units grow, > 0.
        beta: weight of the penalty, >= 0.

    Raises:
        TypeError: lam or beta is not a number.
        ValueError: a value out of range.
    """

    kind: UnitBiasKind = "hyperbolic"
    lam: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_choice("UnitBias", "kind", self.kind, get_args(UnitBiasKind))
        check_number("UnitBias", "lam", self.lam, positive=True)
        check_number("UnitBias", "beta", self.beta)

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """The penalty beta * B over all targets."""
        total = zero(targets)
        for t in targets:
            size = filter_.reduce(t.dense, t, "l1")
            if self.kind == "hyperbolic":
                total = total + (size / (1 + self.lam * size)).sum()
            else:
                total = total + (1 - torch.exp(-self.lam * size)).sum()
        return self.beta * total

    def slope(self, size: Tensor) -> Tensor:
        """dB/dw_i at unit magnitudes w_i, any shape."""
        if self.kind == "hyperbolic":
            return 1 / (1 + self.lam * size).square()
        return self.lam * torch.exp(-self.lam * size)

    @torch.no_grad()
    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Zero the entries within lr * beta * slope of 0."""
        for t in targets:
            pull = lr * self.beta * self.slope(filter_.reduce(t.dense, t, "l1"))
            if lr * self.beta > 0:
                t.dense.masked_fill_(t.dense.abs() <= filter_.expand(pull, t), 0)


@dataclass(frozen=True)
class MaxNorm:
    """Projection of every group on ||w_g||_2 <= c; smaller groups stay bitwise as they are.

    The companion of dropout: it allows large learning rates. Srivastava et al., "Dropout: A Simple
    Way to Prevent Neural Networks from Overfitting", JMLR 15 (2014), with c from 3 to 4.
    Cost: O(entries) per step.

    Attributes:
        c: largest norm, > 0.
        granularity: what is bounded, or its name; "filter" are the weights into a unit or map.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    c: float = 3.0
    granularity: str | Axes | Block = filter_

    def __post_init__(self) -> None:
        check_number("MaxNorm", "c", self.c, positive=True)
        object.__setattr__(self, "granularity", parse(self.granularity))

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """0: the bound is a constraint."""
        return zero(targets)

    @torch.no_grad()
    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Scale groups longer than c back to length c."""
        granularity = parse(self.granularity)
        for t in targets:
            norm = granularity.reduce(t.dense, t, "l2")
            # Times 1 is exact, and a norm of 0 never reaches the division.
            factor = torch.where(norm > self.c, self.c / norm, torch.ones_like(norm))
            t.dense.mul_(granularity.expand(factor, t))


@dataclass(frozen=True)
class TensorNuclear:
    r"""lam * sum_i (1/D) \|\|W_(i)\|\|_* over the D mode unfoldings: weights of low tensor rank.

    After the step every unfolding has its singular values shrunk by lr*lam, and the D results are
    averaged; for a linear weight both unfoldings give the same. A grouped convolution is G tensors
    (K/G, C/G, R, S), one per conv group. Averaging the proxes of the terms is not the prox of
    their sum, and in a convolution the average need not have low rank itself.
    Zhou, Alvarez, Porikli, "Less Is More: Towards Compact CNNs", ECCV 2016.
    Cost: D singular value decompositions of W per proximal step; raise `every` for large layers.

    Attributes:
        lam: weight of the penalty, >= 0.
        every: apply it after every so many steps, by lr * lam * every: the sum of the steps'
            rates where lr has not changed between.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    lam: float
    every: int = 1

    def __post_init__(self) -> None:
        check_number("TensorNuclear", "lam", self.lam)
        check_every("TensorNuclear", self.every)

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """0: it has only a proximal step."""
        return zero(targets)

    @torch.no_grad()
    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Average the D singular value soft thresholds of each conv group."""
        if (step + 1) % self.every:
            return
        for t in targets:
            groups, rows = t.grouped_shape[:2]
            tensor = t.dense.reshape(groups, rows, *t.shape[1:])
            modes = range(1, tensor.dim())
            shrunk = torch.zeros_like(tensor)
            for mode in modes:
                front = tensor.movedim(mode, 1)
                matrix = front.reshape(groups, front.shape[1], -1)
                matrix = shrink_singular_values(matrix, lr * self.lam * self.every)
                shrunk += matrix.reshape(front.shape).movedim(1, mode)
            t.dense.copy_((shrunk / len(modes)).reshape(t.shape))


def shrink_singular_values(matrix: Tensor, c: float) -> Tensor:
    """U diag(max(sigma - c, 0)) V^T: the prox of c times the nuclear norm.

    Args:
        matrix: (..., m, n).
        c: threshold; the rank of the result is the number of sigma > c.
    """
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    shrunk: Tensor = (u * (sigma - c).clamp(min=0).unsqueeze(-2)) @ vh
    return shrunk


def shrink_(dense: Tensor, c: float) -> None:
    """sgn(w) * max(|w| - c, 0) in place, with +0 where it is zero."""
    if c > 0:
        dead = dense.abs() <= c
        dense.sub_(dense.sign(), alpha=c).masked_fill_(dead, 0)


def zero(targets: Sequence[Target]) -> Tensor:
    """The scalar 0 with dtype and device of the first target's weight."""
    return targets[0].dense.new_zeros(()) if targets else torch.zeros(())


def check_number(what: str, name: str, value: object, *, positive: bool = False) -> None:
    """Refuse anything but a finite number >= 0, or > 0.

    Raises:
        TypeError: not a real number (a bool is not one).
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what}: expected {name} to be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        limit = "> 0" if positive else ">= 0"
        raise ValueError(f"{what}: expected {name} {limit} and finite, got {number:g}")


def check_choice(what: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of `choices`.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(
            f"{what}: expected {name} to be one of {', '.join(choices)}, got {value!r}"
        )


def check_every(what: str, value: object) -> None:
    """Refuse anything but an int >= 1.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what}: expected every to be an int >= 1, got {value!r}")
