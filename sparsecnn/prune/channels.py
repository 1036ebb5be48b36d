"""Physical removal of filters: the layers become smaller dense layers.

Which layers are coupled comes from the dependency graph of Torch-Pruning (Fang et al., "DepGraph:
Towards Any Structural Pruning", CVPR 2023); what goes is decided here, with exact counts and ties
broken by position, and the slicing is done here as well, because a grouped convolution may lose
different channels in each of its groups. Every removal is checked by a forward pass against the
network in which the consumers of the removed maps ignore them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecnn._models import evaluating, positional, refuse_sparse_layers

from .api import Config, resolve
from .coupling import follow, misfit, obstacle, trace
from .granularity import filter_
from .importance import PruneConfig
from .protocols import Calibration, Stats
from .selection import drop_lowest, score_targets
from .surgery import Plan, apply_plan, is_depthwise, zero_columns_
from .targets import Target, check_maskable

_SLICED = (nn.Conv2d, nn.Linear, _BatchNorm)


@dataclass
class ChannelReport:
    """What a removal did.

    Attributes:
        layers: per layer that lost filters, their number before and after.
        kept: per layer that was left whole, why.
    """

    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {old} > {new}" for name, (old, new) in self.layers.items()]
        return "\n".join(lines + [f"{name}: kept, {why}" for name, why in self.kept.items()])


@dataclass
class Coupled:
    """Maps that live or die together: map i of the first producer and all that it implies.

    Where maps of the first producer imply each other they count as one.

    Attributes:
        size: number of maps.
        producers: per convolution or linear layer that makes them, {map: its filters}.
        sides: (layer, "out" or "in") -> {map: indices in that layer}.
        refusal: why nothing here may be removed, "" if it may.
    """

    size: int
    producers: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    sides: dict[tuple[str, str], dict[int, list[int]]] = field(default_factory=dict)
    refusal: str = ""


def prune_channels_(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    config: Config,
    *,
    round_to: int | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    greedy: bool = False,
    include_classifier: bool = False,
    calibration: Calibration | None = None,
) -> tuple[nn.Module, ChannelReport]:
    """Remove the least important filters, with all that depends on them, in place.

    A filter's score is that of `config` over the granularity "filter"; coupled filters (both
    sides of an addition, the depthwise convolution behind) share one score. Removing filter o
    removes its bias, its batch norm entries and the input columns of every consumer. The default
    with `Magnitude` is Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017). The
    Parameters are new objects: build the optimizer anew.

    Args:
        model: the network; convolutions, linear layers and batch norm can shrink.
        example_inputs: one input or the positional arguments, for tracing and for the check.
        config: as in `prune_`; the budget counts filters, coupled ones as one. Scope "global"
            lets all coupled groups with one config compete.
        round_to: keep a multiple of this many filters (rounded up), because vector units work in
            lanes of 8 or 16 and a rest costs as much as a full one. None is 8 from 64 filters on,
            else 1: 8 is 2 to 8 % faster than 1, and than 16, on four networks (Zen 4, one image,
            ``bench/channels.py --rounding``).
        reduce: how the scores of coupled filters combine.
        greedy: score layers in registration order and ignore weights on maps that are already
            removed (Li et al., section 3.3); the default scores every layer in full. Scope "layer"
            only.
        include_classifier: as in `prune_`; the model's outputs themselves are never removed.
        calibration: collects what an importance lists in `needs`.

    Returns:
        `model` and the report. Grouped convolutions lose equally many channels in every group;
        each coupled group keeps at least one filter (one per convolution group).

    Raises:
        TypeError: `config` or `model` of the wrong type.
        ValueError: bad options, nothing that can be removed, or a network in which a removal
            cannot be proven equal to ignoring the maps. The model is unchanged then.

    Cost: two copies of the model, one traced and two plain forward passes.
    """
    refuse_sparse_layers(model, "prune_channels_")
    if round_to is not None and (
        isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1
    ):
        raise ValueError(f"prune_channels_: expected round_to an int >= 1, got {round_to!r}")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"prune_channels_: expected reduce 'mean' or 'sum', got {reduce!r}")
    what, inputs = "prune_channels_: expected", positional(example_inputs)
    chosen_here = resolve(model, config, None, include_classifier, inputs)
    for target, entry in chosen_here.items():
        check_maskable(target, "prune_channels_")
        if target.foreign_mask is not None or len(target.owners) > 1:
            raise ValueError(
                f"prune_channels_: expected layer {target.name!r} with a plain weight of its own, "
                "got a masked or shared one; call torch.nn.utils.prune.remove or untie it"
            )
        if entry.granularity not in (None, filter_):
            raise ValueError(f"{what} granularity 'filter', got {entry.granularity}")
        if entry.budget() is None:
            raise ValueError(f"{what} a budget for layer {target.name!r}, got none")
        if greedy and entry.scope == "global":
            raise ValueError("prune_channels_: expected scope 'layer' with greedy, got 'global'")
    # Everything is decided and tried on copies; the model itself changes only at the very end.
    work = copy.deepcopy(model)
    chosen = resolve(work, config, None, include_classifier, inputs)
    needs = frozenset().union(*(c.needs for c in chosen.values()))
    if needs and calibration is None:
        raise ValueError(
            f"prune_channels_: expected calibration to collect {', '.join(sorted(needs))}, got None"
        )
    stats = calibration.collect(work, list(chosen), needs) if needs and calibration else None
    groups = coupled_groups(work, inputs)
    report, plan = _decide(work, groups, chosen, stats, reduce, round_to, greedy)
    if not any(s.get("out") for s in plan.values()) and len(report.kept) == len(chosen):
        raise ValueError(f"prune_channels_: expected layers that can shrink, got none; {report}")
    check_removal(model, work, plan, inputs, "prune_channels_")
    apply_plan(model, plan)
    return model, report


def prune_channels(
    model: nn.Module, example_inputs: Tensor | Sequence[Any], config: Config, **options: Any
) -> tuple[nn.Module, ChannelReport]:
    """The copying twin of `prune_channels_`, with the same options."""
    return prune_channels_(copy.deepcopy(model), example_inputs, config, **options)


def coupled_groups(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> list[Coupled]:
    """The coupled maps of a network that may be spoilt: it is traced with gradients.

    Raises:
        ValueError: the network cannot be traced.
    """
    graph = trace(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    # Heads that only run in training would go on reading maps that are gone.
    idle = [n for m, n in names.items() if isinstance(m, _SLICED) and m not in graph.module2node]
    if idle:
        raise ValueError(
            "channels: expected every layer to reach the outputs in evaluation mode, got unused "
            f"{idle[:5]}; remove them, or build the model without auxiliary heads"
        )
    found: list[Coupled] = []
    done: set[str] = set()
    roots = [m for m in graph.module2node if isinstance(m, (nn.Conv2d, nn.Linear))]
    # The widest first: it reaches all that reach only some of its maps.
    for module in sorted(roots, key=lambda m: -len(m.weight)):
        if names[module] not in done:
            found.append(_read_group(graph, module, names))
            done.update(found[-1].producers)
    for coupled in found:
        coupled.refusal = coupled.refusal or _uneven(coupled, model)
    return found


def _read_group(graph: Any, root: nn.Module, names: Mapping[nn.Module, str]) -> Coupled:
    size, touched = follow(graph, root)
    coupled = Coupled(size)
    read = False
    for node, side, table in touched:
        coupled.refusal = coupled.refusal or obstacle(node)
        module = node.module
        if module not in names:
            if isinstance(module, nn.Parameter):
                coupled.refusal = "a parameter outside of the known layers is coupled to it"
            continue
        name = names[module]
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue  # one slope for all maps
        if not isinstance(module, _SLICED):
            coupled.refusal = f"{name} ({type(module).__name__}) is coupled to it"
            continue
        depthwise = isinstance(module, nn.Conv2d) and is_depthwise(module)
        out = depthwise or graph.is_out_channel_pruning_fn(side)
        if misfit(graph, node, out, table):
            coupled.refusal = f"its maps cannot be followed to {name}"
        coupled.sides[name, "out" if out else "in"] = table
        if out and not isinstance(module, _BatchNorm):
            coupled.producers[name] = table
        read = read or not out
    if not read:
        coupled.refusal = coupled.refusal or "no layer reads its maps: they are the model's output"
    return coupled


def cells_of(coupled: Coupled, model: nn.Module) -> list[list[int]]:
    """The maps by which convolution groups they belong to; each cell loses equally many."""
    labels: dict[int, list[int]] = {i: [] for i in range(coupled.size)}
    for _, width, table in _grouped_sides(coupled, model):
        for i in labels:
            labels[i].append(min(table[i]) // width if i in table else -1)
    cells: dict[tuple[int, ...], list[int]] = {}
    for i, label in labels.items():
        cells.setdefault(tuple(label), []).append(i)
    return list(cells.values())


def _grouped_sides(
    coupled: Coupled, model: nn.Module
) -> Iterator[tuple[int, int, dict[int, list[int]]]]:
    """Groups, channels per group and table of every grouped convolution that is touched."""
    for (name, side), table in coupled.sides.items():
        conv = model.get_submodule(name)
        if isinstance(conv, nn.Conv2d) and conv.groups > 1 and not is_depthwise(conv):
            channels = conv.out_channels if side == "out" else conv.in_channels
            yield conv.groups, channels // conv.groups, table


def _uneven(coupled: Coupled, model: nn.Module) -> str:
    """Why no map can go such that every convolution group loses equally many, "" if one can."""
    cells = cells_of(coupled, model)
    if len(cells) == coupled.size > 1:
        return "each of its maps is a whole convolution group"
    even = len({len(cell) for cell in cells}) == 1
    for groups, width, table in _grouped_sides(coupled, model):
        losses = Counter(i // width for cell in cells for i in table.get(cell[0], ()))
        even = even and len(losses) == groups and len(set(losses.values())) == 1
    return "" if even else "its convolution groups are coupled unevenly"


def _decide(
    work: nn.Module,
    groups: Sequence[Coupled],
    chosen: Mapping[Target, PruneConfig],
    stats: Stats | None,
    reduce: str,
    round_to: int | None,
    greedy: bool,
) -> tuple[ChannelReport, Plan]:
    """Select in every group; `work` ends with the consumers' columns of removed maps zeroed."""
    report, plan = ChannelReport(), Plan()
    targets = {t.name: t for t in chosen}
    order = {name: i for i, (name, _) in enumerate(work.named_modules())}
    pools: dict[PruneConfig | int, list[tuple[Coupled, PruneConfig]]] = {}
    for coupled in sorted(groups, key=lambda g: min(order[n] for n in g.producers)):
        configs = {chosen[targets[n]] if n in targets else None for n in coupled.producers}
        addressed = [n for n in coupled.producers if n in targets]
        reason = coupled.refusal
        if not reason and len(configs) > 1:
            reason = f"coupled layers {', '.join(coupled.producers)} have different configs"
        config = next(iter(configs))
        if reason or config is None:
            report.kept.update({n: reason for n in addressed})
            continue
        key = config if config.scope == "global" else len(pools)
        pools.setdefault(key, []).append((coupled, config))

    def rank(pool: list[tuple[Coupled, PruneConfig]]) -> list[list[tuple[float, list[int]]]]:
        return [_slots(c, config, work, targets, stats, reduce) for c, config in pool]

    # Unless greedy, all scores come before the first columns of `work` are zeroed.
    ranked = None if greedy else {key: rank(pool) for key, pool in pools.items()}
    for key, pool in pools.items():
        slots = rank(pool) if ranked is None else ranked[key]
        # The best slot of every group is its floor.
        free = [s[:-1] for s in slots]
        budget = pool[0][1].budget()
        assert budget is not None
        target = budget.to_drop(sum(c.size for c, _ in pool))
        flat = [slot for entry in free for slot in entry]
        keep = drop_lowest(
            torch.tensor([score for score, _ in flat], dtype=torch.float64),
            torch.tensor([len(maps) for _, maps in flat], dtype=torch.int64),
            target,
        )
        start = 0
        for (coupled, _), entry in zip(pool, free, strict=True):
            dropped = int((~keep[start : start + len(entry)]).sum())
            start += len(entry)
            step = coupled.size // (len(entry) + 1)
            lanes = round_to or (8 if coupled.size >= 64 else 1)
            while dropped and (coupled.size - dropped * step) % lanes:
                dropped -= 1
            maps = {i for _, slot in entry[:dropped] for i in slot}
            add_to_plan(plan, coupled, maps)
            ignore_maps_(work, coupled, maps)
    for name in (n for pool in pools.values() for coupled, _ in pool for n in coupled.producers):
        old = targets[name].shape[0]
        report.layers[name] = (old, old - len(plan[name].get("out", ())))
    return report, plan


