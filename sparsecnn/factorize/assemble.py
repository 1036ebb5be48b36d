"""From shapes and numbers to layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn.nn.factorized import FactorizedConv2d, FactorizedLinear, PermuteChannels

from .method import Factors, Method, Stage, carried_axes
from .problem import LayerProblem, UnsupportedLayer


def assemble(
    p: LayerProblem,
    method: Method,
    ranks: tuple[int, ...],
    factors: Sequence[Factors],
    like: Tensor,
) -> FactorizedConv2d | FactorizedLinear:
    """The layer of a solution.

    Conv groups are laid side by side: every stage has G times its channels and groups.

    Args:
        p: the layer.
        method: that made the factors.
        ranks: of the factors.
        factors: one per conv group.
        like: dtype and device of the weights.
    """
    stages = method.stages(p, ranks)
    weights = [torch.cat([f.weights[i] for f in factors]) for i in range(len(stages))]
    bias = p.bias
    if factors[0].bias is not None:
        bias = torch.cat([f.bias for f in factors if f.bias is not None])
    if p.linear:
        return _linear(p, method, ranks, stages, weights, bias, like)
    modules: list[nn.Module] = []
    axes = carried_axes(p, stages)
    for i, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        modules += _permutation(p, factors, i, like)
        last = i == len(stages) - 1
        modules.append(_conv(p, stage, axes[i], weight, bias if last else None, like))
    modules += _permutation(p, factors, len(stages), like)
    return FactorizedConv2d(*modules, method=str(method), ranks=ranks, groups=p.groups)


def _conv(
    p: LayerProblem, stage: Stage, axes: str, weight: Tensor, bias: Tensor | None, like: Tensor
) -> nn.Conv2d:
    carries = ("h" in axes, "w" in axes)

    def carried(of_layer: tuple[int, int], otherwise: int) -> tuple[int, int]:
        return (
            of_layer[0] if carries[0] else otherwise,
            of_layer[1] if carries[1] else otherwise,
        )

    padding: tuple[int, int] | str = "same"
    if not isinstance(p.padding, str):
        padding = carried(p.padding, 0)
    elif not any(carries):
        padding = (0, 0)  # where one axis is carried, the stage has one tap along the other
    mode: Any = p.padding_mode if padding == "same" or padding != (0, 0) else "zeros"
    conv = nn.Conv2d(
        p.groups * stage.c_in,
        p.groups * stage.c_out,
        stage.kernel,
        carried(p.stride, 1),
        padding,
        carried(p.dilation, 1),
        p.groups * stage.groups,
        bias is not None,
        mode,
        "meta",
        like.dtype,
    )
    _fill(conv, stage, weight, bias, like)
    return conv


def _fill(
    layer: nn.Conv2d | nn.Linear, stage: Stage, weight: Tensor, bias: Tensor | None, like: Tensor
) -> None:
    if weight.shape != layer.weight.shape:
        raise AssertionError(f"stage of {tuple(layer.weight.shape)} got {tuple(weight.shape)}")
    taken = weight.to(like.device, like.dtype).contiguous()
    layer.weight = nn.Parameter(taken, requires_grad=not stage.fixed)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(like.device, like.dtype, copy=True))


def _permutation(
    p: LayerProblem, factors: Sequence[Factors], place: int, like: Tensor
) -> list[nn.Module]:
    if place not in factors[0].permutations:
        return []
    index = [f.permutations[place] + g * len(f.permutations[place]) for g, f in enumerate(factors)]
    return [PermuteChannels.of(torch.cat(index).to(like.device))]


def _linear(
    p: LayerProblem,
    method: Method,
    ranks: tuple[int, ...],
    stages: Sequence[Stage],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    like: Tensor,
) -> FactorizedLinear:
    if any(stage.kernel != (1, 1) or stage.groups != 1 for stage in stages):
        raise UnsupportedLayer(
            f"factorize: {p.name}: method {method.name!r} has no form for linear layers; use fc_svd"
        )
    layers = []
    for i, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        own = bias if i == len(stages) - 1 else None
        layer = nn.Linear(stage.c_in, stage.c_out, own is not None, "meta", like.dtype)
        _fill(layer, stage, weight[:, :, 0, 0], own, like)
        layers.append(layer)
    return FactorizedLinear(*layers, method=str(method), ranks=ranks)
