"""What a model's layers are and see: one forward pass on example inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from sparsecnn._models import evaluating, positional, refuse_sparse_layers

from .problem import UnsupportedLayer

MAX_ZEROS = 0.3
"""Share of zero weights above which a network counts as pruned."""


@dataclass
class Site:
    """One layer of a model.

    Attributes:
        names: all names of the module, the first one first.
        module: the layer.
        inputs: of its first call.
        calls: in one forward pass.
        norm: name of the batch norm that reads its output, "" for none.
        obstacle: why no method can take it.
    """

    names: list[str]
    module: nn.Module
    inputs: Tensor | None = None
    calls: int = 0
    norm: str = ""
    obstacle: str = ""
    order: int = field(default=-1, repr=False)

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@torch.no_grad()
def survey(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> list[Site]:
    """All convolutions and linear layers, in the order of their first calls.

    Raises:
        ValueError: layers swapped by sparsecnn, masks, or many zeros: factorization comes first.
    """
    refuse_sparse_layers(model, "factorize_")
    _refuse_masks(model)
    sites: dict[nn.Module, Site] = {}
    norms: dict[nn.Module, str] = {}
    owners: dict[int, list[Site]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            norms.setdefault(module, name)
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if module in sites:
            sites[module].names.append(name)
            continue
        sites[module] = Site([name], module)
        owners.setdefault(id(module.weight), []).append(sites[module])
    for sharing in owners.values():
        for site in sharing if len(sharing) > 1 else []:
            others = ", ".join(repr(other.name) for other in sharing if other is not site)
            site.obstacle = f"shares its weight with {others}"
    _watch(model, positional(example_inputs), sites, norms)
    for site in sites.values():
        if not site.obstacle and site.inputs is None:
            site.obstacle = "was not called on example_inputs"
    return sorted(sites.values(), key=lambda site: (site.order < 0, site.order))


def _refuse_masks(model: nn.Module) -> None:
    masked = [
        name
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module) or hasattr(module, "weight_mask")
    ]
    if masked:
        raise ValueError(
            f"factorize_: expected model without masks or parametrizations, got {len(masked)}: "
            f"{', '.join(masked[:5])}; factorize first, then prune"
        )
    weights = [
        m.weight for m in model.modules()
        if isinstance(m, (_ConvNd, nn.Linear)) and isinstance(m.weight, Tensor)
    ]  # fmt: skip
    total = sum(w.numel() for w in weights)
    zeros = total - sum(int(w.count_nonzero()) for w in weights)
    # Factors are dense: what pruning has won would be lost without a word.
    if zeros > MAX_ZEROS * total:
        raise ValueError(
            f"factorize_: expected model with at most {MAX_ZEROS:.0%} zero weights, got "
            f"{zeros / total:.0%}; factorize first, then prune, or remove what is zero: "
            "sparsecnn.materialize"
        )


def _watch(
    model: nn.Module, arguments: tuple[Any, ...], sites: dict[nn.Module, Site],
    norms: dict[nn.Module, str],
) -> None:  # fmt: skip
    outputs: dict[int, Site] = {}
    kept: list[Tensor] = []  # so that no id is given twice
    calls = 0

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal calls
        site = sites[module]
        site.calls += 1
        if site.inputs is None and args and isinstance(args[0], Tensor):
            site.inputs = args[0].detach().clone()
            site.order = calls
        calls += 1
        if isinstance(output, Tensor):
            outputs[id(output)] = site
            kept.append(output)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in outputs:
            outputs[id(args[0])].norm = norms[module]

    handles = [module.register_forward_hook(leave) for module in sites]
    handles += [module.register_forward_pre_hook(enter) for module in norms]
    try:
        with evaluating(model):
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fold_norm_(
    model: nn.Module, site: Site, example_inputs: Tensor | Sequence[Any]
) -> Callable[[], None] | None:
    """Fold the batch norm behind a layer into it, in place; proven by a forward pass.

    Returns:
        What undoes it; None where it was not folded, because another module reads what the layer
        returns, or there is no batch norm.

    Raises:
        UnsupportedLayer: the batch norm keeps no statistics.
    """
    if not site.norm:
        return None
    norm = model.get_submodule(site.norm)
    conv = site.module
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedLayer(f"factorize_: {site.name}: its batch norm has no statistics")
    arguments = positional(example_inputs)
    with evaluating(model):
        wanted = model(*arguments)
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, nn.Parameter)
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    if isinstance(bias, Tensor):
        shift = shift + bias * scale
    shape = (-1, *(1,) * (weight.dim() - 1))
    conv.weight = nn.Parameter(weight * scale.view(shape), requires_grad=weight.requires_grad)
    conv.bias = nn.Parameter(shift.detach().clone())
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is norm]

    def undo() -> None:
        conv.weight, conv.bias = weight, bias
        for name in names:
            set_module(model, name, norm)

    for name in names:
        set_module(model, name, nn.Identity())
    with evaluating(model):
        got = model(*arguments)
    size = float(wanted.abs().max()) if isinstance(wanted, Tensor) else 0.0
    if isinstance(wanted, Tensor) and float((got - wanted).abs().max()) <= 1e-4 * max(size, 1.0):
        return undo
    undo()
    return None


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
