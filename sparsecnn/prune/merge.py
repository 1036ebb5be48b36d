r"""Pruning without data: a neuron that resembles another one hands its outgoing weights to it.

For two neurons i, j of a linear layer with incoming vectors W_i, W_j (bias appended) and outgoing
columns a_i, a_j,

    s_ij = mean_o(a_oj^2) * ||W_i - W_j||^2

bounds how much the output moves when j is deleted and a_i becomes a_i + a_j: for an activation
that is 1-Lipschitz, like ReLU, the squared change of the outputs is at most
sum_o(a_oj^2) ||W_i - W_j||^2 ||(x, 1)||^2. The pair of least s goes first; a_i has changed then,
and with it the s of deleting i.

Srinivas, Babu, "Data-free parameter pruning for deep neural networks", BMVC 2015.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

from .budget import Budget
from .granularity import neuron
from .protocols import Granularity, Stats
from .targets import Target

# What may stand between a layer and its consumer: the same monotone function for every neuron.
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Hardtanh, nn.Hardsigmoid, nn.Softsign, nn.LogSigmoid, nn.Identity,
)  # fmt: skip
_FUNCTIONS = (
    torch.relu, functional.relu, functional.relu6, functional.leaky_relu, functional.elu,
    functional.selu, torch.sigmoid, functional.sigmoid, torch.tanh, functional.tanh,
    functional.softplus, functional.hardtanh,
)  # fmt: skip
_METHODS = ("relu", "relu_", "sigmoid", "tanh")


class Merge(NamedTuple):
    """One step of a merge path: neuron `dropped` goes, `into` takes over; s of the pair."""

    into: int
    dropped: int
    saliency: float


def merge_path(
    incoming: Tensor, outgoing: Tensor, count: int, may_drop: Tensor | None = None
) -> list[Merge]:
    """The pairs of least saliency, one after the other.

    The saliencies of the whole path are the curve whose knee says how much can go.

    Args:
        incoming: (n, d), row i of the producer with its bias appended.
        outgoing: (o, n), column i of the consumer.
        count: merges, at most n - 1.
        may_drop: (n,) bool, neurons that may be deleted; None for all. Any may take over.

    Returns:
        `count` merges, fewer when nothing is left to drop; ties go to the first pair by (i, j).

    Cost: O(n^2 (d + count)) time, O(n^2) memory.
    """
    incoming = incoming.detach().to("cpu", torch.float64)
    outgoing = outgoing.detach().to("cpu", torch.float64).clone()
    # By differences, not by inner products: equal rows must be at distance 0 exactly.
    distance = torch.cdist(incoming, incoming, compute_mode="donot_use_mm_for_euclid_dist")
    squares = distance.square().fill_diagonal_(math.inf)
    if may_drop is not None:
        squares[:, ~may_drop] = math.inf
    saliency = _weighted(squares, outgoing.square().mean(0))
    path: list[Merge] = []
    for _ in range(min(count, len(incoming) - 1)):
        i, j = divmod(int(saliency.argmin()), len(incoming))
        least = float(saliency[i, j])
        if least == math.inf:
            break
        path.append(Merge(i, j, least))
        outgoing[:, i] += outgoing[:, j]
        saliency[j] = math.inf
        saliency[:, j] = math.inf
        squares[j] = math.inf
        saliency[:, i] = _weighted(squares[:, i], outgoing[:, i].square().mean())
    return path


def _weighted(squares: Tensor, strength: Tensor) -> Tensor:
    """Product in which what must not be chosen stays infinite, also for strength 0."""
    return torch.where(squares.isinf(), squares, squares * strength)


def linear_consumers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers whose only reader is another one behind elementwise monotone activations.

    A layer behind which stands anything else (dropout, a norm, an addition, two readers) is not
    listed: its neurons cannot be merged exactly.

    Args:
        model: a network that `torch.fx` can trace.

    Returns:
        Consumer by qualified name of the producer.

    Raises:
        ValueError: it cannot be traced; write the mapping by hand then.
    """
    modules = dict(model.named_modules())
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception as error:  # whatever the model's own code says about proxies
        raise ValueError(
            f"linear_consumers: expected a model torch.fx can trace, got {type(model).__name__} "
            f"({type(error).__name__}: {error!s:.80}); write the mapping by hand"
        ) from error
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    found: dict[str, nn.Linear] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.Linear):
            continue
        reader = _reader(node, modules)
        if reader is None or calls.count(node.target) > 1 or calls.count(reader) > 1:
            continue
        consumer = modules[reader]
        assert isinstance(consumer, nn.Linear)
        found[node.target] = consumer
    return found


