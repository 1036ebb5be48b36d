"""Masks in training: a parametrization, so that the forward pass is right whatever the loop does.

weight = dense * mask. The dense Parameter keeps its identity, so an optimizer built before or
after still owns it; the mask is a bool buffer, so it follows `.to()`, is saved with the
`state_dict` and is broadcast by DistributedDataParallel.

Modes:
    "hard": gradients of dead entries are zero, and `zero_dead_` and `clear_state_` hold their
        value and their optimizer state at zero (momentum and Adam moments would revive them).
    "ste": the straight-through estimator; the gradient passes to all of the dense weight, dead
        entries keep moving and can come back (Guo et al., "Dynamic Network Surgery", 2016).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .targets import Target

MaskMode = Literal["hard", "ste"]
MODES = ("hard", "ste")


class Mask(nn.Module):
    """Parametrization that zeroes entries.

    Args:
        mask: bool, shape and device of the weight; True = keep. Kept as a buffer.
        mode: "hard" or "ste".
    """

    mask: Tensor

    def __init__(self, mask: Tensor, mode: MaskMode) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.mode = mode

    def forward(self, weight: Tensor) -> Tensor:
        """Weight with +0 at dead entries; a product would give -0 and keep NaN."""
        masked = torch.where(self.mask, weight, torch.zeros_like(weight))
        # x + (y - x) is y exactly for y = x and for y = 0, and its gradient is that of x.
        return weight + (masked - weight).detach() if self.mode == "ste" else masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What an assignment to `layer.weight` stores: the value itself."""
        return weight

    def extra_repr(self) -> str:
        """Mode and sparsity for `print(model)`."""
        return f"mode={self.mode!r}, sparsity={1 - self.mask.double().mean().item():.4f}"


def attach(target: Target, mask: Tensor, mode: MaskMode) -> Mask:
    """Parametrize the weight on every module that holds it, with one shared mask.

    Args:
        target: whose weight; must not be parametrized yet.
        mask: bool, shape of W, any device.
        mode: see the module.
    """
    # Same memory format as the weight, so that the masked weight keeps it too.
    like_weight = torch.empty_like(target.dense.detach(), dtype=torch.bool).copy_(mask)
    parametrization = Mask(like_weight, mode)
    for owner in target.owners:
        parametrize.register_parametrization(owner, target.param, parametrization)
    return parametrization


def detach(target: Target, mask: Mask) -> None:
    """Bake the mask into the dense Parameter and make it the plain weight again."""
    with torch.no_grad():
        zero_dead_(target.dense, mask.mask)
    for owner in target.owners:
        # The Parameter itself goes back (not a new tensor), for optimizers that hold it.
        parametrize.remove_parametrizations(owner, target.param, leave_parametrized=False)
        _weight_first(owner, target.param)


def _weight_first(module: nn.Module, param: str) -> None:
    """Put the weight back in front of the bias, where the layer's constructor registered it.

    Optimizers save their state by position in `parameters()`.
    """
    module._parameters.update(
        {name: module._parameters.pop(name) for name in list(module._parameters) if name != param}
    )


@torch.no_grad()
def zero_dead_(dense: Tensor, mask: Tensor) -> None:
    """Set dead entries to +0 in place. Both of W's shape."""
    dense.masked_fill_(~mask, 0)


@torch.no_grad()
def clear_state_(optimizer: torch.optim.Optimizer, dense: nn.Parameter, mask: Tensor) -> None:
    """Zero the momentum, Adam moments and the like of dead entries.

    Everything in the optimizer's state that has the weight's shape is per entry.
    """
    for value in optimizer.state.get(dense, {}).values():
        if isinstance(value, Tensor) and value.shape == dense.shape:
            value.masked_fill_(~mask.to(value.device), 0)


def hold_zeros_(
    dense: nn.Parameter, mask: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """`zero_dead_`, and `clear_state_` where there is an optimizer."""
    zero_dead_(dense, mask)
    if optimizer is not None:
        clear_state_(optimizer, dense, mask)


def living(target: Target, keep_zeros: bool) -> Tensor:
    """Entries that may live: not masked by torch's own pruning, and nonzero if asked.

    Returns:
        bool, shape of W, on the CPU.
    """
    foreign = target.foreign_mask
    alive = torch.ones(target.shape, dtype=torch.bool) if foreign is None else foreign.bool().cpu()
    return alive & (target.dense.detach().cpu() != 0) if keep_zeros else alive


def fold_foreign_mask(target: Target) -> None:
    """Turn masks of torch.nn.utils.prune and torch.ao.pruning into plain zeros.

    The Parameter stays the same object. A sparsifier of torch.ao.pruning has nothing left to work
    on afterwards: its `step` and `squash_mask` fail.
    """
    mask = target.foreign_mask
    if mask is None:
        return
    if parametrize.is_parametrized(target.module, target.param):
        with torch.no_grad():
            zero_dead_(target.dense.mul_(mask), mask != 0)
        parametrize.remove_parametrizations(
            target.module, target.param, leave_parametrized=False
        )
    else:
        torch_prune.remove(target.module, target.param)
    _weight_first(target.module, target.param)
