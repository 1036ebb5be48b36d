"""Sampled inputs and outputs of layers: what methods that rebuild a layer's output fit to.

The need "io:<samples>" collects for every target, at the same randomly chosen output positions,

    X: (G, N, C/G, R*S)  input patches in the network as it is now (pruned so far),
    Y: (G, N, K/G)       outputs, bias included and before any activation, in the reference,

per conv group, so that Y = X * W + b holds where nothing has been pruned. Fitting the current
inputs to the outputs of the *original* network keeps the errors of pruned layers from adding up
(He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017); the
reference is the `reference` of `Batches`, and the network itself where there is none.

A third part, "io:<samples>:<layer>=<shortcut>[,<layer>=<shortcut>...]", names the layers that end
a residual branch and the module whose output Y1 is added to theirs. Their Y is the original one
plus Y1 - Y1', the error that the shortcut has in the current network.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .calibration import Session, batch_size, observed, register_collector
from .protocols import Stats
from .targets import Target


def io_need(samples: int, shortcuts: Mapping[str, str], what: str) -> str:
    """The need that collects `samples` positions per layer.

    Args:
        samples: output positions per layer over all batches; fewer if there are fewer.
        shortcuts: layer name -> name of the module whose output is added to the layer's.
        what: start of the error message.

    Raises:
        ValueError: samples below 1, or a name that a need cannot hold.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"{what}: expected samples to be an int >= 1, got {samples!r}")
    for name in (*shortcuts, *shortcuts.values()):
        if not isinstance(name, str) or any(sign in name for sign in ":=,"):
            raise ValueError(
                f"{what}: expected shortcuts of module names without ':', '=' and ',', got {name!r}"
            )
    pairs = ",".join(f"{layer}={source}" for layer, source in sorted(shortcuts.items()))
    return f"io:{samples}:{pairs}" if pairs else f"io:{samples}"


def io_of(stats: Stats | None, need: str, t: Target) -> tuple[Tensor, Tensor]:
    """X (G, N, C/G, R*S) and Y (G, N, K/G) of a target, float64 on the CPU."""
    assert stats is not None, "a part with needs is given statistics"
    _, rows, channels, spatial = t.grouped_shape
    x, y = stats.get(need, t).cpu().split([channels * spatial, rows], dim=2)
    return x.unflatten(2, (channels, spatial)), y


@register_collector("io", across_ranks="first")
def _sample_io(
    session: Session, targets: Sequence[Target], samples: str, shortcuts: str = ""
) -> dict[Target, Tensor]:
    """(G, N, C/G*R*S + K/G) per target: X and Y side by side; `io_of` takes them apart.

    Every batch gives its share of the samples, drawn without replacement from all its positions.
    The draw depends on the session's generator and on the layer's name, not on its neighbours.

    Raises:
        ValueError: a layer that runs other than once per forward pass or has no counterpart in
            the reference, or a shortcut of another shape.
    """
    seed = int(torch.randint(2**31, (), generator=session.generator))
    sources = dict(pair.split("=") for pair in shortcuts.split(",") if pair)
    samplers = [_Sampler(session, t, sources.get(t.name), int(samples), seed) for t in targets]
    with torch.no_grad():
        for inputs, _ in session.each():
            for sampler in samplers:
                sampler.begin(batch_size(inputs))
            _run(session.model, inputs, [s.current_hooks() for s in samplers])
            reference = session.model if session.reference is None else session.reference
            _run(reference, inputs, [s.reference_hooks() for s in samplers])
            for sampler in samplers:
                sampler.end()
    return {sampler.t: sampler.result() for sampler in samplers}


Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


def _run(
    model: nn.Module, inputs: tuple[Any, ...], hooks: Sequence[Sequence[tuple[nn.Module, Hook]]]
) -> None:
    with ExitStack() as stack:
        for module, hook in (pair for pairs in hooks for pair in pairs):
            stack.enter_context(observed([module], hook))
        model(*inputs)


