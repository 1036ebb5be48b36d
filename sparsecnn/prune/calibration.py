"""Calibration: one pass over data that collects what the parts of a pruning run need.

A need is a text, the name of a collector and its options: "grad", "hessian:hutchinson:64". A
collector is a function registered with `register_collector`; it gets a `Session` (the model in
evaluation mode, the batches, the loss) and the targets, and returns one tensor per target.

Batch norm runs in evaluation mode, so that samples do not depend on each other and the running
statistics stay as they are. Under torch.distributed every rank passes its own share of the data,
and the results are made equal on all ranks: the same statistics give the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from sparsecnn._models import evaluating, progress_bar

from .targets import Target

Batch = tuple[Any, Any]
LossFn = Callable[[Any, Any], Tensor]
Collector = Callable[..., dict[Target, Tensor]]
AcrossRanks = Literal["mean", "first"]
_COLLECTORS: dict[str, tuple[Collector, AcrossRanks]] = {}


@dataclass
class Session:
    """What a collector works with.

    Attributes:
        model: the network, in evaluation mode; parameters as they are now.
        batches: (inputs, labels) pairs on the model's device; iterate with `each`.
        loss_fn: `loss_fn(outputs, labels)`, the mean over the batch.
        reference: the network before pruning, in evaluation mode; None if there is none.
        generator: randomness of collectors, on the CPU.
        samples: number of samples in all batches.
    """

    model: nn.Module
    batches: Sequence[Batch]
    loss_fn: LossFn
    reference: nn.Module | None
    generator: torch.Generator
    samples: int = field(init=False)
    _tick: Callable[[], None] = field(default=lambda: None)

    def __post_init__(self) -> None:
        self.samples = sum(batch_size(inputs) for inputs, _ in self.batches)

    def each(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """(positional arguments of the model, labels) of every batch; advances the progress."""
        for inputs, labels in self.batches:
            yield (inputs if isinstance(inputs, tuple) else (inputs,)), labels
            self._tick()


@dataclass(frozen=True)
class Collected:
    """The result of a calibration, see `Stats`."""

    tensors: dict[tuple[str, Target], Tensor]

    def get(self, need: str, t: Target) -> Tensor:
        """The tensor collected for `need` at `t`.

        Raises:
            KeyError: it was not collected.
        """
        if (need, t) not in self.tensors:
            known = sorted({name for name, _ in self.tensors})
            raise KeyError(
                f"Stats: expected {need!r} among the needs of a part for {t.name!r}, got {known}"
            )
        return self.tensors[need, t]


def register_collector(
    name: str, *, across_ranks: AcrossRanks = "mean"
) -> Callable[[Collector], Collector]:
    """Make `function(session, targets, *options)` answer the need `name[:option[:option...]]`.

    Args:
        name: without a colon.
        across_ranks: "mean" for means over samples, weighted by every rank's number of samples;
            "first" for anything else: all ranks get what the first one collected.

    Raises:
        ValueError: the name is taken by another function.
    """

    def add(function: Collector) -> Collector:
        taken = _COLLECTORS.get(name)
        if taken is not None and taken[0].__qualname__ != function.__qualname__:
            raise ValueError(f"register_collector: expected a new name, got {name!r}")
        _COLLECTORS[name] = function, across_ranks
        return function

    return add


class Batches:
    """Calibration data: the batches that collectors run over.

    Args:
        data: an iterable of (inputs, labels); inputs are a tensor or the tuple of the model's
            positional arguments, the first dimension counts samples. A `DataLoader` fits; it is
            read once, here, so that every prune event sees the same samples.
        loss_fn: mean loss of a batch; default cross entropy.
        reference: the network before pruning, for methods that rebuild its outputs.
        generator: of collectors that sample. None is seed 0.
        progress: show a bar on a terminal.

    Raises:
        TypeError: `data` does not yield pairs.
        ValueError: no batch, or an empty one.
    """

    def __init__(
        self,
        data: Iterable[Batch],
        loss_fn: LossFn = functional.cross_entropy,
        *,
        reference: nn.Module | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> None:
        self.batches = [_checked(batch) for batch in data]
        if not self.batches:
            raise ValueError("Batches: expected data with at least one batch, got none")
        if not callable(loss_fn):
            raise TypeError(f"Batches: expected loss_fn(outputs, labels), got {loss_fn!r:.80}")
        self.loss_fn = loss_fn
        self.reference = reference
        self.generator = generator
        self.progress = progress

    def collect(
        self, model: nn.Module, targets: Sequence[Target], needs: frozenset[str]
    ) -> Collected:
        """Run every needed collector; the model, its modes and its gradients stay as they are.

        Raises:
            ValueError: nobody collects one of the needs.
        """
        for need in needs:
            if need.split(":")[0] not in _COLLECTORS:
                raise ValueError(
                    f"Batches: expected needs among {', '.join(sorted(_COLLECTORS))}, got {need!r}"
                )
        first = next(model.parameters())
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        batches = [(_moved(x, first.device), _moved(y, first.device)) for x, y in self.batches]
        tensors: dict[tuple[str, Target], Tensor] = {}
        gradients = [(p, p.grad) for p in model.parameters()]
        modules = [model] if self.reference is None else [model, self.reference]
        try:
            with progress_bar(self.progress, "calibration", len(batches)) as tick:
                session = Session(
                    model, batches, self.loss_fn, self.reference, generator, _tick=tick
                )
                for need in sorted(needs):  # the order must not depend on hashes: generators
                    name, *options = need.split(":")
                    collector, across_ranks = _COLLECTORS[name]
                    with _all_evaluating(modules):
                        found = collector(session, targets, *options)
                    for t in targets:
                        tensors[need, t] = _agreed(
                            found[t].detach(), across_ranks, session.samples, first.device
                        )
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return Collected(tensors)


@register_collector("grad")
def _mean_gradient(session: Session, targets: Sequence[Target]) -> dict[Target, Tensor]:
    """dL/dW of the mean loss over all samples, shape of W."""
    total = {t: torch.zeros_like(t.dense, dtype=torch.float64) for t in targets}
    for inputs, labels in session.each():
        loss = session.loss_fn(session.model(*inputs), labels)
        # A layer that this input does not reach has a gradient of 0.
        gradients = torch.autograd.grad(loss, [t.dense for t in targets], allow_unused=True)
        share = batch_size(inputs) / session.samples
        for t, gradient in zip(targets, gradients, strict=True):
            if gradient is not None:
                total[t] += gradient.double() * share
    return total


def batch_size(inputs: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor."""
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)


