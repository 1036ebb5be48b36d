"""Slicing of convolutions, linear layers and batch norm: what a removal does to each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# layer name -> side ("out", "in") -> removed indices
Plan = dict[str, dict[str, set[int]]]


def is_depthwise(module: nn.Conv2d) -> bool:
    """One filter per input map: both sides are one."""
    return module.groups > 1 and module.groups == module.out_channels == module.in_channels


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Slice every layer of the plan.

    Raises:
        ValueError: a grouped convolution would lose unequal numbers per group.
    """
    for name, sides in plan.items():
        module: Any = model.get_submodule(name)
        for side, gone in sides.items():
            if gone:
                _slice(module, side, gone, name)


@torch.no_grad()
def zero_columns_(module: Any, indices: Sequence[int]) -> None:
    """Zero what a convolution or linear layer puts on these input maps, in place."""
    for i in indices:
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            width = module.in_channels // module.groups
            rows = module.out_channels // module.groups
            g = i // width
            module.weight[g * rows : (g + 1) * rows, i % width] = 0
        else:
            module.weight[:, i] = 0


def _slice(module: Any, side: str, gone: set[int], name: str) -> None:
    if isinstance(module, _BatchNorm):
        keep = _kept(module.num_features, gone)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            _select(module, entry, keep, 0)
        module.num_features = len(keep)
    elif isinstance(module, nn.Linear):
        if side == "out":
            keep = _kept(module.out_features, gone)
            _select(module, "bias", keep, 0)
            module.out_features = len(keep)
        else:
            keep = _kept(module.in_features, gone)
            module.in_features = len(keep)
        _select(module, "weight", keep, 0 if side == "out" else 1)
    elif side == "out":
        keep = _kept(module.out_channels, gone)
        if is_depthwise(module):
            module.groups = module.in_channels = len(keep)
        else:
            _per_group(module.out_channels, module.groups, keep, name)
        _select(module, "weight", keep, 0)
        _select(module, "bias", keep, 0)
        module.out_channels = len(keep)
    else:
        keep = _kept(module.in_channels, gone)
        local = _per_group(module.in_channels, module.groups, keep, name)
        rows = module.out_channels // module.groups
        parts = [
            module.weight.detach()[g * rows : (g + 1) * rows][:, inputs]
            for g, inputs in enumerate(local)
        ]
        _replace(module, "weight", torch.cat(parts))
        module.in_channels = len(keep)


def _kept(size: int, gone: set[int]) -> list[int]:
    return [i for i in range(size) if i not in gone]


def _per_group(size: int, groups: int, keep: list[int], name: str) -> list[list[int]]:
    width = size // groups
    local = [[i - g * width for i in keep if i // width == g] for g in range(groups)]
    if len({len(entry) for entry in local}) > 1:
        raise ValueError(
            f"channels: expected equal counts per group of {name!r}, got "
            f"{[len(entry) for entry in local]}"
        )
    return local


def _select(module: nn.Module, entry: str, keep: list[int], dim: int) -> None:
    old = getattr(module, entry)
    if old is not None:
        index = torch.tensor(keep, device=old.device, dtype=torch.int64)
        _replace(module, entry, old.detach().index_select(dim, index))


def _replace(module: nn.Module, entry: str, new: Tensor) -> None:
    old = getattr(module, entry)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
    setattr(module, entry, new)
