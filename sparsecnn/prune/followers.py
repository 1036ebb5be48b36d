"""What belongs to a layer's output maps besides its weight: bias, and the batch norm behind it.

A filter of zeros still gives a constant map: its bias, or relu(beta) behind a batch norm. A map is
gone only if these are zero too, and only then may it be removed for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecnn._models import evaluating, positional

from .targets import Target


def find_batch_norms(
    model: nn.Module, targets: Sequence[Target], example_inputs: Tensor | Sequence[Any]
) -> dict[Target, _BatchNorm]:
    """The batch norm that reads each layer's output as it is; layers without one are left out.

    Args:
        model: run once, in evaluation mode.
        targets: layers of the model.
        example_inputs: one input tensor or the positional arguments of `model`.
    """
    args = positional(example_inputs)
    layers = {owner: t for t in targets for owner in t.owners}
    outputs: list[tuple[Target, Any]] = []  # kept alive: a new tensor must not get an old id
    found: dict[Target, _BatchNorm] = {}

    def leaves(module: nn.Module, _args: object, output: Any) -> None:
        outputs.append((layers[module], output))

    def enters(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        for t, output in outputs:
            if output is inputs[0] and isinstance(norm, _BatchNorm):
                found[t] = norm

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    handles = [layer.register_forward_hook(leaves) for layer in layers]
    handles += [norm.register_forward_pre_hook(enters) for norm in norms]
    try:
        with evaluating(model), torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return found


def per_map_parameters(t: Target, norm: _BatchNorm | None) -> list[nn.Parameter]:
    """The (K,) parameters that make a map of zeros a constant other than 0."""
    modules = [*t.owners, *([] if norm is None else [norm])]
    named = [(module, name) for module in modules for name in ("weight", "bias")]
    return [
        parameter
        for module, name in named
        if (parameter := module._parameters.get(name)) is not None
        and parameter is not t.dense
        and parameter.dim() == 1
    ]
