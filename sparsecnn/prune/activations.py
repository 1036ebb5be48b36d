"""Collectors that watch the layers of the running network: map gradients, zeros, input norms.

What follows a layer is not written in a module tree; it is found while the network runs, by the
identity of tensors: `Following` sees every torch function, called by a module or directly, and
follows a layer's output through what leaves its maps in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .calibration import Session, batch_size, observed, register_collector
from .targets import Target

# Functions that keep every map a map: identities in evaluation mode and copies.
_PASSING = frozenset(
    {"dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_alpha_dropout"}
    | {"clone", "contiguous", "to", "float", "half", "bfloat16"}
)
Found = Callable[[Target, Tensor, Mapping[str, Any]], str]


def per_map(x: Tensor, t: Target) -> Tensor:
    """Output of the layer of `t` -> (N, K, positions).

    (N, K, P, Q) of a convolution, (N, ..., K) of a linear layer.
    """
    if isinstance(t.module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)
    return x.reshape(len(x), x.shape[1], -1)


class Following(TorchFunctionMode):
    """Watch what the outputs of layers go into.

    Args:
        targets: the layers.
        wanted: names of the torch functions looked for.
        through: names of those the search may pass.
        found: called with (target, output, keyword arguments) of every wanted call; returns why
            that call does not do, "" if it does.

    Attributes:
        stopped: what was met instead, by layer; also if only one of its calls met it.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        wanted: Collection[str],
        through: Collection[str],
        found: Found,
    ) -> None:
        super().__init__()
        self.targets, self.wanted, self.through, self.found = targets, wanted, through, found
        self.stopped: dict[Target, str] = {}
        # The tensor is kept with its id: a freed one would pass its id on to a stranger.
        self._outputs: dict[int, tuple[Tensor, Target]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`; look at its name if it reads an output that is being followed."""
        kwargs = kwargs or {}
        sources = [x for x in tensors_in((args, kwargs)) if id(x) in self._outputs]
        result = func(*args, **kwargs)
        if not sources or not any(True for _ in tensors_in(result)):
            return result  # sizes and the like do not use up an output
        name = getattr(func, "__name__", str(func))
        for source in sources:
            # An output can be listed twice in one call: x + x.
            _, t = self._outputs.pop(id(source), (source, None))
            if t is None:
                continue
            reason = name
            if len(sources) == 1 and isinstance(result, Tensor):
                if name in self.through:
                    self._outputs[id(result)] = result, t
                    continue
                if name in self.wanted:
                    reason = self.found(t, result, kwargs)
            if reason:
                self.stopped[t] = reason
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow every forward pass inside."""
        owners = {owner: t for t in self.targets for owner in t.owners}

        def called(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            self._outputs[id(output)] = output, owners[module]

        with observed(owners, called), self:
            yield
        for _, t in self._outputs.values():
            self.stopped.setdefault(t, "the output of the network")
        self._outputs.clear()

    def refuse(self, t: Target, what: str, expected: str) -> ValueError:
        """The error for a layer without a wanted function."""
        got = self.stopped.get(t, "a layer that these inputs do not reach")
        return ValueError(
            f"{what}: expected {expected} after layer {t.name!r}, got {got}; give this layer "
            "another importance or leave it out"
        )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


@register_collector("apoz")
@torch.no_grad()
def _zeros_after_relu(session: Session, targets: Sequence[Target]) -> dict[Target, Tensor]:
    """Share of zeros of every map after its ReLU, (K,); over all samples and positions."""
    zeros: dict[Target, Tensor] = {}
    entries: dict[Target, int] = dict.fromkeys(targets, 0)

    def found(t: Target, output: Tensor, arguments: Mapping[str, Any]) -> str:
        if arguments.get("min_val", 0) != 0:
            return "hardtanh"  # nn.ReLU6 calls it as well, with a minimum of 0
        maps = per_map(output, t)
        # Counts, not shares: the mean of the means of uneven batches is another number.
        count = (maps == 0).sum((0, 2)).to("cpu", torch.float64)
        zeros[t] = zeros[t] + count if t in zeros else count
        entries[t] += maps.shape[0] * maps.shape[2]
        return ""

    relus = {"relu", "relu_", "relu6", "hardtanh"}
    following = Following(targets, relus, _PASSING | {"batch_norm"}, found)
    with following.watching():
        for inputs, _ in session.each():
            session.model(*inputs)
    for t in targets:
        if t in following.stopped or t not in zeros:
            raise following.refuse(t, "APoZ", "a ReLU (batch norm and dropout may lie between)")
    return {t: zeros[t] / entries[t] for t in targets}


@register_collector("bn_scale", across_ranks="first")
@torch.no_grad()
def _scale_of_batch_norm(session: Session, targets: Sequence[Target]) -> dict[Target, Tensor]:
    """|gamma| of the batch norm that reads the layer's output, (K,)."""
    scales: dict[Target, Tensor] = {}

    def found(t: Target, _output: Tensor, arguments: Mapping[str, Any]) -> str:
        weight = arguments.get("weight")
        if not isinstance(weight, Tensor):
            return "a batch norm without a scale (affine=False)"
        scales[t] = weight.detach().abs().to("cpu", torch.float64)
        return ""

    following = Following(targets, {"batch_norm"}, _PASSING, found)
    with following.watching():
        inputs, _ = next(session.each())
        session.model(*inputs)
    for t in targets:
        if t in following.stopped or t not in scales:
            raise following.refuse(t, "BNScale", "a batch norm with a scale")
    return scales


@register_collector("input_square")
@torch.no_grad()
def _input_squares(session: Session, targets: Sequence[Target]) -> dict[Target, Tensor]:
    """Sum over positions of the squared input of every weight, mean over samples; shape of W.

    The entry of W[k, c, r, s] is that of row (c, r, s) of the im2col matrix, padding included as
    zeros; all filters of a conv group read the same rows.
    """
    owners = {owner: t for t in targets for owner in t.owners}
    total = {t: torch.zeros(t.shape, dtype=torch.float64) for t in targets}

    def called(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        t = owners[module]
        with torch.enable_grad():
            probe = torch.zeros_like(t.dense, requires_grad=True)
            squares = apply_layer(module, inputs[0].detach().square(), probe)
            # d(sum of outputs)/dW: each weight's inputs, summed over samples and positions.
            (sums,) = torch.autograd.grad(squares.sum(), probe)
        total[t] += sums.to("cpu", torch.float64)

    with observed(owners, called):
        for inputs, _ in session.each():
            session.model(*inputs)
    return {t: value / session.samples for t, value in total.items()}


def apply_layer(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's linear map of `x` with another weight and without bias."""
    if isinstance(module, nn.Conv2d):
        out: Tensor = module._conv_forward(x, weight, None)
        return out
    return nn.functional.linear(x, weight)


@register_collector("positions")
@torch.no_grad()
def _positions(session: Session, targets: Sequence[Target]) -> dict[Target, Tensor]:
    """Output positions per sample and map, scalar: the MACs of one weight."""
    owners = {owner: t for t in targets for owner in t.owners}
    total = dict.fromkeys(targets, 0.0)

    def called(module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        t = owners[module]
        total[t] += output.numel() / t.shape[0]

    with observed(owners, called):
        for inputs, _ in session.each():
            session.model(*inputs)
    return {
        t: torch.tensor(value / session.samples, dtype=torch.float64) for t, value in total.items()
    }


@register_collector("map_gradient")
def _map_gradients(
    session: Session, targets: Sequence[Target], form: str = "square"
) -> dict[Target, Tensor]:
    """(K,) from d_nk = sum over positions of a * dL_n/da, a the layer's output.

    "square": mean over samples of d^2. "abs": mean of |d| / positions. One backward pass per
    batch: the gradient of the summed loss with respect to a_n is that of sample n's loss.
    """
    refuse_coupled_samples(session.model)
    owners = {owner: t for t in targets for owner in t.owners}
    total = {t: torch.zeros(t.shape[0], dtype=torch.float64) for t in targets}
    outputs: list[tuple[Target, Tensor]] = []

    def called(module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_()  # a frozen network
        outputs.append((owners[module], output))
        return output.clone()  # an activation in place must not overwrite what is kept here

    handles = [owner.register_forward_hook(called) for owner in owners]
    try:
        for inputs, labels in session.each():
            outputs.clear()
            samples = batch_size(inputs)
            loss = session.loss_fn(session.model(*inputs), labels) * samples
            gradients = torch.autograd.grad(loss, [a for _, a in outputs], allow_unused=True)
            # A layer that runs several times loses its map in all of them: sum before squaring.
            change: dict[Target, Tensor] = {}
            positions: dict[Target, int] = {}
            for (t, a), gradient in zip(outputs, gradients, strict=True):
                if len(a) != samples:
                    raise ValueError(
                        f"map_gradient: expected the first dimension of the output of layer "
                        f"{t.name!r} to count the {samples} samples, got {tuple(a.shape)}"
                    )
                if gradient is not None:
                    product = per_map(a.detach().double() * gradient.double(), t)
                    change[t] = change.get(t, torch.zeros(())) + product.sum(2).cpu()
                    positions[t] = positions.get(t, 0) + product.shape[2]
            for t, d in change.items():
                value = d.square() if form == "square" else d.abs() / positions[t]
                total[t] += value.sum(0)
    finally:
        for handle in handles:
            handle.remove()
    return {t: value / session.samples for t, value in total.items()}


def refuse_coupled_samples(model: nn.Module) -> None:
    """Refuse batch norms that use the statistics of the batch even in evaluation mode.

    Raises:
        ValueError: there is one; the gradient of one sample's loss is not defined then.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"calibration: expected batch norms with running statistics, got {name!r} with "
                "track_running_stats=False, which couples the samples of a batch"
            )
