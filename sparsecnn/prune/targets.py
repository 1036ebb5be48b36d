"""What can be pruned: the weights of convolutions and linear layers, each named once.

Conv weight W: (K, C/G, R, S), read as K filters of C/G kernels of R*S entries in G conv groups.
Linear weight W: (O, I) is the same with R = S = 1 and G = 1. A weight in the Winograd domain is
(K, C/G, 4, 4), its 16 points in place of the positions of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsecnn._models import evaluating, match_names, positional, refuse_sparse_layers
from sparsecnn.nn.winograd_relu import WinogradReLUConv2d

FilterFn = Callable[[nn.Module, str], bool]
SUPPORTED = (nn.Conv2d, nn.Linear, WinogradReLUConv2d)
_PARAM = "weight"


@dataclass(frozen=True, eq=False)
class Target:
    """One prunable weight: the unit that scores, masks and reports are computed for.

    Compared and hashed by identity, so that it can key dictionaries.

    Attributes:
        module: the layer that owns the weight.
        param: attribute name of the weight, "weight".
        name: qualified name of `module` in the model, "" for the model itself.
        aliases: all qualified names under which the weight is reachable, `name` first.
        owners: all modules that hold this very Parameter, `module` first (tied weights).
    """

    module: nn.Module
    param: str
    name: str
    aliases: tuple[str, ...] = ()
    owners: tuple[nn.Module, ...] = ()

    @property
    def key(self) -> str:
        """Qualified name of the weight, as in `named_parameters` of the unpruned model."""
        return f"{self.name}.{self.param}" if self.name else self.param

    @property
    def dense(self) -> nn.Parameter:
        """The trained Parameter behind any mask: what the optimizer holds. Shape of W."""
        parameter = _raw_parameter(self.module)
        assert parameter is not None, "check_maskable refuses weights without one"
        return parameter

    @property
    def weight(self) -> Tensor:
        """The weight the forward pass uses: `dense` times every attached mask. Shape of W."""
        mask = self.foreign_mask
        if mask is not None:
            # The `weight` attribute is only refreshed by the forward hook: stale after a step.
            return self.dense * mask
        weight = getattr(self.module, self.param)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def foreign_mask(self) -> Tensor | None:
        """The mask of torch.nn.utils.prune or torch.ao.pruning on the weight, None without one."""
        if parametrize.is_parametrized(self.module, self.param):
            masks = _masks_of_sparsifiers(self.module, self.param)
            return None if masks is None else torch.stack(masks).prod(0)
        if self.module._parameters.get(f"{self.param}_orig") is None:
            return None
        return self.module._buffers.get(f"{self.param}_mask")

    def values(self) -> Tensor:
        """`dense` as float64 on the CPU, detached.

        Scores are computed there so that the same weights give the same masks on every device,
        and so that small squares do not underflow into ties.
        """
        return self.dense.detach().to("cpu", torch.float64)

    @property
    def shape(self) -> torch.Size:
        """Shape of W: (K, C/G, R, S) or (O, I)."""
        parameter = _raw_parameter(self.module)
        return self.weight.shape if parameter is None else parameter.shape

    @property
    def grouped_shape(self) -> tuple[int, int, int, int]:
        """W's entries as (G, K/G, C/G, R*S), in memory order of a contiguous W."""
        groups = getattr(self.module, "groups", 1)
        shape = self.shape
        spatial = 1
        for size in shape[2:]:
            spatial *= size
        return groups, shape[0] // groups, shape[1], spatial


