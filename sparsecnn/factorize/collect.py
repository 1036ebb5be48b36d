"""One pass over calibration data: moments of layers, or the inputs that a layer sees.

With a `reference`, the untouched network, both networks run on the same batches: responses are
its, inputs are those of the network as it is now. Layers are then fitted from shallow to deep, each
on inputs that already carry the errors of the compressed layers before it, so that it corrects
them (the asymmetric reconstruction of Zhang, Zou, He, Sun, TPAMI 2016).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn._models import evaluating

from .moments import LIMIT, POSITIONS, Moments, patches_at, positions_of, responses_at

Batch = Tensor | tuple[Any, ...]
Hook = Callable[[Tensor, Tensor], None]


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    positions: int = POSITIONS,
    limit: int = LIMIT,
    patches: bool = True,
    reference: nn.Module | None = None,
) -> dict[str, Moments]:
    """The moments of some layers over calibration data, in one pass.

    Runs in evaluation mode; modes, gradients and hooks of the networks stay as they are. The
    positions depend on the seed and the layer's name, not on the other layers. A layer that runs
    several times per pass gives all its calls.

    Args:
        model: the network as it is now. Batch norm behind a layer has to be folded into it before:
            responses are what the activation sees.
        names: layers, `nn.Conv2d` or `nn.Linear`.
        batches: inputs: a tensor, or the tuple of the model's positional arguments.
        seed: of the positions and the samples kept.
        positions: drawn per image, all if there are fewer.
        limit: samples kept per layer.
        patches: with the inputs' second moments and samples, D^2 numbers per layer and group;
            `Zhang` works without.
        reference: the untouched network; its layers of these names give Y, the model's Y_hat.

    Returns:
        Name to `Moments`.

    Raises:
        TypeError: batches of another kind, or a layer that is none.
        ValueError: positions below 1, an unknown name, no batches, or a layer that does not run, or
            not as often as in the reference.

    Cost: a forward pass per network and, per position, O(G (D^2 + T^2)).
    """
    what = "collect_moments"
    if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
        raise ValueError(f"{what}: expected positions an integer >= 1, got {positions!r}")
    layers = {name: layer_of(model, name, what, "model") for name in names}
    twins: dict[str, nn.Conv2d | nn.Linear] = {}
    if reference is not None:
        twins = {name: layer_of(reference, name, what, "reference") for name in names}
    for name, twin in twins.items():
        wanted, got = tuple(layers[name].weight.shape), tuple(twin.weight.shape)
        if wanted != got:
            raise ValueError(
                f"{what}: expected a reference with a weight {wanted} at {name!r}, got {got}"
            )
    recorders = {
        name: _Recorder(layer, name, seed, positions, limit, patches)
        for name, layer in layers.items()
    }
    for inputs in _checked(batches, what):
        with observed([(layers[n], r.current) for n, r in recorders.items()]):
            _run(model, inputs)
        if reference is not None:
            with observed([(twins[n], r.original) for n, r in recorders.items()]):
                _run(reference, inputs)
        for recorder in recorders.values():
            recorder.end(reference is not None)
    for name, recorder in recorders.items():
        if not recorder.moments.count:
            raise ValueError(f"{what}: expected layer {name!r} to run, got no call on any batch")
    return {name: recorder.moments for name, recorder in recorders.items()}


@torch.no_grad()
def layer_inputs(
    model: nn.Module,
    name: str,
    batches: Iterable[Batch],
    *,
    reference: nn.Module | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What a module gets in the network as it is now and in the reference, per call.

    Args:
        model: the network as it is now.
        name: of the module, of any kind.
        batches: see `collect_moments`.
        reference: the untouched network; the model itself if there is none.

    Returns:
        Pairs (input now, input in the reference), copies: the batches of `reconstruct_`.

    Raises:
        TypeError: batches of another kind.
        ValueError: an unknown name, no batches, a module that does not run, or not as often as in
            the reference.
    """
    what = "layer_inputs"
    module = _module(model, name, what, "model")
    twin = module if reference is None else _module(reference, name, what, "reference")
    pairs: list[tuple[Tensor, Tensor]] = []
    for inputs in _checked(batches, what):
        found: list[list[Tensor]] = []
        for network, watched in ((model, module), (reference, twin)):
            if network is None:
                found.append(found[0])
                continue
            seen: list[Tensor] = []
            found.append(seen)

            # In front of the call, and a copy: the module or a later one may work in place.
            def keep(
                module: nn.Module, args: tuple[Any, ...], kwargs: Any, seen: list[Tensor] = seen
            ) -> None:
                seen.append((args[0] if args else kwargs["input"]).detach().clone())

            handle = watched.register_forward_pre_hook(keep, with_kwargs=True)
            try:
                _run(network, inputs)
            finally:
                handle.remove()
        _same_calls(name, what, len(found[0]), len(found[1]))
        pairs += zip(*found, strict=True)
    if not pairs:
        raise ValueError(f"{what}: expected module {name!r} to run, got no call on any batch")
    return pairs


