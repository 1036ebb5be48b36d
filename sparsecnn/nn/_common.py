"""Pieces every drop-in layer needs."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from sparsecnn.ops._check import ACTIVATIONS

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def check_activation(layer: str, activation: str) -> None:
    """Refuse an activation that no kernel fuses."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{layer}: expected activation one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Carry over what belongs to the user: training flag and hooks.

    Hooks of ``torch.nn.utils.prune`` are left behind: they would rebuild a dense weight, and the
    weight they computed has already been taken.
    """
    new.training = old.training
    new._is_full_backward_hook = old._is_full_backward_hook
    for name in _HOOKS:
        hooks = getattr(old, name)
        kept = {k: h for k, h in hooks.items() if not isinstance(h, BasePruningMethod)}
        setattr(new, name, type(hooks)(kept))
