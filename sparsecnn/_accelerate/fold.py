"""Folding batch norms and activations into the convolution they follow.

A batch norm is folded only when the recording shows that it is the one reader of everything the
convolution produces and reads nothing else; the same for an activation after either. So a branch
that reads the raw output, a norm in front of a convolution, an activation module used at several
places and a convolution used before two different norms all stay as they are.

Every folded layer is then compared with the modules it replaces on random data. The bound is
`(16 + 8 sqrt(L)) eps` times the sum of the magnitudes of the terms: L = C/G R S roundings that
behave like a random walk, with a factor of 8 to spare (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., section 2.8). A module that is not the plain batch norm it looks like fails.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..nn import FusedConv2d
from .precision import strict_float
from .record import Call, Recording

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
# Modules that do nothing in evaluation mode.
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Folded:
    """A convolution with what was folded into it.

    Attributes:
        conv: dense convolution with batch norm and bias in its weights; the recorded module
            itself when no batch norm was folded.
        activation: what follows it and is fused, "none" for nothing.
        replaced: folded module -> what takes its place.
        note: why nothing, or no more, was folded; empty when there was nothing to fold.
        max_abs_diff: largest difference to the modules folded, on a small random input.
    """

    conv: nn.Conv2d
    activation: str = "none"
    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)
    note: str = ""
    max_abs_diff: float = 0.0


def foldable_modules(model: nn.Module) -> list[nn.Module]:
    """The batch norms and activations of `model` that `fold` needs recorded."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) or type(m) in ACTIVATIONS]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of `module` and would notice a folding."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def fold(conv: nn.Conv2d, recording: Recording) -> Folded:
    """Fold what follows `conv` according to the recording, checked on random data.

    Args:
        conv: a plain `nn.Conv2d` or a `FusedConv2d`, in evaluation mode; it is not changed.
        recording: of the model it belongs to, with `foldable_modules` recorded.

    Returns:
        The folded layer; with nothing folded and a note when something forbids it.
    """
    if isinstance(conv, FusedConv2d):
        return Folded(conv.to_dense(), conv.activation, {}, "was fused before")
    plain = Folded(conv)
    if not recording.dataflow:
        plain.note = "the dataflow could not be recorded"
        return plain
    if has_hooks(conv):
        plain.note = "the layer has hooks"
        return plain

    result = Folded(conv)
    chain: list[nn.Module] = []
    calls = recording.calls[conv]
    following, note = _successor(calls, recording)
    if isinstance(following, _BatchNorm):
        refusal = _refuse_norm(following)
        if refusal:
            plain.note = refusal
            return plain
        result.conv = _fold_norm(conv, following)
        result.activation, rest = _tail_of(following)
        result.replaced[following] = rest
        chain.append(following)
        calls = recording.calls[following]
        if result.activation != "none" or not isinstance(rest, nn.Identity):
            following = None
        else:
            following, note = _successor(calls, recording)
    if following is not None and type(following) in ACTIVATIONS:
        if has_hooks(following):
            note = "the activation has hooks"
        else:
            result.activation = ACTIVATIONS[type(following)]
            result.replaced[following] = nn.Identity()
            chain.append(following)
    if not chain:
        plain.note = note
        return plain
    result.note = note
    wrong = _disagreement(conv, chain, result, calls=recording.calls[conv])
    if wrong:
        plain.note = wrong
        return plain
    return result


def _successor(calls: list[Call], recording: Recording) -> tuple[nn.Module | None, str]:
    """The module that reads every output of `calls`, alone, and nothing else; or why none."""
    found: list[Call] = []
    for call in calls:
        value = call.output
        if value is None or not value.readers:
            return None, "its output is not read" if value is None else ""
        candidates = [
            c for c in value.readers[0] if c.input is value and all(c in r for r in value.readers)
        ]
        wanted = any(
            c.input is value and c.module in recording.calls and _may_fold(c.module)
            for reader in value.readers
            for c in reader
        )
        if value.is_output and wanted:
            return None, "its raw output is an output of the model"
        if not candidates or value.is_output:
            return None, "its raw output is read elsewhere too" if wanted else ""
        found.append(candidates[0])
    modules = {call.module for call in found}
    following = found[0].module
    if len(modules) > 1:
        return None, "its calls are followed by different modules"
    if not _may_fold(following):
        return None, ""
    if len(set(found)) != len(calls) or len(recording.calls[following]) != len(calls):
        kind = "batch norm" if isinstance(following, _BatchNorm) else "activation"
        return None, f"the {kind} after it is used elsewhere too"
    return following, ""


