"""The layer types a file may ask for, their constructor arguments, and building them.

A file names types and arguments only. Nothing outside this list is ever constructed, and nothing is
allocated while constructing: layers are built on the meta device and get their tensors afterwards.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnn.formats.csr import CSRWeight
from sparsecnn.formats.pattern import PatternWeight
from sparsecnn.formats.winograd import WinogradWeight
from sparsecnn.nn import (
    SPARSE_LAYERS,
    ChainConv2d,
    DepthwiseConv2d,
    FactorizedConv2d,
    FactorizedLinear,
    FusedConv2d,
    PatternConv2d,
    PermuteChannels,
    PointwiseConv2d,
    ResidualBlock,
    WinogradConv2d,
)
from sparsecnn.nn._common import check_activation
from sparsecnn.nn._packed import PackedLayer
from sparsecnn.nn.chain import ChainStageWeights
from sparsecnn.nn.circulant import CirculantLinear, CirculantPointwise
from sparsecnn.nn.factorized import is_permutation
from sparsecnn.nn.microbatch import has_own_forward

CONTAINERS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Sequential, nn.ModuleList, nn.ModuleDict, ChainConv2d, ResidualBlock, FactorizedConv2d,
        FactorizedLinear,
    )
}  # fmt: skip
# Arguments of containers; the modules inside are records of their own.
_CONTAINER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "ChainConv2d": ("residual",),
    "FactorizedConv2d": ("method", "ranks", "groups"),
    "FactorizedLinear": ("method", "ranks"),
}
FACTORIZED = {"FactorizedConv2d", "FactorizedLinear"}
_TORCH_LAYERS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.AlphaDropout, nn.AvgPool1d, nn.AvgPool2d,
    nn.AvgPool3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.CELU, nn.ChannelShuffle,
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d, nn.ELU, nn.Flatten, nn.GELU, nn.GroupNorm, nn.Hardsigmoid,
    nn.Hardswish, nn.Hardtanh, nn.Identity, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.LayerNorm, nn.LeakyReLU, nn.Linear, nn.LocalResponseNorm, nn.LogSigmoid,
    nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Mish, nn.PReLU, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ReLU, nn.ReLU6, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax,
    nn.Softplus, nn.Tanh, nn.Unflatten, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d,
)  # fmt: skip
PACKED_LAYERS: dict[str, type[nn.Module]] = {
    **SPARSE_LAYERS,
    "PatternConv2d": PatternConv2d,
    "WinogradConv2d": WinogradConv2d,
}
"""Layers whose weight is a format of its own, stored as one packed tensor."""
PackedWeight = CSRWeight | PatternWeight | WinogradWeight
_FORM_OF: dict[str, tuple[type, str]] = {
    "CSRConv2d": (CSRWeight, "a packed CSR weight"),
    "CSRLinear": (CSRWeight, "a packed CSR weight"),
    "PatternConv2d": (PatternWeight, "a packed weight in a pattern"),
    "WinogradConv2d": (WinogradWeight, "a packed weight in the Winograd domain"),
}
LAYERS: dict[str, type[nn.Module]] = {
    **{cls.__name__: cls for cls in _TORCH_LAYERS},
    "FusedConv2d": FusedConv2d,
    "ChainStageWeights": ChainStageWeights,
    "DepthwiseConv2d": DepthwiseConv2d,
    "PointwiseConv2d": PointwiseConv2d,
    "PermuteChannels": PermuteChannels,
    "CirculantLinear": CirculantLinear,
    "CirculantPointwise": CirculantPointwise,
    **PACKED_LAYERS,
}
ALLOWED: dict[str, type[nn.Module]] = {**CONTAINERS, **LAYERS}
_NAMES = {cls: name for name, cls in ALLOWED.items()}
# The dense layer each packed layer is built from.
_DENSE_OF: dict[str, type[nn.Module]] = {
    "CSRConv2d": nn.Conv2d,
    "CSRLinear": nn.Linear,
    "PatternConv2d": nn.Conv2d,
    "WinogradConv2d": nn.Conv2d,
}
# Arguments that only say where and how tensors are made, and two deprecated spellings.
_NOT_STORED = {"self", "device", "dtype", "seed", "min_value", "max_value"}
# Arguments that say whether a tensor is there, and its name.
_PRESENCE = {"bias": "bias", "sign_flip": "signs"}
# Arguments that do not change what a layer computes in evaluation mode.
COSMETIC = {"inplace", "p", "momentum"}


@functools.cache
def _argument_names(name: str) -> tuple[str, ...]:
    """Constructor arguments of an allowed type that a file stores; also its attributes' names."""
    if name in CONTAINERS:
        return _CONTAINER_ARGUMENTS.get(name, ())
    if name == "ChainStageWeights":  # of the convolution it is made from; always padded with zeros
        return (*(n for n in _argument_names("Conv2d") if n != "padding_mode"), "activation")
    if name == "FusedConv2d":  # its own signature is *args, **kwargs
        return (*_argument_names("Conv2d"), "activation")
    parameters = inspect.signature(LAYERS[name].__init__).parameters.values()
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return tuple(p.name for p in named if p.name not in _NOT_STORED)


