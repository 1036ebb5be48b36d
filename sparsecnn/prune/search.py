"""Selection by trying: masks are put on the network, and what it is then worth decides.

Both searches need the model, and `evaluate(model) -> float`, higher = better, e.g. the accuracy on
validation data. Never let it see the test set: the best of many trials is an optimistic estimate
of itself. It runs without gradients on the model in evaluation mode, and whatever it or a trial
changes in parameters, buffers (batch norm statistics), gradients and modes is put back bitwise.

Under torch.distributed every rank must run the search with the same targets; the first rank's
values decide for all, so that all choose the same masks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from sparsecnn._models import evaluating

from .budget import Budget, check_share
from .granularity import layer
from .protocols import Granularity, Stats
from .selection import TopK
from .targets import Target

Evaluate = Callable[[nn.Module], float]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RandomMaskSearch:
    """Draw masks at random, keep the one with which the network is best.

    Every mask meets the budget exactly in every layer, and empties none; for the granularity
    "layer" all layers share the budget. Groups that are dead stay dead and count as dropped.
    Nothing is trained in between (Anwar & Sung, "Coarse Pruning of Convolutional Neural Networks
    with Random Masks", 2016; companion: Anwar, Hwang, Sung, "Structured Pruning of Deep
    Convolutional Neural Networks", JETC 2017). For combined granularities prune feature maps
    first, then kernels.

    The first n masks of a search of more than n are those of a search of n: more trials never end
    with a worse mask. Layers draw in the order of their names.

    Cost: `n_masks` calls of `evaluate`, and copies of the parameters for each.

    Attributes:
        model: the network that holds the targets.
        evaluate: see the module.
        n_masks: trials; the paper finds 100 enough for 40 % less complexity.
        seed: of the masks.

    Raises:
        TypeError: no module, or an `evaluate` that cannot be called.
        ValueError: n_masks below 1 or a negative seed.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    uses_scores: ClassVar[bool] = False
    uses_budget: ClassVar[bool] = True

    model: nn.Module
    evaluate: Evaluate
    n_masks: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_search(self, self.model, self.evaluate)
        for name, least in (("n_masks", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"RandomMaskSearch: expected {name} to be an int >= {least}, got {value!r}"
                )

    def draw(
        self,
        targets: Sequence[Target],
        granularity: Granularity,
        budget: Budget | None,
        current: Mapping[Target, Tensor],
    ) -> Iterator[dict[Target, Tensor]]:
        """The masks in the order of their trials: (n_groups,) bool per target.

        Raises:
            ValueError: no budget, or one that the layers do not fit; see `TopK.select`.
        """
        source = torch.Generator().manual_seed(self.seed)
        ordered = sorted(targets, key=lambda t: t.name)
        select = TopK("global" if granularity == layer else "layer").select
        for _ in range(self.n_masks):
            scores = {
                t: torch.rand(granularity.n_groups(t), generator=source, dtype=torch.float64)
                for t in ordered
            }
            yield select(targets, scores, granularity, budget, None, current)

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per group; see `Selector.select` for shapes. Of equal masks the first wins.

        Raises:
            ValueError: targets of another model, a budget that the layers do not fit, or an
                `evaluate` that returns NaN.
        """
        _check_targets(self, self.model, targets)
        best: dict[Target, Tensor] = {}
        record = -math.inf
        for keep in self.draw(targets, granularity, budget, current):
            with unchanged(self.model):
                for t in targets:
                    _drop(t, granularity.expand(keep[t], t))
                value = _measured(self, self.model, self.evaluate)
            if not best or value > record:
                best, record = keep, value
        return best


@dataclass(frozen=True, eq=False)
class GreedyLayerSearch:
    """Find the density of each layer: step by step, where a byte costs least accuracy.

    Every layer starts at the first density of the grid. A round tries, for each layer that has one
    left, its next density together with the present ones of the others; the trial with the least
    loss per saved byte is taken. Loss is the fall of `evaluate` against the present state, a rise
    counts as 0, and of equal trials the one that saves more is taken. The search ends when the
    bytes meet the budget, or when every trial would fall by more than `tolerance` below the
    network before the search; that and the bytes reached are logged as a warning (Collins & Kohli,
    "Memory Bounded Deep Convolutional Networks", 2014, propose a greedy choice of the layers; the
    grid, the cost per byte and the rules to stop are ours).

    Which groups of a layer stay at a density, the scores of the importance decide, as in `TopK`.

    Bytes are those of the weights of the targets in CSR: see `csr_bytes`.

    Cost: one call of `evaluate` at first, then one per round and layer that has a density left;
    a trial with `finetune` copies all parameters.

    Attributes:
        model: the network that holds the targets.
        evaluate: see the module.
        budget_bytes: what the weights may take.
        grid: densities, from high to low.
        tolerance: by how much `evaluate` may fall in all.
        finetune: `finetune(model)` trains a trial for some steps before it is evaluated, with an
            optimizer of its own. Dropped weights have gradients of 0 meanwhile. The trained values
            are for the evaluation only: the search changes no weight.

    Raises:
        TypeError: no module, or functions that cannot be called.
        ValueError: a grid that does not fall from density to density, a negative budget or
            tolerance.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    uses_scores: ClassVar[bool] = True
    uses_budget: ClassVar[bool] = False

    model: nn.Module
    evaluate: Evaluate
    budget_bytes: int
    grid: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)
    tolerance: float = math.inf
    finetune: Callable[[nn.Module], None] | None = None

    def __post_init__(self) -> None:
        _check_search(self, self.model, self.evaluate)
        if self.finetune is not None and not callable(self.finetune):
            raise TypeError(
                f"GreedyLayerSearch: expected finetune(model) or None, got {self.finetune!r:.80}"
            )
        grid = tuple(check_share(d, "grid", "GreedyLayerSearch") for d in self.grid)
        if not grid or any(after >= before for before, after in pairwise(grid)):
            raise ValueError(
                f"GreedyLayerSearch: expected grid of falling densities, got {self.grid}"
            )
        object.__setattr__(self, "grid", grid)
        for name in ("budget_bytes", "tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"GreedyLayerSearch: expected {name} >= 0, got {getattr(self, name)!r}"
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
        """Keep flags per group; see `Selector.select` for shapes. `budget` plays no part.

        Raises:
            ValueError: targets of another model, a `budget_bytes` below what the lowest density of
                the grid takes in all layers, or an `evaluate` that returns NaN.
        """
        _check_targets(self, self.model, targets)
        ordered = sorted(targets, key=lambda t: t.name)

        def flags(t: Target, level: int) -> Tensor:
            part = Budget(density=self.grid[level])
            return TopK("layer").select([t], scores, granularity, part, None, current)[t]

        def mask(t: Target, level: int) -> Tensor:
            alive = granularity.expand(flags(t, level), t)
            return alive & current[t] if t in current else alive

        sizes = {
            t: [csr_bytes(t, int(mask(t, i).sum())) for i in range(len(self.grid))] for t in ordered
        }
        least = sum(size[-1] for size in sizes.values())
        if least > self.budget_bytes:
            raise ValueError(
                f"GreedyLayerSearch: expected budget_bytes >= {least}, what density "
                f"{self.grid[-1]:g} takes in all layers, got {self.budget_bytes}; add lower "
                "densities to grid"
            )

        def trial(levels: Mapping[Target, int]) -> float:
            with unchanged(self.model), ExitStack() as held:
                masks = {t: mask(t, level) for t, level in levels.items()}
                for t, alive in masks.items():
                    _drop(t, alive)
                    if self.finetune is not None:
                        held.enter_context(_held_gradient(t, alive))
                if self.finetune is not None:
                    with torch.enable_grad():
                        self.finetune(self.model)
                    for t, alive in masks.items():
                        _drop(t, alive)
                return _measured(self, self.model, self.evaluate)

        levels = dict.fromkeys(ordered, 0)
        first = now = trial(levels)
        total = sum(sizes[t][0] for t in ordered)
        while total > self.budget_bytes:
            tried: list[tuple[float, int, int, float]] = []
            for i, t in enumerate(ordered):
                if levels[t] + 1 == len(self.grid):
                    continue
                value = trial(levels | {t: levels[t] + 1})
                saved = sizes[t][levels[t]] - sizes[t][levels[t] + 1]
                loss = max(now - value, 0.0)
                # A step of the grid that saves nothing is only a way to the next one: free or last.
                cost = loss / saved if saved else (math.inf if loss else 0.0)
                if first - value <= self.tolerance:
                    tried.append((cost, -saved, i, value))
            if not tried:
                _LOG.warning(
                    "GreedyLayerSearch: stopped at %d bytes, more than budget_bytes %d: every next "
                    "density falls more than tolerance %g below %g",
                    total, self.budget_bytes, self.tolerance, first,
                )  # fmt: skip
                break
            _, gain, i, now = min(tried)
            levels[ordered[i]] += 1
            total += gain
        return {t: flags(t, levels[t]) for t in targets}


def csr_bytes(t: Target, nonzeros: int) -> int:
    """Bytes of the lowered weight (K, C/G*R*S) of `t` in compressed sparse rows.

    Values in the weight's type, column indices in the smallest of 1, 2 and 4 bytes that counts the
    columns, and K + 1 row pointers of 4 bytes; also where a dense array would be smaller.
    """
    rows = t.shape[0]
    columns = t.shape.numel() // rows if rows else 0
    index = 1 if columns <= 2**8 else 2 if columns <= 2**15 else 4
    return nonzeros * (t.dense.element_size() + index) + (rows + 1) * 4


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers, gradients and modes of `model` are afterwards what they were, bitwise.

    Gradients start from None inside.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        for parameter, gradient, trainable in gradients:
            parameter.requires_grad_(trainable)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _drop(t: Target, alive: Tensor) -> None:
    t.dense.masked_fill_(~alive.to(t.dense.device), 0)


@contextmanager
def _held_gradient(t: Target, alive: Tensor) -> Iterator[None]:
    """Gradients of dropped entries are 0, so that a fresh optimizer leaves them at 0."""
    if not t.dense.requires_grad:
        yield
        return
    there = alive.to(t.dense.device)
    handle = t.dense.register_hook(lambda gradient: gradient * there)
    try:
        yield
    finally:
        handle.remove()


def _measured(part: object, model: nn.Module, evaluate: Evaluate) -> float:
    """What `evaluate` says, on the first rank."""
    with evaluating(model), torch.no_grad():
        value = float(evaluate(model))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        device = next(model.parameters()).device
        agreed = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.broadcast(agreed, 0)
        value = agreed.item()
    # Checked after the broadcast: a rank that stopped alone would leave the others waiting.
    if math.isnan(value):
        raise ValueError(f"{type(part).__name__}: expected evaluate to return a number, got NaN")
    return value


def _check_search(part: object, model: object, evaluate: object) -> None:
    what = type(part).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: expected model to be a torch.nn.Module, got {model!r:.80}")
    if not callable(evaluate):
        raise TypeError(f"{what}: expected evaluate(model) -> float, got {evaluate!r:.80}")


def _check_targets(part: object, model: nn.Module, targets: Sequence[Target]) -> None:
    modules = set(model.modules())
    for t in targets:
        if t.module not in modules:
            raise ValueError(
                f"{type(part).__name__}: expected targets of model, got {t.name!r} of another; "
                "pass the very model that is pruned"
            )
