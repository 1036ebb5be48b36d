"""Which parts a `Pruner` ends up with, and whether they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsecnn._models import refuse_sparse_layers

from .budget import Budget
from .granularity import NM, Axes, Block, Strided, element, parse
from .importance import PruneConfig
from .protocols import (
    Calibration,
    Compensator,
    Granularity,
    Importance,
    Regrowth,
    Regularizer,
    Schedule,
    Selector,
)
from .running import PREFIX
from .schedule import Polynomial
from .selection import TopK
from .targets import Target, check_maskable

if TYPE_CHECKING:
    from .pruner import Pruner


def check_parts(pruner: Pruner) -> None:
    """Refuse parts that lack a method or do not fit together.

    Raises:
        TypeError: a part lacks the methods of its protocol.
        ValueError: the parts do not fit together.
    """
    parts: list[tuple[str, object, type]] = [
        ("granularity", pruner.granularity, Granularity),
        ("importance", pruner.importance, Importance),
        ("selector", pruner.selector, Selector),
        ("compensator", pruner.compensator, Compensator),
        ("schedule", pruner.schedule, Schedule),
        ("regrowth", pruner.regrowth, Regrowth),
        ("calibration", pruner.calibration, Calibration),
    ]
    parts += [("regularizers", part, Regularizer) for part in pruner.regularizers]
    for name, part, protocol in parts:
        if part is not None and (isinstance(part, type) or not isinstance(part, protocol)):
            raise TypeError(f"Pruner: expected {name} like {protocol.__name__}, got {part!r}")
    for t in pruner.targets:
        pruner.granularity.n_groups(t)  # says what layers it does not fit
    if pruner.importance is None and getattr(pruner.selector, "uses_scores", True):
        raise ValueError(
            f"Pruner: expected an importance for {type(pruner.selector).__name__}, got None"
        )
    if pruner.budget is None and getattr(pruner.selector, "uses_budget", True):
        raise ValueError(
            f"Pruner: expected a budget for {type(pruner.selector).__name__}, got None; pass "
            "Budget(sparsity=...) or an importance with sparsity=..."
        )
    measured = sorted(need for need in pruner.needs if not need.startswith(PREFIX))
    if measured and pruner.calibration is None:
        raise ValueError(
            f"Pruner: expected calibration to collect {', '.join(measured)}, got None"
        )
    if pruner.budget is not None and isinstance(pruner.selector, TopK):
        pruner.selector.check(pruner.targets, pruner.granularity, pruner.budget)
    if isinstance(pruner.schedule, Polynomial):
        if isinstance(pruner.granularity, NM):
            raise ValueError(
                f"Pruner: expected a schedule that prunes at once for granularity "
                f"{pruner.granularity}, got {pruner.schedule}; use OneShot"
            )
        final = None if pruner.budget is None else pruner.budget.target_sparsity
        if final is not None and pruner.schedule.initial > final:
            raise ValueError(
                f"Pruner: expected Polynomial.initial <= sparsity {final:g}, got "
                f"{pruner.schedule.initial:g}"
            )


def check_targets(model: nn.Module, targets: Sequence[Target]) -> None:
    """Refuse targets that are none, not of `model`, not maskable or the same weight twice.

    Raises:
        TypeError: something that is no target.
        ValueError: see above; a layer swapped by sparsecnn.
    """
    refuse_sparse_layers(model, "Pruner")
    if not targets:
        raise ValueError("Pruner: expected at least one target, got none")
    modules = set(model.modules())
    for t in targets:
        if not isinstance(t, Target):
            raise TypeError(f"Pruner: expected targets from find_targets, got {t!r:.80}")
        if t.module not in modules:
            raise ValueError(f"Pruner: expected targets of model, got {t.name!r} of another")
        check_maskable(t, "Pruner")
    if len({id(t.dense) for t in targets}) != len(targets):
        raise ValueError("Pruner: expected each weight once in targets, got repeats")


def check_optimizer(optimizer: torch.optim.Optimizer, targets: Sequence[Target]) -> None:
    """Refuse an optimizer of other parameters.

    Raises:
        ValueError: it holds none of the targets' weights.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(t.dense) in held for t in targets):
        raise ValueError(
            "Pruner.attach: expected an optimizer that holds the pruned weights, got none of "
            f"{len(targets)}"
        )


