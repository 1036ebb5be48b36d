"""Physical removal of what zeros have made useless, where the outputs stay the same.

A map of a layer can go in two cases:

1. Nobody reads it: every consumer's weights on it are zero.
2. It is a constant, because a filter that makes it is zero. Behind a batch norm or a bias that
   constant need not be 0; then it is added to the bias of every consumer. This is exact unless a
   consumer pads with zeros, whose border would not see the constant: such a map stays.

Which maps are coupled, and how layers are sliced, is the business of `channels`. Whether a map is
constant is measured on two inputs, the example and noise; that removal changes nothing is checked
on both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn._models import evaluating, positional, refuse_sparse_layers

from .channels import (
    ChannelReport,
    Coupled,
    add_to_plan,
    cells_of,
    check_removal,
    coupled_groups,
)
from .surgery import Plan, apply_plan

_LAYERS = (nn.Conv2d, nn.Linear)


@torch.no_grad()
def remove_zeroed_(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> ChannelReport:
    """Remove the filters and channels that zeros have made useless, in place.

    Repeated until nothing more goes: a filter that nobody reads leaves channels unread in front
    of it. Every layer keeps at least one filter. A network that cannot be traced stays whole.

    Args:
        model: plain weights: finalize a `Pruner` first. Parameters of smaller layers are new
            objects.
        example_inputs: one input tensor or the positional arguments of `model`.

    Returns:
        What went, and per layer with zero filters left, why they stay.

    Raises:
        ValueError: layers swapped by sparsecnn. The model is unchanged then.

    Cost: nothing without whole zero filters or channels; else a trace and six forward passes per
    round.
    """
    refuse_sparse_layers(model, "remove_zeroed_")
    arguments = positional(example_inputs)
    report = ChannelReport()
    before = {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, _LAYERS)}
    while _has_zero_groups(model):
        report.kept.clear()
        try:
            groups = coupled_groups(copy.deepcopy(model), arguments)
        except ValueError as error:
            report.kept["(model)"] = str(error)
            break
        if not _remove_once(model, groups, arguments, report):
            break
    for name, size in before.items():
        layer: Any = model.get_submodule(name)
        if len(layer.weight) != size:
            report.layers[name] = (size, len(layer.weight))
    return report


def _has_zero_groups(model: nn.Module) -> bool:
    for module in model.modules():
        if isinstance(module, _LAYERS):
            alive = module.weight != 0
            rows = alive.flatten(1).any(1)
            columns = alive.flatten(2).any(2).any(0) if alive.dim() > 2 else alive.any(0)
            if not (rows.all() and columns.all()):
                return True
    return False


def _remove_once(
    model: nn.Module, groups: Sequence[Coupled], arguments: tuple[Any, ...], report: ChannelReport
) -> bool:
    """One round over all coupled groups; True if anything went."""
    inputs = _consumer_inputs(model, arguments)
    plan = Plan()
    folded = copy.deepcopy(model)  # with the constants in the consumers' biases
    for coupled in groups:
        useless = _useless(model, coupled, inputs)
        silent = [i for i in range(coupled.size) if _some_filter_is_zero(model, coupled, i)]
        reason = coupled.refusal
        if not reason and len(useless) < len(silent):
            reason = "their maps are not constant, or constants that a zero-padded layer reads"
        if silent and (coupled.refusal or reason):
            for name in coupled.producers:
                report.kept[name] = f"{len(silent)} filters are zero, {reason}"
        if coupled.refusal or not useless:
            continue
        # Convolution groups must lose equally many, and something must be left.
        options = [[i for i in cell if i in useless] for cell in cells_of(coupled, model)]
        count = min(
            min(len(some), len(cell) - 1)
            for some, cell in zip(options, cells_of(coupled, model), strict=True)
        )
        maps = {i for some in options for i in some[:count]}
        if maps:
            add_to_plan(plan, coupled, maps)
            _fold_constants_(folded, coupled, {i: useless[i] for i in maps})
    if not any(gone for sides in plan.values() for gone in sides.values()):
        return False
    _check(model, folded, plan, arguments)
    with torch.no_grad():
        for name, module in folded.named_modules():
            if isinstance(module, _LAYERS) and "in" in plan.get(name, {}):
                setattr(model.get_submodule(name), "bias", module.bias)  # noqa: B010
    apply_plan(model, plan)
    return True


def _check(model: nn.Module, folded: nn.Module, plan: Plan, arguments: tuple[Any, ...]) -> None:
    for given in (arguments, _noise(arguments)):
        check_removal(folded, model, plan, given, "remove_zeroed_")


def _consumer_inputs(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """What every layer reads, over all calls on the example and on noise."""
    found: dict[str, list[Tensor]] = {}

    def reads(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found.setdefault(name, []).append(args[0].detach())

        return hook

    handles = [
        module.register_forward_pre_hook(reads(name))
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
    ]
    try:
        with evaluating(model), torch.no_grad():
            for given in (arguments, _noise(arguments)):
                model(*given)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _noise(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(a.shape, generator=source).to(a)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in arguments
    )


def _some_filter_is_zero(model: nn.Module, coupled: Coupled, i: int) -> bool:
    for name, table in coupled.producers.items():
        layer: Any = model.get_submodule(name)
        if i in table and not layer.weight[table[i]].any():
            return True
    return False


def _useless(
    model: nn.Module, coupled: Coupled, inputs: Mapping[str, list[Tensor]]
) -> dict[int, dict[tuple[str, int], float]]:
    """Maps that may go: map -> {(consumer, its input index): the constant it reads there}."""
    consumers = [(name, table) for (name, side), table in coupled.sides.items() if side == "in"]
    found = {}
    for i in range(coupled.size):
        zero_filter = _some_filter_is_zero(model, coupled, i)
        constants: dict[tuple[str, int], float | None] = {}
        for name, index in [(n, index) for n, table in consumers for index in table.get(i, [])]:
            module = model.get_submodule(name)
            if not _column(module, index).any():
                constants[name, index] = 0.0
            elif zero_filter:
                constants[name, index] = _constant(module, index, inputs.get(name, []))
            else:
                constants[name, index] = None
        if None not in constants.values():
            found[i] = {at: value for at, value in constants.items() if value is not None}
    return found


def _column(module: Any, index: int) -> Tensor:
    """Weights on one input map, over all filters that read it."""
    weight: Tensor = module.weight
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        width = module.in_channels // module.groups
        rows = module.out_channels // module.groups
        g = index // width
        return weight[g * rows : (g + 1) * rows, index % width]
    return weight[:, index]


def _constant(module: Any, index: int, inputs: Sequence[Tensor]) -> float | None:
    """The value that a consumer reads everywhere on a map; None if there is none to fold."""
    if not inputs:
        return None
    values = [(x[:, index] if isinstance(module, nn.Conv2d) else x[..., index]) for x in inputs]
    first = float(values[0].flatten()[0])
    if any(bool((value != first).any()) for value in values):
        return None
    padded = isinstance(module, nn.Conv2d) and (
        isinstance(module.padding, str) or any(module.padding)
    )
    return None if first != 0 and padded and module.padding != "valid" else first


def _fold_constants_(
    model: nn.Module, coupled: Coupled, maps: Mapping[int, Mapping[tuple[str, int], float]]
) -> None:
    """Add what consumers get from constant maps to their biases."""
    for constants in maps.values():
        for (name, index), value in constants.items():
            if value == 0:
                continue
            module: Any = model.get_submodule(name)
            rows = slice(None)
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                g = index // (module.in_channels // module.groups)
                size = module.out_channels // module.groups
                rows = slice(g * size, (g + 1) * size)
            if module.bias is None:
                zeros = torch.zeros(module.weight.shape[0]).to(module.weight)
                module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
            column = _column(module, index)
            module.bias.data[rows] += value * column.reshape(len(column), -1).sum(1)
