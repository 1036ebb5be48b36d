"""The way back: every layer of this package as a dense one of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn import ChainConv2d, FusedConv2d, ResidualBlock
from ..nn.chain import ChainStageWeights
from .copy import replace_

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


def is_ours(module: nn.Module) -> bool:
    """Whether a module has a kernel of this package and stands for a dense layer."""
    return bool(getattr(type(module), "is_sparsecnn_layer", False))


def to_dense_(model: nn.Module) -> nn.Module:
    """Replace the layers in place; returns the model, or what takes the place of the root."""
    # A block's last layer adds: it must be one that takes a residual.
    adding = set()
    for block in (m for m in model.modules() if isinstance(m, ResidualBlock)):
        last = block.body[-1]
        if isinstance(last, ChainConv2d):
            block.body = nn.Sequential(*list(block.body)[:-1], *_stages(last))
            last = block.body[-1]
        adding.add(last)
    swaps: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, ChainConv2d):
            stages = _stages(module)
            dense: nn.Module = nn.Sequential(*stages)
            if module.residual:
                dense = ResidualBlock(stages)
        elif is_ours(module):
            ours: Any = module
            dense = _one(ours.to_dense(), str(ours.activation), module in adding)
        else:
            continue
        swaps[module] = dense.train(module.training)
    return replace_(model, swaps)


def _stages(chain: ChainConv2d) -> list[nn.Module]:
    stages = []
    for stage in chain.stages:
        assert isinstance(stage, ChainStageWeights)
        stages.append(FusedConv2d.from_dense(stage.to_conv(), activation=stage.activation))
    return list(stages)


def _one(dense: nn.Module, activation: str, adds: bool) -> nn.Module:
    if isinstance(dense, nn.Conv2d) and (activation != "none" or adds):
        return FusedConv2d.from_dense(dense, activation=activation)
    if activation != "none":
        return nn.Sequential(dense, _ACTIVATION_MODULES[activation]())
    return dense
