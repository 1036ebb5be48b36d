"""Which maps of a network live or die together, read from Torch-Pruning's dependency graph.

The graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) knows for every
operation which maps of its neighbours a map implies. It is followed here rather than by the
library's own groups, because those forget that two maps were reached from one another: where a
concatenation holds a map and a function of it (GhostNet), both must go or stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Index(NamedTuple):
    """A map of some operation, and the map of the first layer that led there."""

    idx: int
    root_idx: int


# node, side, {set: indices}
Touched = tuple[Any, Any, dict[int, list[int]]]


def trace(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> Any:
    """The dependency graph of a network that may be spoilt: its parameters get gradients.

    Raises:
        ValueError: the network cannot be traced.
    """
    from torch_pruning import DependencyGraph

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    graph: Any = DependencyGraph()
    connect = graph._build_dependency

    def connect_without_shuffles(module2node: dict[Any, Any]) -> None:
        connect(module2node)
        _neutralize_shuffles(graph, module2node)

    graph._build_dependency = connect_without_shuffles
    try:
        with torch.enable_grad():
            return graph.build_dependency(model, inputs, verbose=False)
    except Exception as error:  # whatever the tracer stumbles over
        raise ValueError(
            f"channels: expected model to be traceable, got {type(error).__name__}: {error}"
        ) from error


def _neutralize_shuffles(graph: Any, module2node: dict[Any, Any]) -> None:
    """Let the library see channel shuffles as identities: it takes their reshapes for a flatten.

    The maps behind them are refused in `obstacle`, so that the identity is never relied on.
    """
    types = graph.ops.OPTYPE
    for node in module2node.values():
        if node.type == types.RESHAPE and len(_sizes(node)) > 4:
            node.type = types.ELEMENTWISE
            queue = list(node.inputs)
            while queue:  # back to the reshape that opened the fifth dimension
                before = queue.pop()
                if before.type == types.RESHAPE:
                    before.type = types.ELEMENTWISE
                elif before.type == types.ELEMENTWISE and len(_sizes(before)) != 4:
                    queue.extend(before.inputs)


def obstacle(node: Any) -> str:
    """Why maps that pass this operation cannot be removed, "" if they can."""
    sizes = _sizes(node)
    if "View" in _kind(node) and len(sizes) > 4:
        return "a reshape regroups its maps (channel shuffle)"
    if _kind(node).startswith("Slice") and len(sizes) > 1 and node.grad_fn._saved_dim == 1:
        start, end = node.grad_fn._saved_start, node.grad_fn._saved_end
        if start != 0 or end < sizes[1] or node.grad_fn._saved_step != 1:
            return "a slice with fixed bounds reads its maps"
    return ""


def follow(graph: Any, root: nn.Module) -> tuple[int, list[Touched]]:
    """Everything that the output maps of `root` imply.

    Nothing is followed past an `obstacle`, whose maps stay anyway.

    Returns:
        The number of sets of maps that go together, numbered by their first map of `root`; and
        per operation that is touched: its node, the side (as the library's pruning function) and
        {set: indices there}.

    Cost: every index of every operation once.
    """
    pruner = graph.get_pruner_of_module(root)
    first, side = graph.module2node[root], pruner.prune_out_channels
    parent = list(range(pruner.get_out_channels(root)))

    def leader(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    seen: dict[tuple[Any, Any], dict[int, int]] = {}
    queue: list[tuple[Any, Any, list[Any]]] = [(first, side, [Index(i, i) for i in parent])]
    while queue:
        node, side, reached = queue.pop()
        if graph.is_out_channel_pruning_fn(side) and _width(graph, node) == 1:
            if any(index.idx for index in reached):
                continue  # one map that all others are combined with, such as an attention's
        table = seen.setdefault((node, side), {})
        fresh = []
        for index in reached:
            if index.idx not in table:
                table[index.idx] = index.root_idx
                fresh.append(index)
            else:
                one, other = sorted((leader(table[index.idx]), leader(index.root_idx)))
                parent[other] = one
        queue.extend(_neighbours(node, side, fresh))
    numbers = {r: n for n, r in enumerate(i for i in range(len(parent)) if leader(i) == i)}
    touched: list[Touched] = []
    for (node, side), table in seen.items():
        sets: dict[int, list[int]] = {}
        for i in sorted(table):
            sets.setdefault(numbers[leader(table[i])], []).append(i)
        touched.append((node, side, sets))
    return len(numbers), touched


def _neighbours(node: Any, side: Any, fresh: list[Any]) -> Iterator[tuple[Any, Any, list[Any]]]:
    if not fresh or obstacle(node):
        return
    for dependency in node.dependencies:
        if dependency.is_triggered_by(side):
            reached = fresh
            for mapping in dependency.index_mapping:
                if mapping is not None:
                    reached = mapping(reached)
            if reached:
                yield dependency.target, dependency.handler, reached


def _width(graph: Any, node: Any) -> int | None:
    """Output maps of a layer, None of an operation."""
    if not isinstance(node.module, (nn.Conv2d, nn.Linear, _BatchNorm)):
        return None
    return int(graph.get_pruner_of_module(node.module).get_out_channels(node.module))


def misfit(graph: Any, node: Any, out: bool, table: dict[int, list[int]]) -> bool:
    """Whether indices lie beyond the layer: the library has misread what is in between."""
    pruner = graph.get_pruner_of_module(node.module)
    width = pruner.get_out_channels(node.module) if out else pruner.get_in_channels(node.module)
    return any(i >= width for entry in table.values() for i in entry)


def _sizes(node: Any) -> tuple[int, ...]:
    """Shape of what a view or slice reads; () of other operations."""
    return tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))


def _kind(node: Any) -> str:
    name = getattr(node.grad_fn, "name", None)
    return str(name()) if name is not None else ""