def is_storable(value: object, depth: int = 0) -> bool:
    """Whether a constructor argument survives JSON: scalars and short flat sequences of them."""
    if isinstance(value, (list, tuple)):
        return depth < 2 and len(value) <= 16 and all(is_storable(v, depth + 1) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def type_name(module: nn.Module) -> str | None:
    """Name under which a module of exactly an allowed type is stored; None for every other."""
    return _NAMES.get(type(module))


def arguments_of(module: nn.Module) -> dict[str, Any] | None:
    """Constructor arguments of a module of an allowed type, or None if they do not describe it.

    They do not when somebody replaced its ``forward``, or its parameters are not those that the
    constructor makes (masks of ``torch.nn.utils.prune``, an added buffer, an added child).
    """
    name = _NAMES[type(module)]
    if has_own_forward(module) or (name in LAYERS and module._modules):
        return None
    arguments: dict[str, Any] = {}
    for argument in _argument_names(name):
        if not hasattr(module, _PRESENCE.get(argument, argument)):
            return None
        arguments[argument] = _argument(module, argument)
        if not is_storable(arguments[argument]):
            return None
    if name in PACKED_LAYERS:
        return arguments
    try:
        fresh = build(name, arguments)
    except ValueError:
        return None
    return arguments if _shapes(fresh) == _shapes(module) else None


def _argument(module: nn.Module, argument: str) -> Any:
    """The value of a constructor argument, None where the module has no such."""
    tensor = _PRESENCE.get(argument)
    if tensor is not None:
        return getattr(module, tensor, None) is not None
    return getattr(module, argument, None)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in own_tensors(module).items()}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the module itself, by name."""
    found: dict[str, Tensor] = {}
    found.update({n: p for n, p in module._parameters.items() if p is not None})
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            found[name] = buffer
    return found


def packed_arrays(module: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that make up the packed weight of a module; none of most."""
    return module._arrays if isinstance(module, PackedLayer) else ()


