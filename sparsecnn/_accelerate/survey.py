"""The layers of a model as found by one recorded forward pass, and a measured choice for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..measure import LatencyStats
from ..nn import FusedConv2d
from .choice import Choice, Settings, Winner, choose, time_layers
from .copy import MEMORY_FORMATS
from .fold import Folded, all_finite, fold
from .kernels import Layer
from .precision import may_use_tf32
from .record import Call, Recording, record

FilterFn = Callable[[nn.Module, str], bool]
AS_IS_BUDGET_S = 0.5


@dataclass(eq=False)
class Site:
    """One convolution or linear layer of the model.

    Attributes:
        name: fully qualified name, "" for the model itself.
        module: the layer as recorded.
        left_alone: why it is not touched; empty for a layer that may be swapped.
        calls: of the recorded forward pass.
        folded: what was folded into it; None for a layer left alone and for linear layers.
        layer: what the candidates replace; None for a layer left alone.
        choice: the measurement; None for a layer left alone.
        built: kernel -> layer, for those that won; variants of the model share their tensors.
        as_is: time per forward pass of a layer left alone, where it could be measured.
        undone: why a won swap was taken back; empty while it stands.
    """

    name: str
    module: nn.Module
    left_alone: str = ""
    calls: list[Call] = field(default_factory=list)
    folded: Folded | None = None
    layer: Layer | None = None
    choice: Choice | None = None
    built: dict[str, Winner] = field(default_factory=dict)
    as_is: LatencyStats | None = None
    undone: str = ""

    def wins_in(self, layout: str) -> bool:
        """Whether a sparse kernel won the measurement in a model of that layout."""
        return self.choice is not None and self.choice.kernel_in(layout) != "dense"


def find_sites(model: nn.Module, filter_fn: FilterFn | None) -> list[Site]:
    """Every convolution and linear layer, in registration order, unsuitable ones with a reason."""
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            reason = _unsuitable(module)
            if filter_fn is not None and not filter_fn(module, name):
                reason = "excluded by filter_fn"
            sites.append(Site(name, module, reason))
    return sites


def _unsuitable(module: _ConvNd | nn.Linear) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        own_forward = type(module).forward is not nn.Linear.forward
        parent = "Linear"
    elif isinstance(module, nn.Conv2d):
        own_forward = (
            type(module).forward not in (nn.Conv2d.forward, FusedConv2d.forward)
            or type(module)._conv_forward is not nn.Conv2d._conv_forward
        )
        parent = "Conv2d"
    else:
        return f"{kind}: only Conv2d and Linear have sparse kernels, left as is"
    if own_forward or "forward" in vars(module):
        return f"{kind} is a {parent} with a forward of its own, left as is"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed and not a plain parameter, left as is"
    if type(weight) not in (nn.Parameter, Tensor) or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {weight.layout}, left as is"
    if not weight.is_floating_point():
        return f"its weight has dtype {str(weight.dtype).removeprefix('torch.')}, left as is"
    if not all_finite(weight):
        return "its weight has values that are not finite, left as is"
    return ""


def record_sites(model: nn.Module, example: tuple[Tensor, ...], sites: list[Site]) -> Recording:
    """Record one forward pass and note in `sites` what it says about each layer.

    Where an operator of the model does not run under a dispatch mode, the shapes are still
    recorded and `Recording.dataflow` is False.
    """
    watched = list(model.modules())
    try:
        recording = record(model, example, watched)
    except Exception:
        # The plain forward pass was run before: the failure is that of the dispatch mode.
        recording = record(model, example, watched, dataflow=False)
    for site in sites:
        site.calls = recording.calls.get(site.module, [])
        if site.left_alone:
            continue
        if site.module in recording.foreign:
            site.left_alone = "its weight is read outside of its own forward, left as is"
        elif not site.calls:
            site.left_alone = "not called on the example, left as is"
        else:
            site.left_alone = _unsuitable_calls(site)
    return recording


def _unsuitable_calls(site: Site) -> str:
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    for call in site.calls:
        if call.input_dtype != weight.dtype:
            return (
                f"called with {str(call.input_dtype).removeprefix('torch.')} input and "
                f"{str(weight.dtype).removeprefix('torch.')} weight, left as is"
            )
        if 0 in call.input_shape:
            return f"called with an empty input {call.input_shape}, left as is"
    return ""


def make_layer(site: Site) -> Layer:
    """The dense layer of a site with everything folded into it, ready for the candidates."""
    module = site.module if site.folded is None else site.folded.conv
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    density = int(module.weight.detach().count_nonzero()) / max(module.weight.numel(), 1)
    return Layer(
        module=module,
        activation="none" if site.folded is None else site.folded.activation,
        inputs=dict(Counter(call.input_shape for call in site.calls)),
        density=density,
        allow_tf32=isinstance(module, nn.Conv2d) and may_use_tf32(module.weight),
    )


def fold_sites(sites: list[Site], recording: Recording) -> None:
    """Fold into every convolution what the recording allows."""
    for site in sites:
        if not site.left_alone and isinstance(site.module, nn.Conv2d):
            site.folded = fold(site.module, recording)


def measure_sites(sites: list[Site], settings: Settings, step: Callable[[str], None]) -> None:
    """Choose a kernel for every layer, calling `step` with the name of each when done."""
    cache: dict[object, Choice] = {}
    as_is: dict[object, LatencyStats | None] = {}
    for site in sites:
        if site.left_alone:
            if site.calls:
                key = (type(site.module), site.module.extra_repr(), site.calls[0].input_shape)
                if key not in as_is:
                    as_is[key] = _measure_as_is(site, settings)
                site.as_is = as_is[key]
        else:
            site.layer = make_layer(site)
            site.choice, site.built = choose(site.layer, settings, cache)
        step(site.name)


def _measure_as_is(site: Site, settings: Settings) -> LatencyStats | None:
    """Time the forward of a layer left alone; None where random input does not fit it."""
    weight = next((p for p in site.module.parameters()), None)
    call = site.calls[0]
    if weight is None or call.input_dtype is None or not call.input_dtype.is_floating_point:
        return None
    x = torch.randn(call.input_shape, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, call.input_dtype)
    if call.input_channels_last:
        x = x.contiguous(memory_format=MEMORY_FORMATS["channels_last"])
    forward = site.module.forward  # not the call: hooks of the user stay out of it
    try:
        fns = {"dense": lambda: [forward(x) for _ in site.calls]}
        stats = time_layers(fns, settings, AS_IS_BUDGET_S, weight.device)
    except (RuntimeError, TypeError, ValueError):
        return None
    return stats["dense"]