def find_targets(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | None = None,
    types: Sequence[type[nn.Module]] = SUPPORTED,
    ignore: Sequence[str] = (),
    filter_fn: FilterFn | None = None,
    *,
    include_classifier: bool = False,
) -> list[Target]:
    """List the prunable weights of `model`, in registration order.

    The classifier is left out: it is the last `nn.Linear` of a model with at least two prunable
    layers. "Last" means last called when `example_inputs` are given, else last registered. A
    model without `nn.Linear` has no classifier in this sense; name it in `ignore`.

    Args:
        model: any module; a bare layer is a model with one target called "".
        example_inputs: one input tensor or the positional arguments of `model`, used only to
            find the order in which layers are called (one forward pass in evaluation mode).
        types: layer classes, each `nn.Conv2d`, `nn.Linear`, `WinogradReLUConv2d` or a subclass.
        ignore: qualified names or "re:<regular expression>" (matched in full) to leave out.
        filter_fn: `filter_fn(module, name)` returns False for layers to leave out.
        include_classifier: list the classifier as well.

    Returns:
        One target per weight; a weight shared by several layers is listed once, under its first
        name. May be empty only if `ignore` and `filter_fn` left nothing.

    Raises:
        TypeError: `model`, `types` or `ignore` have the wrong type.
        ValueError: no layer of `types`, a name in `ignore` that is none of them, a layer swapped
            by sparsecnn, or a weight that cannot be masked (lazy, quantized, re-parametrized).
    """
    if isinstance(ignore, str):
        raise TypeError(f"find_targets: expected ignore to be a list of names, got {ignore!r}")
    candidates = candidate_targets(model, types)
    refuse_sparse_layers(model, "find_targets")
    dropped: set[str] = set()
    for pattern in ignore:
        dropped.update(t.name for t in match(pattern, candidates, "find_targets: ignore"))
    classifier = None if include_classifier else find_classifier(model, candidates, example_inputs)
    found = [
        t
        for t in candidates
        if t.name not in dropped
        and t is not classifier
        and (filter_fn is None or filter_fn(t.module, t.name))
    ]
    for t in found:
        check_maskable(t, "find_targets")
    return found


def candidate_targets(
    model: nn.Module, types: Sequence[type[nn.Module]] = SUPPORTED
) -> list[Target]:
    """All layers of `types` with their aliases, nothing left out and nothing checked.

    Raises:
        TypeError: `model` is no module or `types` holds an unsupported class.
        ValueError: there is no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_targets: expected model to be a torch.nn.Module, got {model!r:.80}")
    types = tuple(types) if isinstance(types, Iterable) else (types,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, SUPPORTED)):
            raise TypeError(
                "find_targets: expected types to be WinogradReLUConv2d, nn.Conv2d, nn.Linear or "
                f"subclasses, got {kind}"
            )
    names: dict[int, list[str]] = {}
    owners: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, types):
            parameter = _raw_parameter(module)
            identity = id(module if parameter is None else parameter)
            names.setdefault(identity, []).append(name)
            holders = owners.setdefault(identity, [])
            if all(module is not holder for holder in holders):
                holders.append(module)
    if not names:
        wanted = ", ".join(kind.__name__ for kind in types)
        raise ValueError(
            f"find_targets: expected model to contain a layer of {wanted}, got none in "
            f"{type(model).__name__}"
        )
    return [
        Target(owners[i][0], _PARAM, names[i][0], tuple(names[i]), tuple(owners[i])) for i in names
    ]


def _raw_parameter(module: nn.Module) -> nn.Parameter | None:
    """The Parameter behind masks, None if the weight is computed from several tensors."""
    if parametrize.is_parametrized(module, _PARAM):
        raw = getattr(module.parametrizations[_PARAM], "original", None)  # type: ignore[index]
        return raw if isinstance(raw, nn.Parameter) else None
    parameter = module._parameters.get(f"{_PARAM}_orig")
    return module._parameters.get(_PARAM) if parameter is None else parameter


def _masks_of_sparsifiers(module: nn.Module, param: str) -> list[Tensor] | None:
    """Masks of a weight that only the sparsifiers of torch.ao.pruning parametrize, else None.

    Known by the name of their parametrization: the package has moved before (to torchao), keeps
    copies of the class, and importing it here would load all of torch's quantization.
    """
    chain: Any = module.parametrizations
    sparsifiers = [p for p in chain[param] if type(p).__name__ == "FakeSparsity"]
    masks = [p.mask for p in sparsifiers if isinstance(getattr(p, "mask", None), Tensor)]
    return masks if len(masks) == len(chain[param]) else None


def find_classifier(
    model: nn.Module,
    candidates: Sequence[Target],
    example_inputs: Tensor | Sequence[Any] | None = None,
) -> Target | None:
    """The last `nn.Linear` among two or more layers, None without one.

    Args:
        model: the network, run once if `example_inputs` are given.
        candidates: its layers in registration order.
        example_inputs: see `find_targets`.
    """
    if len(candidates) < 2:
        return None
    order = list(candidates)
    if example_inputs is not None:
        called = _call_order(model, candidates, example_inputs)
        # Layers that were never called keep their place in front of those that were.
        order.sort(key=lambda t: max((called.get(o, -1) for o in t.owners), default=-1))
    linears = [t for t in order if isinstance(t.module, nn.Linear)]
    return linears[-1] if linears else None


def _call_order(
    model: nn.Module, candidates: Sequence[Target], example_inputs: Tensor | Sequence[Any]
) -> dict[nn.Module, int]:
    """Position of each layer's last call in one forward pass."""
    args = positional(example_inputs)
    called: dict[nn.Module, int] = {}
    calls = 0

    def record(module: nn.Module, _args: object, _output: object) -> None:
        nonlocal calls
        called[module] = calls
        calls += 1

    handles = [o.register_forward_hook(record) for t in candidates for o in t.owners]
    try:
        with evaluating(model), torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return called