def build(
    name: str, arguments: Mapping[str, Any], weight: PackedWeight | None = None
) -> nn.Module:
    """Construct a layer without allocating its tensors.

    Args:
        name: an allowed type.
        arguments: its constructor arguments as read from JSON (lists stand for tuples).
        weight: the packed weight, for a layer with one and only for such.

    Returns:
        The layer, its tensors on the meta device but for those of the packed weight.

    Raises:
        ValueError: unknown type or argument, or the constructor refuses the arguments.
    """
    check_arguments(name, arguments)
    tuples = {k: _tupled(v) for k, v in arguments.items()}
    form, words = _FORM_OF.get(name, (type(None), "no packed weight"))
    if type(weight) is not form:
        raise ValueError(f"load: expected {words} for {name}, got {type(weight).__name__}")
    try:
        with torch.device("meta"):
            if name == "ResidualBlock":  # its two children are read next
                return ResidualBlock([nn.Identity()])
            if name == "ChainStageWeights":
                activation = str(tuples.pop("activation"))
                check_activation(name, activation)
                return ChainStageWeights(nn.Conv2d(**tuples), activation)
            if weight is None:
                return ALLOWED[name](**tuples)
            activation, tile = tuples.pop("activation", "none"), tuples.pop("tile", None)
            dense = _DENSE_OF[name](**tuples)
        assert isinstance(dense, (nn.Conv2d, nn.Linear))
        shape = tuple(dense.weight.shape)
        if weight.shape != (*shape, 1, 1)[:4]:
            raise ValueError(f"weight of shape {weight.shape} where the arguments make {shape}")
        if isinstance(weight, CSRWeight):
            return _build_csr(name, dense, activation, weight)
        if weight.groups != dense.groups:
            raise ValueError(f"weight of {weight.groups} groups where they are {dense.groups}")
        assert isinstance(dense, nn.Conv2d)  # as said by _DENSE_OF
        if isinstance(weight, PatternWeight):
            return PatternConv2d._made_of(dense, activation, packed=weight)
        if weight.tile != tile:
            raise ValueError(f"weight of tile {weight.tile} where it is {tile}")
        return WinogradConv2d._made_of(dense, activation, packed=weight)
    except Exception as error:  # whatever a constructor says about foreign arguments
        raise ValueError(
            f"load: expected arguments {name} accepts, got {dict(arguments)!r:.200} "
            f"({type(error).__name__}: {error})"
        ) from error