def _reader(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the linear layer that alone reads a node, through activations only."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, nn.Linear):
                return str(node.target)
            allowed = isinstance(module, _ACTIVATIONS)
        elif node.op == "call_function":
            allowed = node.target in _FUNCTIONS
        else:
            allowed = node.op == "call_method" and node.target in _METHODS
        if not allowed:
            return None
    return None


def _incoming(t: Target) -> Tensor:
    """Effective weight with the bias appended, (n, d + 1) float64 on the CPU."""
    weight = t.weight.detach().to("cpu", torch.float64)
    bias = t.module.bias
    column = weight.new_zeros(len(weight))
    if bias is not None:
        assert isinstance(bias, Tensor)
        column.copy_(bias.detach())
    return torch.cat([weight, column.unsqueeze(1)], dim=1)


def _consumer(what: str, consumers: Mapping[str, nn.Linear], t: Target) -> Target:
    """The consumer of a layer as a target.

    Raises:
        ValueError: there is none, or producer and consumer do not fit.
    """
    if not isinstance(t.module, nn.Linear):
        raise ValueError(
            f"{what}: expected linear layers, got {type(t.module).__name__} {t.name!r}"
        )
    consumer = consumers.get(t.name)
    if not isinstance(consumer, nn.Linear) or consumer.in_features != t.module.out_features:
        got = "none" if consumer is None else f"{consumer}"
        raise ValueError(
            f"{what}: expected consumers to hold, for {t.name!r}, the linear layer that reads its "
            f"{t.module.out_features} outputs, got {got}"
        )
    return Target(consumer, "weight", f"consumer of {t.name}")


@dataclass(frozen=True)
class PairMerge:
    """Delete neurons of linear layers by pairs of least saliency; needs no data.

    Layers are taken one by one, in order: the saliencies of a layer see what the merges of the
    layer before did to its weights. Use it with `MergeIntoNearest` and the granularity "neuron".

    Attributes:
        consumers: by producer name, the linear layer that reads its outputs; between both only an
            elementwise monotone activation. See `linear_consumers`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    uses_scores: ClassVar[bool] = False
    uses_budget: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    consumers: Mapping[str, nn.Linear]

    def select(
        self,
        targets: Sequence[Target],
        scores: Mapping[Target, Tensor],
        granularity: Granularity,
        budget: Budget | None,
        stats: Stats | None,
        current: Mapping[Target, Tensor],
    ) -> dict[Target, Tensor]:
        """Keep flags per neuron; at least one stays. See `Selector.select`.

        Raises:
            ValueError: another granularity than "neuron", no budget, a layer that is not linear or
                has no fitting consumer.
        """
        if granularity != neuron:
            raise ValueError(f"PairMerge: expected granularity 'neuron', got {granularity}")
        if budget is None:
            raise ValueError("PairMerge: expected a budget, got None")
        readers = {t: _consumer("PairMerge", self.consumers, t) for t in targets}
        keep = {}
        for t in targets:
            alive = _alive(t)
            dropped = math.ceil(budget.to_drop(len(alive)) - 0.5) - int((~alive).sum())
            for merge in _path(t, readers[t], alive, alive, max(dropped, 0)):
                alive[merge.dropped] = False
            keep[t] = alive
        return keep


@dataclass(frozen=True)
class MergeIntoNearest:
    """Add the outgoing weights of every dropped neuron to those of its nearest neighbour.

    Dropped neurons go in the order of their saliency, each into the one that resembles it most
    among those still there; with `PairMerge` that is the very path the selector took. Their
    column in the consumer and their bias become 0: nothing of them is left to remove.

    Attributes:
        consumers: as in `PairMerge`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    consumers: Mapping[str, nn.Linear]

    def apply(self, t: Target, keep: Tensor, stats: Stats | None) -> None:
        """Update the consumer's weight and the layer's bias in place.

        Raises:
            ValueError: not flags of neurons, a consumer that does not fit, or one whose own mask
                would swallow what is added to it.
        """
        consumer = _consumer("MergeIntoNearest", self.consumers, t)
        if keep.shape != t.shape[:1]:
            raise ValueError(
                f"MergeIntoNearest: expected one flag for each of the {t.shape[0]} neurons of "
                f"{t.name!r}, got {tuple(keep.shape)}"
            )
        alive = _alive(t)
        dropped = ~keep.cpu() & alive
        before = consumer.weight.detach().clone()
        outgoing = before.to("cpu", torch.float64, copy=True)
        for into, gone, _ in _path(t, consumer, alive, dropped, int(dropped.sum())):
            outgoing[:, into] += outgoing[:, gone]
            outgoing[:, gone] = 0
        # The difference, so that what a mask hides of the dense weight stays as it is.
        change = (outgoing - before.to("cpu", torch.float64)).to(before)
        dense = consumer.dense.detach().clone()
        consumer.dense.add_(change)
        if not torch.equal(consumer.weight, before + change):
            consumer.dense.copy_(dense)
            raise ValueError(
                f"MergeIntoNearest: expected the {consumer.name} without masked single weights, "
                "got a mask that swallows merged ones; merge before pruning elements"
            )
        bias = t.module.bias
        if bias is not None:
            assert isinstance(bias, Tensor)
            bias[dropped.to(bias.device)] = 0


def _alive(t: Target) -> Tensor:
    """Neurons that read anything, (n,) bool on the CPU; the others are constants and stay so."""
    return t.weight.detach().cpu().any(dim=1)


def _path(t: Target, consumer: Target, alive: Tensor, may_drop: Tensor, count: int) -> list[Merge]:
    """`merge_path` among living neurons, in numbers of all neurons."""
    numbers = alive.nonzero().flatten().tolist()
    outgoing = consumer.weight.detach().cpu()[:, alive]
    path = merge_path(_incoming(t)[alive], outgoing, count, may_drop[alive])
    return [Merge(numbers[i], numbers[j], s) for i, j, s in path]