class _Sampler:
    """Draws positions of one layer and reads both networks there.

    Everything is copied inside the hooks: a later in-place ReLU would change the tensors.
    """

    def __init__(
        self, session: Session, t: Target, shortcut: str | None, samples: int, seed: int
    ) -> None:
        if len(t.owners) > 1:
            raise ValueError(
                f"io: expected layers that own their weight alone, got {', '.join(t.aliases)}"
            )
        reference = session.model if session.reference is None else session.reference
        self.t = t
        self.samples = samples
        self.of = session.samples
        self.generator = torch.Generator().manual_seed(seed ^ zlib.crc32(t.name.encode()))
        self.twin = _module(reference, t.name, "reference")
        self.shortcut = None if shortcut is None else _module(session.model, shortcut, "model")
        self.shortcut_twin = (
            None if shortcut is None else _module(reference, shortcut, "reference")
        )
        self.seen = 0
        self.found: list[Tensor] = []

    def begin(self, images: int) -> None:
        """A new batch: how many samples it owes."""
        before = self.samples * self.seen // self.of
        self.seen += images
        self.quota = self.samples * self.seen // self.of - before
        self.now: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def current_hooks(self) -> list[tuple[nn.Module, Hook]]:
        """What to watch in the current network; the shortcut may run before the layer."""
        hooks: list[tuple[nn.Module, Hook]] = [(self.t.module, self._draw)]
        if self.shortcut is not None:
            hooks.append((self.shortcut, self._keep("shortcut now")))
        return hooks

    def reference_hooks(self) -> list[tuple[nn.Module, Hook]]:
        """What to watch in the reference."""
        hooks: list[tuple[nn.Module, Hook]] = [(self.twin, self._keep("output"))]
        if self.shortcut_twin is not None:
            hooks.append((self.shortcut_twin, self._keep("shortcut")))
        return hooks

    def _draw(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.now:
            raise ValueError(
                f"io: expected layer {self.t.name!r} to run once per forward pass, got a second "
                "call"
            )
        total = output.numel() // self.t.shape[0]
        chosen = torch.randperm(total, generator=self.generator)[: self.quota].sort().values
        positions = chosen.to(output.device)
        self.now = {"positions": positions, "x": _patches(self.t, inputs[0], output, positions)}

    def _keep(self, name: str) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # The last call counts: a ReLU module may serve a block several times.
            self.outputs[name] = output.detach().clone()

        return hook

    def end(self) -> None:
        """Put the batch's samples together."""
        missing = {"x", "output"} - {*self.now, *self.outputs}
        if missing:
            raise ValueError(
                f"io: expected layer {self.t.name!r} to run in each forward pass, got none; "
                "leave it out of the targets"
            )
        values = {name: _rows(self.t, output) for name, output in self.outputs.items()}
        lengths = {name: value.shape for name, value in values.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"io: expected outputs of one shape at layer {self.t.name!r} and its shortcut, got "
                + ", ".join(f"{k} {tuple(self.outputs[k].shape)}" for k in sorted(self.outputs))
            )
        at = {name: value[self.now["positions"]].double() for name, value in values.items()}
        y = at["output"]
        if self.shortcut is not None:
            y = y + at["shortcut"] - at["shortcut now"]
        groups, rows, channels, spatial = self.t.grouped_shape
        x = self.now["x"].double().reshape(-1, groups, channels * spatial)
        self.found.append(torch.cat([x, y.reshape(-1, groups, rows)], dim=2).cpu())

    def result(self) -> Tensor:
        """(G, N, C/G*R*S + K/G)."""
        return torch.cat(self.found).movedim(1, 0).contiguous()


def _module(model: nn.Module, name: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"io: expected {what} with a module {name!r}, got none") from None


def _rows(t: Target, output: Tensor) -> Tensor:
    """(positions, K): the channels of a map are its second dimension, of a vector its last."""
    if isinstance(t.module, nn.Conv2d):
        return output.movedim(1, -1).flatten(0, -2)
    return output.reshape(-1, output.shape[-1])


def _patches(t: Target, x: Tensor, output: Tensor, positions: Tensor) -> Tensor:
    """(N, C, R*S) of a convolution, (N, I) of a linear layer: what the outputs there depend on.

    Gathered from the padded input: an im2col of all positions would hold R*S times the input.
    """
    module = t.module
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])[positions]
    if x.dim() != 4:
        raise ValueError(
            f"io: expected inputs (N, C, H, W) at layer {t.name!r}, got {tuple(x.shape)}"
        )
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    height, width = output.shape[2:]
    image = positions // (height * width)
    corner = (positions // width % height, positions % width)
    lines = []
    for axis in range(2):
        steps = torch.arange(module.kernel_size[axis], device=x.device) * module.dilation[axis]
        lines.append(corner[axis][:, None] * module.stride[axis] + steps)
    found = padded[image[:, None, None], :, lines[0][:, :, None], lines[1][:, None, :]]
    return found.permute(0, 3, 1, 2).flatten(2)