def _slots(
    coupled: Coupled,
    config: PruneConfig,
    work: nn.Module,
    targets: Mapping[str, Target],
    stats: Stats | None,
    reduce: str,
) -> list[tuple[float, list[int]]]:
    """Sets of maps to remove one after the other, one map of every cell, lowest first."""
    names = list(coupled.producers)
    scores = score_targets(config, [targets[n] for n in names], filter_, stats)
    total = torch.zeros(coupled.size, dtype=torch.float64)
    count = torch.zeros(coupled.size, dtype=torch.float64)
    for name in names:
        for i, filters in coupled.producers[name].items():
            total[i] += scores[targets[name]][filters].sum()
            count[i] += len(filters)
    score = total / count.clamp(min=1) if reduce == "mean" else total
    ranked = []
    for cell in cells_of(coupled, work):
        # Of equal scores the last goes first, as everywhere in selection.
        ascending = torch.argsort(score[cell], descending=True, stable=True).flip(0)
        ranked.append([cell[int(i)] for i in ascending])
    return [
        (float(score[list(maps)].mean()), list(maps)) for maps in zip(*ranked, strict=True)
    ]


def add_to_plan(plan: Plan, coupled: Coupled, maps: set[int]) -> None:
    """Note what the removal of these maps takes from every layer."""
    for (name, side), table in coupled.sides.items():
        gone = plan.setdefault(name, {}).setdefault(side, set())
        gone.update(index for i in maps for index in table.get(i, []))