def _build_csr(
    name: str, dense: nn.Conv2d | nn.Linear, activation: str, weight: CSRWeight
) -> nn.Module:
    # Zeros of the full shape that take no memory: packing them gives the empty sparse layer.
    values = weight.values
    zeros = values.new_zeros(()).expand(dense.weight.shape)
    dense.weight = nn.Parameter(zeros, requires_grad=True)
    sparse_type: Any = SPARSE_LAYERS[name]
    layer: nn.Module = sparse_type.from_dense(dense, activation=activation)
    layer.values = nn.Parameter(values)
    layer.col_idx, layer.row_ptr = weight.col_idx, weight.row_ptr
    return layer


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a type or arguments that no file of ours holds.

    Raises:
        ValueError: the type is not allowed, or an argument unknown, missing or not a plain value.
    """
    if name not in ALLOWED:
        raise ValueError(f"load: expected a layer type sparsecnn knows, got {name!r:.80}")
    names = _argument_names(name)
    missing = _required_arguments(name) - set(arguments)
    if missing or set(arguments) - set(names) or not all(map(is_storable, arguments.values())):
        raise ValueError(
            f"load: expected arguments of {name} among {', '.join(names) or 'none'}"
            f"{f', with {sorted(missing)}' if missing else ''}, got {dict(arguments)!r:.200}"
        )


@functools.cache
def _required_arguments(name: str) -> frozenset[str]:
    made_of_conv = name in ("FusedConv2d", "ChainStageWeights")
    constructor = _DENSE_OF.get(name, nn.Conv2d if made_of_conv else ALLOWED[name])
    parameters = inspect.signature(constructor.__init__).parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty) & set(
        _argument_names(name)
    )


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, (list, tuple)) else value


# Attributes that must agree when one layer takes the place of another.
_CONV_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip
_LINEAR_GEOMETRY = ("in_features", "out_features")
_CONTAINER_TYPES = tuple(CONTAINERS.values())
_CONV_TYPES = (
    nn.Conv2d, DepthwiseConv2d, PatternConv2d, PointwiseConv2d, WinogradConv2d,
    SPARSE_LAYERS["CSRConv2d"],
)  # fmt: skip
_CONVS = {
    "Conv2d", "FusedConv2d", "CSRConv2d", "DepthwiseConv2d", "PatternConv2d", "PointwiseConv2d",
    "WinogradConv2d",
}  # fmt: skip
_LINEARS = {"Linear", "CSRLinear"}


def replacement_obstacle(
    name: str, arguments: Mapping[str, Any], has_tensors: bool, old: nn.Module, has_chains: bool
) -> str | None:
    """Why a layer of a file must not take the place of ``old``; None when it may.

    A convolution takes the place of a convolution and a linear layer of a linear layer of the same
    geometry (the bias may differ: folding a batch norm adds one); ``Identity`` that of a folded
    layer, a layer without tensors that of a batch norm with an activation of its own; a
    ``Sequential`` that of a linear layer (a densified one with its activation). A chain takes the
    place of its first convolution and ``Identity`` that of the others; a block that of any module
    with layers inside. A factorized layer takes the place of its like, whatever its stages: what
    they compute is compared when they are built, by `ends_obstacle`.
    """
    is_conv = isinstance(old, _CONV_TYPES)
    is_linear = isinstance(old, (nn.Linear, SPARSE_LAYERS["CSRLinear"]))
    is_norm = isinstance(old, nn.modules.batchnorm._BatchNorm)
    geometry: tuple[str, ...] = ()
    if name in _CONVS and is_conv:
        geometry = _CONV_GEOMETRY
    elif name in _LINEARS and is_linear:
        geometry = _LINEAR_GEOMETRY
    elif name == "CirculantPointwise" and is_conv:
        channels = arguments.get("channels")
        arguments = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "groups": 1}
        arguments |= {"in_channels": channels, "out_channels": channels}
        geometry = tuple(arguments)
    elif name == "CirculantLinear" and is_linear:
        channels = arguments.get("channels")
        arguments = {"in_features": channels, "out_features": channels}
        geometry = _LINEAR_GEOMETRY
    elif name == "FactorizedConv2d" and is_conv:
        geometry = ("groups",)
    elif not (
        (name == "ChainConv2d" and is_conv)
        or (name in ("ChainConv2d", "ResidualBlock") and old._modules)
        or (name == "Identity" and is_conv and has_chains)
        or (name == "Identity" and not (is_conv or is_linear or type(old) in _CONTAINER_TYPES))
        or (name == "Sequential" and is_linear)
        or (name == "FactorizedLinear" and is_linear)
        or (name in FACTORIZED and type(old) is ALLOWED[name])
        or (name in LAYERS and not has_tensors and is_norm)
    ):
        return f"the file has {name}, the model {type(old).__name__}"
    for attribute in geometry:
        want, got = _tupled(arguments.get(attribute)), getattr(old, attribute)
        if want != got:
            return f"the file has {name} with {attribute} {want}, the model {got}"
    return None


def argument_difference(arguments: Mapping[str, Any], module: nn.Module) -> str | None:
    """First argument in which a module of the same type differs from the file, in words."""
    for argument, want in arguments.items():
        got = _argument(module, argument)
        if argument not in COSMETIC and _tupled(want) != _tupled(got):
            return f"the file has {argument} {_tupled(want)}, the model {got}"
    return None


def ends_obstacle(new: nn.Module, old: nn.Module) -> str | None:
    """Why a factorized layer of a file must not take the place of ``old``; None when it may."""
    want, got = _ends(new), _ends(old)
    for name in sorted(set(want) | set(got)):
        if want.get(name) != got.get(name):
            title = type(new).__name__
            return f"the file has {title} with {name} {want.get(name)}, the model {got.get(name)}"
    return None


def _ends(module: nn.Module) -> dict[str, Any]:
    """Channels or features at both ends of the layers in a row, and the product of the strides."""
    ends: dict[str, Any] = {}
    for layer in module.modules():
        for first, last in (("in_channels", "out_channels"), ("in_features", "out_features")):
            if hasattr(layer, first):
                ends.setdefault("inputs", getattr(layer, first))
                ends["outputs"] = getattr(layer, last)
                high, wide = ends.get("stride", (1, 1))
                down, right = getattr(layer, "stride", (1, 1))
                ends["stride"] = (high * down, wide * right)
    return ends


def value_obstacle(module: nn.Module, name: str, tensor: Tensor) -> str | None:
    """What a layer cannot compute with in a tensor of the right shape; None when it can."""
    if isinstance(module, PermuteChannels) and not is_permutation(tensor):
        return f"a permutation in int64, got {tensor.dtype} {tensor.tolist()!r:.60}"
    if name == "signs" and isinstance(module, (CirculantLinear, CirculantPointwise)):
        if not bool((tensor.abs() == 1).all()):
            return f"1 or -1 everywhere, got {tensor.tolist()!r:.60}"
    return None