@contextmanager
def observed(
    modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Call `hook(module, inputs, output)` after every forward call of the modules inside."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _all_evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(evaluating(module))
        yield


def _agreed(
    value: Tensor, across_ranks: AcrossRanks, samples: int, device: torch.device
) -> Tensor:
    """The same tensor on every rank; as it is without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    home = value.device
    value = value.to(device)
    if across_ranks == "first":
        # The sizes of samples may differ from rank to rank: the first one's count.
        size = torch.tensor([*value.shape], device=device)
        torch.distributed.broadcast(size, 0)
        wanted = tuple(int(n) for n in size)
        value = value.contiguous() if tuple(value.shape) == wanted else value.new_empty(wanted)
        torch.distributed.broadcast(value, 0)
    else:
        weight = torch.tensor(float(samples), device=device, dtype=torch.float64)
        value = value * weight.to(value.dtype)
        torch.distributed.all_reduce(value)
        torch.distributed.all_reduce(weight)
        value = value / weight.to(value.dtype)
    return value.to(home)


def _checked(batch: object) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"Batches: expected data to yield (inputs, labels), got {batch!r:.80}")
    inputs, labels = batch
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    if not isinstance(first, Tensor):
        raise TypeError(f"Batches: expected inputs to be tensors, got {inputs!r:.80}")
    if first.dim() == 0 or len(first) == 0:
        raise ValueError(f"Batches: expected at least one sample, got {tuple(first.shape)}")
    return inputs, labels


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(entry, device) for entry in value)
    return value.to(device) if isinstance(value, Tensor) else value