def check_regrown(part: Regrowth, t: Target, old: Tensor, new: Tensor) -> None:
    """Refuse what is no mask.

    Raises:
        ValueError: another shape or type.
    """
    if new.shape != old.shape or new.dtype != torch.bool:
        raise ValueError(
            f"{type(part).__name__}: expected a bool mask of shape {tuple(old.shape)} for layer "
            f"{t.name!r}, got {new.dtype} {tuple(new.shape)}"
        )


def check_state(pruner: Pruner, state: dict[str, Any]) -> None:
    """Refuse the state of a pruner of another version, of other layers or of other parts.

    Raises:
        ValueError: it does not fit.
    """
    if state.get("version") != 1:
        raise ValueError(
            f"Pruner.load_state_dict: expected version 1, got {state.get('version')!r}"
        )
    wanted = {t.key: tuple(t.shape) for t in pruner.targets}
    kept = {"masks": wanted, "base": wanted}
    expected: dict[str, dict[str, tuple[int, ...]]] = dict(kept)
    for need, values in pruner.running.values.items():
        expected[need] = {t.key: tuple(value.shape) for t, value in values.items()}
    found = {name: state[name] for name in kept} | state.get("running", {})
    if sorted(found) != sorted(expected):
        raise ValueError(
            f"Pruner.load_state_dict: expected {', '.join(sorted(expected))}, got "
            f"{', '.join(sorted(found))}"
        )
    for name, shapes in expected.items():
        got = {key: tuple(value.shape) for key, value in found[name].items()}
        if got != shapes:
            differing = sorted(k for k in {*got, *shapes} if got.get(k) != shapes.get(k))
            raise ValueError(
                f"Pruner.load_state_dict: expected {name} for the pruned layers, got a "
                f"difference at {', '.join(differing[:5])}"
            )


def choose_granularity(
    given: str | Granularity | None, importance: Importance | None
) -> Granularity:
    """The argument, else the importance's field, else single entries.

    Raises:
        ValueError: both are given and differ.
    """
    configured = getattr(importance, "granularity", None)
    chosen = parse(given) if isinstance(given, str) else given
    if chosen is not None and configured is not None and chosen != configured:
        raise ValueError(
            f"Pruner: expected one granularity, got {chosen} and the importance's {configured}"
        )
    if chosen is not None:
        return chosen
    return configured if isinstance(configured, (Axes, Block, Strided)) else element


def choose_budget(
    given: Budget | None, importance: Importance | None, granularity: Granularity
) -> Budget | None:
    """The argument, else the importance's fields, else what an n:m constraint implies.

    Raises:
        TypeError: not a `Budget`.
        ValueError: both are given and differ.
    """
    if given is not None and not isinstance(given, Budget):
        raise TypeError(f"Pruner: expected budget to be a Budget, got {given!r}")
    configured = importance.budget() if isinstance(importance, PruneConfig) else None
    if given is not None and configured is not None and given != configured:
        raise ValueError(f"Pruner: expected one budget, got {given} and the importance's")
    if given is None and configured is None and isinstance(granularity, NM):
        return Budget(density=granularity.n / granularity.m)
    return configured if given is None else given


def choose_selector(given: Selector | None, importance: Importance | None) -> Selector:
    """The argument, else `TopK` with the importance's scope.

    Raises:
        ValueError: both have a scope and they differ.
    """
    scope = importance.scope if isinstance(importance, PruneConfig) else None
    if given is None:
        return TopK() if scope is None else TopK(scope)
    if scope is not None and getattr(given, "scope", scope) != scope:
        raise ValueError(
            f"Pruner: expected one scope, got the selector's {getattr(given, 'scope', None)!r} "
            f"and the importance's {scope!r}"
        )
    return given