def ignore_maps_(model: nn.Module, coupled: Coupled, maps: set[int]) -> None:
    """Zero the weights that consumers put on these maps: the reference of a removal."""
    for (name, side), table in coupled.sides.items():
        if side == "in":
            gone = [index for i in maps for index in table.get(i, [])]
            zero_columns_(model.get_submodule(name), gone)


def check_removal(
    model: nn.Module, reference: nn.Module, plan: Plan, inputs: Any, what: str
) -> None:
    """Try `plan` on a copy of `model`: its outputs must be those of `reference`.

    Raises:
        ValueError: the copy does not run, or gives something else.
    """
    trial = copy.deepcopy(model)
    arguments = (inputs,) if isinstance(inputs, Tensor) else inputs
    try:
        apply_plan(trial, plan)
        with torch.no_grad(), evaluating(trial), evaluating(reference):
            pairs = list(
                zip(_tensors(trial(*arguments)), _tensors(reference(*arguments)), strict=True)
            )
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"{what}: expected a model whose couplings can be traced, got {error} after removal"
        ) from error
    for ours, theirs in pairs:
        if not theirs.isfinite().all():
            raise ValueError(f"{what}: expected finite outputs on example_inputs, got NaN or inf")
        close = ours.shape == theirs.shape and torch.allclose(
            ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-9
        )
        if not close:
            raise ValueError(
                f"{what}: expected removal to equal ignoring the maps, got other outputs; leave "
                "out layers around operations that mix channels (config None)"
            )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output or ()
    return [tensor for value in values for tensor in _tensors(value)]
