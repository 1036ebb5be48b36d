"""Work and weights: multiply-accumulates (MACs) and parameters, in all and with a nonzero weight.

The counts come from `torch.utils.flop_counter.FlopCounterMode`, which knows each operator's formula
but sees neither zeros nor what a sparse operator left out; both are added here per layer. One MAC
is two FLOPs. Operators without a formula (elementwise, pooling, batch norm) count as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from sparsecnn._models import evaluating

from ._inputs import as_inputs, check_model


@dataclass
class LayerCost:
    """Cost of one layer, for the whole example batch and summed over its calls.

    Attributes:
        type: class name.
        weight_shape: (K, C/G, R, S) or (O, I), for sparse layers too.
        output_shape: shape of the last output; empty when the layer never ran.
        calls: how often the layer ran.
        dense_macs: MACs with all weights.
        effective_macs: MACs whose weight is not zero.
        params: weights and biases, zeros included.
        nonzero_params: weights and biases that are not zero.
    """

    type: str
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()
    calls: int = 0
    dense_macs: int = 0
    effective_macs: int = 0
    params: int = 0
    nonzero_params: int = 0

    @property
    def density(self) -> float:
        """Share of the layer's MACs whose weight is not zero; NaN when it never ran."""
        return self.effective_macs / self.dense_macs if self.dense_macs else math.nan


@dataclass
class CostReport:
    """Cost of one forward pass of a model on an example batch.

    Attributes:
        dense_macs: MACs with all weights, matrix products outside layers included.
        effective_macs: the same without the MACs whose weight is zero.
        params: parameters; those of a sparse layer as if it were dense, so that converting a layer
            changes neither count.
        nonzero_params: parameters that are not zero.
        layers: fully qualified name -> cost of each convolution and linear layer.
    """

    dense_macs: int
    effective_macs: int
    params: int
    nonzero_params: int
    layers: dict[str, LayerCost] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, for JSON."""
        return asdict(self)


def count_macs(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> CostReport:
    """Count the MACs of one forward pass in evaluation mode, and the parameters.

    A convolution counts K * C/G * R * S * N * P * Q, padding included, a linear layer O * I per
    row; the effective count replaces the number of weights by the number of nonzero ones, which is
    exact because every weight is used equally often. A layer counts as sparse when it has an
    attribute `nnz` and either `weight_shape` or a `weight` with a `shape`. A layer whose weights
    are not used once per output position, one in the Winograd domain for instance, has a method
    `weight_uses(output_shape)` that says how often each is multiplied; its transforms do not count.

    Args:
        model: the network; its modes, hooks and parameters are left as they were.
        x: input (N, C, H, W), or the tuple of positional inputs. Counts are for all N.

    Raises:
        TypeError: `model` is no module or `x` no tensor or tuple of tensors.

    Cost: one forward pass and one pass over the parameters.
    """
    check_model("count_macs", model)
    inputs = as_inputs("count_macs", x)
    targets = {name: m for name, m in model.named_modules() if _is_layer(m)}
    layers = {name: _static_cost(module) for name, module in targets.items()}
    counter = FlopCounterMode(display=False)
    recorder = _Recorder(counter)
    handles = []
    try:
        for name, module in targets.items():
            handles.append(module.register_forward_pre_hook(recorder.enter, prepend=True))
            # always_call: a forward that raises must not leave the stack of open layers dirty.
            handles.append(
                module.register_forward_hook(recorder.leave(layers[name]), always_call=True)
            )
        with evaluating(model), torch.no_grad(), counter:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    outside = counter.get_total_flops() // 2 - recorder.counted // 2
    params, nonzero = _parameters(model, list(targets.values()))
    return CostReport(
        dense_macs=outside + sum(layer.dense_macs for layer in layers.values()),
        effective_macs=outside + sum(layer.effective_macs for layer in layers.values()),
        params=params,
        nonzero_params=nonzero,
        layers=layers,
    )


class _Recorder:
    """Charges the FLOPs counted between the start and the end of a layer to that layer.

    The counter's own table is keyed by class and attribute names, which a shared or wrapped module
    makes ambiguous; hooks on the modules themselves are not.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.counted = 0
        self.open: list[tuple[int, int]] = []  # (total at the start, total charged at the start)

    def enter(self, module: nn.Module, args: object) -> None:
        self.open.append((self.counter.get_total_flops(), self.counted))

    def leave(self, layer: LayerCost) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            flops_at_start, counted_at_start = self.open.pop()
            # What layers inside this one were charged is not charged again.
            flops = self.counter.get_total_flops() - flops_at_start
            own = flops - (self.counted - counted_at_start)
            self.counted += own
            if not isinstance(output, Tensor):
                return
            layer.calls += 1
            layer.output_shape = tuple(output.shape)
            weights, nonzero = math.prod(layer.weight_shape), _nonzero_weights(module)
            uses = getattr(module, "weight_uses", None)
            if callable(uses) or _is_sparse(module):
                # The operator did the effective work only; K rows of weights serve each position.
                positions = output.numel() // max(layer.weight_shape[0], 1)
                times = uses(layer.output_shape) if callable(uses) else positions
                # A packed weight's dense form is that of the convolution it replaced.
                layer.dense_macs += weights * (positions if _is_sparse(module) else times)
                layer.effective_macs += nonzero * times
            else:
                layer.dense_macs += own // 2
                layer.effective_macs += own // 2 * nonzero // weights if weights else 0

        return hook


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(getattr(module, "nnz", None), int) and bool(_weight_shape(module))


def _is_layer(module: nn.Module) -> bool:
    announced = callable(getattr(module, "weight_uses", None))
    return isinstance(module, (_ConvNd, nn.Linear)) or announced or _is_sparse(module)


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    shape = getattr(module, "weight_shape", None)
    if shape is None:
        shape = getattr(getattr(module, "weight", None), "shape", None)
    return () if shape is None else tuple(int(size) for size in shape)


def _nonzero_weights(module: nn.Module) -> int:
    if _is_sparse(module):
        return int(module.nnz)  # type: ignore[arg-type]
    weight = module.weight  # the masked or parametrized one where there is a mask
    return int(torch.count_nonzero(weight)) if isinstance(weight, Tensor) else 0


def _static_cost(module: nn.Module) -> LayerCost:
    shape = _weight_shape(module)
    bias = getattr(module, "bias", None)
    biases, nonzero_biases = 0, 0
    if isinstance(bias, Tensor):
        biases, nonzero_biases = bias.numel(), int(torch.count_nonzero(bias))
    return LayerCost(
        type=type(module).__name__,
        weight_shape=shape,
        params=math.prod(shape) + biases,
        nonzero_params=_nonzero_weights(module) + nonzero_biases,
    )


def _parameters(model: nn.Module, targets: list[nn.Module]) -> tuple[int, int]:
    params = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(torch.count_nonzero(p)) for p in model.parameters())
    for module in targets:
        if _is_sparse(module):
            params += math.prod(_weight_shape(module)) - int(module.nnz)  # type: ignore[arg-type]
            continue
        weight = module.weight
        own = dict(module.named_parameters(recurse=False))
        if isinstance(weight, Tensor) and "weight_orig" in own:
            # torch.nn.utils.prune keeps the unmasked values as the parameter: the zeros are in
            # the masked weight, which is what the layer computes with.
            nonzero += int(torch.count_nonzero(weight)) - int(
                torch.count_nonzero(own["weight_orig"])
            )
    return params, nonzero