def _may_fold(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or type(module) in ACTIVATIONS


def _refuse_norm(norm: _BatchNorm) -> str:
    if has_hooks(norm):
        return "the batch norm has hooks"
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm keeps no running statistics"
    known = (nn.BatchNorm2d, nn.SyncBatchNorm)
    if type(norm).forward in [kind.forward for kind in known]:
        return ""
    if isinstance(norm, nn.BatchNorm2d) and isinstance(getattr(norm, "act", None), nn.Module):
        drop = getattr(norm, "drop", None)
        if drop is None or isinstance(drop, _IDLE):
            return ""
    return f"{type(norm).__name__} has a forward of its own"


def _tail_of(norm: _BatchNorm) -> tuple[str, nn.Module]:
    """(activation to fuse, module left in place) of a batch norm that may contain both."""
    act = getattr(norm, "act", None)
    if not isinstance(act, nn.Module) or isinstance(act, nn.Identity):
        return "none", nn.Identity()
    if type(act) in ACTIVATIONS and not has_hooks(act):
        return ACTIVATIONS[type(act)], nn.Identity()
    return "none", act


def _fold_norm(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    assert norm.running_mean is not None and norm.running_var is not None
    # In float64, so that folding costs one rounding per weight whatever the dtype.
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        None if norm.weight is None else norm.weight.double(),
        None if norm.bias is None else norm.bias.double(),
    )
    # Shares the old weight for a moment instead of copying it: it is replaced at once.
    folded = copy.deepcopy(conv, {id(p): p for p in conv.parameters()})
    learned = [p for p in (conv.bias, norm.weight, norm.bias) if p is not None]
    folded.weight = nn.Parameter(weight.detach().to(conv.weight.dtype), conv.weight.requires_grad)
    folded.bias = nn.Parameter(
        bias.detach().to(conv.weight.dtype), any(p.requires_grad for p in learned)
    )
    return folded


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; one pass without a temporary."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))


def crop_input(conv: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """Random normal input like the recorded one, cut to one small image; always the same."""
    sides = []
    for axis, side in enumerate(shape[2:]):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        sides.append(min(side, max(12, span + 2 * conv.stride[axis])))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, shape[1], *sides), generator=generator)
    return x.to(device=conv.weight.device, dtype=conv.weight.dtype)


def term_magnitude(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Sum of the magnitudes of the terms of each output of `conv` on `x`, without the bias."""
    absolute = copy.deepcopy(conv, {id(p): p for p in conv.parameters()})
    absolute.weight = nn.Parameter(conv.weight.detach().abs(), False)
    absolute.bias = None
    # The class's own forward: not that of a subclass with an activation, and no hooks.
    return nn.Conv2d.forward(absolute, x.abs())


def rounding(conv: nn.Conv2d) -> float:
    """The factor before the magnitudes: `(16 + 8 sqrt(L)) eps`."""
    terms = conv.weight[0].numel()
    return (16 + 8 * math.sqrt(terms)) * torch.finfo(conv.weight.dtype).eps


@torch.no_grad()
@strict_float()
def _disagreement(
    conv: nn.Conv2d, chain: list[nn.Module], result: Folded, calls: list[Call]
) -> str:
    """Why the folded layer is not what the modules compute; empty when it is."""
    folded = result.conv
    assert folded.bias is None or folded.bias.dim() == 1
    for tensor in (folded.weight, folded.bias):
        if tensor is not None and not all_finite(tensor):
            return "folding would give weights that are not finite"
    x = crop_input(conv, calls[0].input_shape)
    want = conv(x)
    for module in chain:
        want = module(want)
    got = FusedConv2d.from_dense(folded, activation=result.activation)(x)
    for norm in (m for m in chain if isinstance(m, _BatchNorm)):
        got = result.replaced[norm](got)
    magnitude = term_magnitude(folded, x) + _offsets(conv, chain)[:, None, None]
    worst = float((want - got).abs().max())
    result.max_abs_diff = worst
    excess = (want - got).abs().double() - rounding(conv) * magnitude.double()
    if bool((excess <= 0).all()):
        return ""
    return f"folding {type(chain[0]).__name__} changed the output by {worst:.3g} on random data"


def _offsets(conv: nn.Conv2d, chain: list[nn.Module]) -> Tensor:
    """Magnitude per channel of what is added to the products: biases and means (K,)."""
    total = conv.weight.new_zeros(conv.out_channels)
    if conv.bias is not None:
        total = total + conv.bias.abs()
    for norm in (m for m in chain if isinstance(m, _BatchNorm)):
        assert norm.running_mean is not None and norm.running_var is not None
        total = total + norm.running_mean.abs()
        total = total * torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            total = total * norm.weight.abs()
        if norm.bias is not None:
            total = total + norm.bias.abs()
    return total