class _Recorder:
    """Reads one layer in both networks, at the same positions.

    Rows are copied inside the hooks: a later in-place ReLU would change the responses.
    """

    def __init__(
        self, layer: nn.Module, name: str, seed: int, positions: int, limit: int, patches: bool
    ) -> None:
        own = (seed ^ zlib.crc32(name.encode())) % 2**63
        self.moments = Moments(limit=limit, seed=own)
        self._layer = layer
        self._name = name
        self._positions = positions
        self._patches = patches
        self._generator = torch.Generator().manual_seed(own)
        self._now: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._then: list[Tensor] = []

    def current(self, x: Tensor, output: Tensor) -> None:
        """A call in the network as it is now."""
        x, output = _batched(self._layer, x, output)
        at = positions_of(self._layer, output, self._positions, self._generator)
        z = patches_at(self._layer, x, output, at).cpu() if self._patches else None
        self._now.append((at, z, responses_at(self._layer, output, at).cpu()))

    def original(self, x: Tensor, output: Tensor) -> None:
        """The same call in the reference."""
        _, output = _batched(self._layer, x, output)
        if len(self._then) < len(self._now):
            at = self._now[len(self._then)][0]
            self._then.append(responses_at(self._layer, output, at).cpu())
        else:
            _same_calls(self._name, "collect_moments", len(self._now), len(self._now) + 1)

    def end(self, asymmetric: bool) -> None:
        """The batch is over."""
        if asymmetric:
            _same_calls(self._name, "collect_moments", len(self._now), len(self._then))
        for i, (_, z, y) in enumerate(self._now):
            if asymmetric:
                self.moments.update(z, self._then[i], y)
            else:
                self.moments.update(z, y)
        self._now, self._then = [], []


def _same_calls(name: str, what: str, now: int, then: int) -> None:
    if now != then:
        raise ValueError(
            f"{what}: expected layer {name!r} to run as often in model and reference, got {now} "
            f"and {then} calls on a batch"
        )


def _batched(layer: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution also takes one image without a batch dimension."""
    if isinstance(layer, nn.Conv2d) and x.dim() == 3:
        return x[None], output[None]
    return x, output


def _module(model: nn.Module, name: str, what: str, argument: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{what}: expected {argument} with a module {name!r}, got none") from None


def layer_of(model: nn.Module, name: str, what: str, argument: str) -> nn.Conv2d | nn.Linear:
    """The layer of a name, or an error that begins with `what`.

    Raises:
        TypeError: a module of another kind.
        ValueError: an unknown name.
    """
    module = _module(model, name, what, argument)
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        raise TypeError(
            f"{what}: expected nn.Conv2d or nn.Linear at {name!r} of {argument}, got "
            f"{type(module).__name__}"
        )
    return module


def _checked(batches: Iterable[Batch], what: str) -> Iterator[tuple[Any, ...]]:
    """The positional arguments of every batch."""
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise TypeError(
                f"{what}: expected batches of inputs, a tensor or a tuple of arguments, got "
                f"{type(batch).__name__}; leave labels out"
            )
        yield inputs
    if not count:
        raise ValueError(f"{what}: expected at least one batch, got none")


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    with evaluating(model):
        model(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))


@contextmanager
def observed(hooks: Sequence[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Call ``hook(input, output)`` after every forward call of the modules inside."""

    def of(hook: Hook) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            hook(args[0] if args else kwargs["input"], output)

        return call

    with ExitStack() as stack:
        for module, hook in hooks:
            handle = module.register_forward_hook(of(hook), with_kwargs=True)
            stack.callback(handle.remove)
        yield
