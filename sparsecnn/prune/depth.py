"""Physical removal of whole residual branches."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsecnn._models import evaluating, positional

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


def remove_layers(
    model: nn.Module, names: Sequence[str], example_inputs: Tensor | Sequence[Any]
) -> fx.GraphModule:
    """Remove the residual branches that contain the named layers; their shortcuts stay.

    A branch is y = shortcut(x) + f(x) with the layer in f: the sum becomes shortcut(x), exactly
    what f(x) = 0 gives (depth is the coarsest granularity of Anwar & Sung, "Coarse Pruning of
    CNNs with Random Masks", 2016, arXiv 1512.08571). A projection is a branch like the other: when
    it is named, it goes and f(x) stays. A layer outside of any branch may go only if it maps a
    shape to itself with stride 1; its input then passes through.

    Args:
        model: a network that torch.fx can trace; unchanged if it cannot be done.
        names: qualified names of layers; a branch may be named by any of its layers.
        example_inputs: one input or the positional arguments, to know the shapes.

    Returns:
        The traced network, which shares its layers with `model` and lacks those that went.

    Raises:
        ValueError: not traceable, an unknown name, or a removal that leaves wrong shapes.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:
        raise ValueError(
            f"remove_layers: expected model to be traceable by torch.fx, got {error}"
        ) from error
    arguments = positional(example_inputs)
    shapes = _shapes(traced, arguments)
    calls = {str(n.target): n for n in traced.graph.nodes if n.op == "call_module"}
    for name in names:
        if name not in calls:
            raise ValueError(
                f"remove_layers: expected the name of a layer that is called, got {name!r}"
            )
        node = calls[name]
        if node not in traced.graph.nodes:
            continue  # went with a branch named before
        _bypass(node, shapes, name)
        traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    traced.train(model.training)
    return traced


def _bypass(node: fx.Node, shapes: dict[str, torch.Size], name: str) -> None:
    """Let the consumers of the branch, or of the layer itself, read what was before it."""
    last = node
    while len(last.users) == 1:
        reader = next(iter(last.users))
        if (reader.op == "call_function" or reader.op == "call_method") and reader.target in _ADDS:
            others = [n for n in reader.all_input_nodes if n is not last]
            if len(others) == 1 and _start(last, others[0]) is not None:
                other = others[0]
                # The shortcut must not itself be what is being removed, and the sum must not
                # broadcast it.
                if shapes.get(other.name) == shapes.get(reader.name):
                    reader.replace_all_uses_with(other)
                    return
            break
        last = reader
    source = node.args[0]
    owner = node.graph.owning_module
    assert owner is not None
    stride = getattr(owner.get_submodule(name), "stride", 1)
    # A map of one pixel keeps its shape under a stride, larger ones would not.
    if isinstance(source, fx.Node) and stride in (1, (1, 1)):
        if shapes.get(source.name) == shapes.get(node.name):
            node.replace_all_uses_with(source)
            return
    raise ValueError(
        f"remove_layers: expected layer {name!r} inside of a residual branch, or with stride 1 and "
        "equal input and output shapes, got neither"
    )


def _start(branch: fx.Node, shortcut: fx.Node) -> fx.Node | None:
    """Where the two meet upstream: None if they are not branches of one input."""
    before = _upstream(branch)
    return next((n for n in [shortcut, *_upstream(shortcut)] if n in before), None)


def _upstream(node: fx.Node) -> list[fx.Node]:
    seen: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        for source in queue.pop(0).all_input_nodes:
            if source not in seen:
                seen[source] = None
                queue.append(source)
    return list(seen)


def _shapes(traced: fx.GraphModule, arguments: tuple[Any, ...]) -> dict[str, torch.Size]:
    """Output shape of every node that gives a tensor."""
    found: dict[str, torch.Size] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                found[n.name] = result.shape
            return result

    spare = copy.deepcopy(traced)
    with torch.no_grad(), evaluating(spare):
        Recorder(spare).run(*arguments)
    return found
