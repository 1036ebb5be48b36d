"""Copies of a model that cost no memory, baked masks, and putting modules into place.

A *shadow* is a copy of the module tree that shares every parameter and buffer with the original:
four variants of a 550 MB network can be timed against each other without four copies of it. The
price is a rule that all code here obeys: a parameter is replaced, never written to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

LAYOUTS = ("contiguous", "channels_last")
MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def duplicate(model: nn.Module, *, share: bool) -> nn.Module:
    """Copy a model; `copy.deepcopy` that also takes tensors computed from parameters.

    `torch.nn.utils.prune` and the older `weight_norm` keep the computed weight as an attribute
    that is no autograd leaf, which `copy.deepcopy` refuses. Here such a tensor is detached.

    Args:
        model: any module.
        share: keep the parameters, buffers and computed tensors of `model` instead of copying.

    Raises:
        ValueError: the module tree holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in _tensors_of(module):
            if share:
                memo[id(value)] = value
            elif not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"accelerate: expected model that copy.deepcopy can copy, got {type(error).__name__}: "
            f"{error}"
        ) from error


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for store in (module._parameters, module._buffers, module.__dict__):
        for value in list(store.values()):
            if isinstance(value, Tensor):
                yield value


def bake_(model: nn.Module) -> list[str]:
    """Turn masks and parametrizations of `model` into plain weights, in place.

    Covers `torch.nn.utils.prune`, `torch.nn.utils.parametrize` and the hook-based `weight_norm`
    and `spectral_norm`. The originals (`weight_orig`, ...) are left untouched for whoever shares
    them: torch's removers of the first two write into them, or into a class that copies share.

    Returns:
        Names of the tensors baked, "<module>.<tensor>".
    """
    baked: list[str] = []
    for name, module in list(model.named_modules()):
        tensors = [*_bake_hooks_(module), *_bake_parametrizations_(module)]
        baked += [f"{name}.{tensor}" if name else tensor for tensor in tensors]
    return baked


def _bake_hooks_(module: nn.Module) -> Iterator[str]:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod):
            tensor = str(hook._tensor_name)
            value = hook.apply_mask(module)
            original = module._parameters.pop(f"{tensor}_orig")
            assert original is not None
            del module._buffers[f"{tensor}_mask"], module._forward_pre_hooks[key]
            module.__dict__.pop(tensor, None)
            _set_parameter_(module, tensor, value, original.requires_grad)
        elif isinstance(hook, WeightNorm):
            tensor = hook.name
            remove_weight_norm(module, tensor)
        elif isinstance(hook, SpectralNorm):
            tensor = hook.name
            remove_spectral_norm(module, tensor)
        else:
            continue
        yield tensor


def _bake_parametrizations_(module: nn.Module) -> Iterator[str]:
    if not parametrize.is_parametrized(module):
        return
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    values: dict[str, tuple[Tensor, bool, bool]] = {}
    for tensor, chain in lists.items():
        sources = list(chain.parameters(recurse=False))
        learned = any(p.requires_grad for p in sources)
        values[tensor] = (getattr(module, tensor), bool(sources), learned)
    # The parametrized class is made per module by torch and shared by deep copies: step down to
    # its base instead of deleting the property from it.
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for tensor, (value, is_parameter, learned) in values.items():
        if is_parameter:
            _set_parameter_(module, tensor, value, learned)
        else:
            module.register_buffer(tensor, value.detach().clone())
        yield tensor


def _set_parameter_(module: nn.Module, name: str, value: Tensor, requires_grad: bool) -> None:
    """Register a detached copy of `value`, ahead of the other parameters like in a fresh layer."""
    others = {key: module._parameters.pop(key) for key in list(module._parameters)}
    parameter = nn.Parameter(value.detach().clone(), requires_grad=requires_grad)
    module.register_parameter(name, parameter)
    module._parameters.update(others)


def replace_(root: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in place of old ones wherever those are registered, under every name.

    Returns:
        `root`, or its replacement when the root itself is replaced.
    """
    for parent in list(root.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in swaps:
                parent._modules[key] = swaps[child]
    return swaps.get(root, root)


def replace_by_name_(root: nn.Module, swaps: Mapping[str, nn.Module]) -> nn.Module:
    """`replace_` with the modules to replace given by a fully qualified name of theirs."""
    named = dict(root.named_modules(remove_duplicate=False))
    return replace_(root, {named[name]: module for name, module in swaps.items()})


def in_layout(weight: Tensor, layout: str) -> Tensor:
    """`weight` (K, C, R, S) in the memory format of a layout; itself when it already is."""
    return weight.contiguous(memory_format=MEMORY_FORMATS[layout])


def relayout_(model: nn.Module, layout: str) -> None:
    """Give every 4-d parameter the memory format of `layout`, by replacing parameters.

    Nothing shared with another model changes; parameters tied inside the model stay tied.
    """
    done: dict[int, nn.Parameter] = {
        id(parameter): parameter
        for module in model.modules()
        if getattr(module, "keeps_memory_format", False)
        for parameter in module.parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dim() != 4 or parameter.layout != torch.strided:
                continue
            if id(parameter) not in done:
                moved = in_layout(parameter.detach(), layout)
                if moved.stride() == parameter.stride():
                    done[id(parameter)] = parameter
                else:
                    done[id(parameter)] = nn.Parameter(moved, parameter.requires_grad)
            module._parameters[name] = done[id(parameter)]