def match(pattern: str, targets: Sequence[Target], what: str) -> list[Target]:
    r"""The targets that a qualified name or "re:<regular expression>" addresses.

    Args:
        pattern: a name, or "re:" and an expression that must match a name in full.
        targets: where to look; aliases of shared weights count.
        what: start of the error message.

    Raises:
        TypeError: `pattern` is not a string.
        ValueError: nothing matches (near matches are listed) or the expression is invalid.
    """
    names = {alias: t for t in targets for alias in t.aliases}
    found = match_names(pattern, names, what, "a prunable layer")
    return list(dict.fromkeys(names[name] for name in found))






def check_maskable(target: Target, what: str) -> None:
    """Check that the weight is an initialized floating-point Parameter free of other rewrites.

    Raises:
        ValueError: it is not; the message says which layer and what to do.
    """
    name = target.name or "(model)"
    for owner in target.owners:
        hooked = parametrize.is_parametrized(owner, target.param)
        if hooked and _masks_of_sparsifiers(owner, target.param) is None:
            masks: Any = owner.parametrizations
            kinds = [type(p).__name__ for p in masks[target.param]]
            raise ValueError(
                f"{what}: expected layer {name!r} without parametrizations of its weight, got "
                f"{', '.join(kinds)}; finalize the other Pruner, or call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
    parameter = _raw_parameter(target.module)
    hooked = any(parameter is not o._parameters.get(target.param) for o in target.owners)
    if parameter is None or (hooked and target.foreign_mask is None):
        raise ValueError(
            f"{what}: expected layer {name!r} to own its weight as a Parameter, got a weight "
            "computed by a hook (weight_norm, spectral_norm?); remove the hook first"
        )
    if hooked and len(target.owners) > 1:
        raise ValueError(
            f"{what}: expected torch.nn.utils.prune masks only on unshared weights, got "
            f"{', '.join(target.aliases)}; call torch.nn.utils.prune.remove on them first, or "
            "squash_mask on the sparsifier of torch.ao.pruning"
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"{what}: expected layer {name!r} to be initialized, got a lazy layer; run one forward"
        )
    if not parameter.is_floating_point() or parameter.is_meta:
        raise ValueError(
            f"{what}: expected layer {name!r} to have a floating-point weight with data, got "
            f"{parameter.dtype} on {parameter.device}"
        )
