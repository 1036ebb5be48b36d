"""``compact_maps_``: fewer feature maps between two layers, by rows of a circulant matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from sparsecnn._models import evaluating
from sparsecnn.nn._common import inherit

from .collect import Batch
from .moments import patches_at, responses_at
from .problem import UnsupportedLayer
from .solvers.circulant import captured, circulant_rows, learn_circulant, pca_bound

Layer = nn.Conv2d | nn.Linear
_RIDGE = 1e-6  # of the mean square of the second layer's inputs


@dataclass(frozen=True)
class CompactMaps:
    """What `compact_maps_` did.

    Attributes:
        q: (d,) of the circulant matrix, float64; R is its first k rows.
        kept: share of the responses' energy in the compact maps R z.
        kept_by_pca: share that the best k rows of any kind would keep.
        error: of the second layer's responses on the data, relative: ||Y' - Y|| / ||Y||.
    """

    q: Tensor
    kept: float
    kept_by_pca: float
    error: float


@dataclass(frozen=True)
class _Between:
    """What stands between the two layers."""

    norm: _BatchNorm | None
    relu: bool


@torch.no_grad()
def compact_maps_(
    model: nn.Module, first: str, second: str, k: int, batches: Iterable[Batch], *, seed: int = 0
) -> CompactMaps:
    """Replace the d maps between two layers by k compact ones, in place.

    The first k rows R of an orthogonal circulant matrix are learned on the d responses z that
    `second` reads (`learn_circulant`; centred where `second` has a bias to take up the mean).
    Then the compact maps R z are computed from the first layer's input at once, and the second
    layer is fitted to them:

        linear in between:  first' = R W, R b
        ReLU in between:    first' = argmin ||R z - W' x - b'||^2 over the input patches x
        second' = argmin ||Y - W' x' - b'||^2 + ridge ||W' - W R'||^2 over the patches x' of the
                  maps that first' gives, after the ReLU

    (Wang, Xu, Xu, Tao, "Beyond Filters: Compact Feature Map for Portable Deep Model", ICML 2017.)
    A batch norm in between is folded into first' and becomes an ``nn.Identity``. Both layers
    then have k/d of their weights. At k = d the network is exactly as before: R is orthogonal, and
    where a ReLU stands in between it is taken to be the identity.

    Train the network on afterwards. A circulant keeps far less than a principal component analysis
    at the same k, see `learn_circulant` and the result's `kept` and `kept_by_pca`; and a ReLU cuts
    the negative half of what is kept. Between two 3x3 convolutions of 32 maps with batch norm and
    ReLU, trained on 8x8 digits, the error was 0.145 at k = 8, where the first k of the maps
    themselves gave 0.190, but 0.102 against their 0.050 at k = 24: for few maps less, remove
    channels.

    Args:
        model: the network; run in evaluation mode, its modes stay as they are.
        first: name of an ``nn.Conv2d`` or ``nn.Linear``, groups 1.
        second: name of the one layer of the same kind that reads it, through nothing but a batch
            norm and a ReLU, as modules or functions.
        k: compact maps, 1 <= k <= d.
        batches: inputs of the model on its device, each a tensor or a tuple of positional
            arguments.
        seed: of the circulant's starts and of the check's random responses.

    Raises:
        UnsupportedLayer: layers of another kind, grouped ones, weights that are masked or
            parametrized; `second` is not fed by `first` alone, or something else reads it.
        TypeError: batches of another kind.
        ValueError: unknown names, k out of range, no batch, responses that are not finite.

    Cost: two runs over the batches and two linear systems of S kh kw and k kh kw unknowns; the
    systems take O(n (S kh kw)^2) for n positions.
    """
    a, b = _layer(model, first), _layer(model, second)
    d = a.weight.shape[0]
    if b.weight.shape[1] != d or type(a) is not type(b):
        raise UnsupportedLayer(
            f"compact_maps_: expected second to read the {d} maps of first, got {first!r} = {a} "
            f"and {second!r} = {b}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d:
        raise ValueError(f"compact_maps_: expected k between 1 and {d}, got {k!r}")
    inputs = _inputs(batches)
    with evaluating(model):
        between = _between(model, a, b, inputs[0], (first, second), seed)
        q, kept, bound, new_first = _compacted(model, a, b, between, k, inputs, seed)
        new_second, error = _refitted(model, a, b, between, q, new_first, inputs)
    swaps: dict[nn.Module, nn.Module] = {a: new_first, b: new_second}
    if between.norm is not None:
        swaps[between.norm] = nn.Identity()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in swaps:
            inherit(swaps[module], module)
            model.set_submodule(name, swaps[module])
    return CompactMaps(q, kept, bound, error)


def _compacted(
    model: nn.Module,
    a: Layer,
    b: Layer,
    between: _Between,
    k: int,
    inputs: Sequence[tuple[Any, ...]],
    seed: int,
) -> tuple[Tensor, float, float, Layer]:
    """(q, energy kept, bound, the first layer with k filters)."""
    d = a.weight.shape[0]
    fitted = between.relu and k < d
    moments = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for x, z, _ in _traced(model, a, b, inputs):
        responses = _with_ones(_rows(a, z))
        moments += responses.T @ responses
        if fitted:
            patches = _with_ones(_patches(a, x, z))
            gram = gram + patches.T @ patches
            cross = cross + patches.T @ responses[:, :-1]
    count = moments[-1, -1]
    c, mean = moments[:-1, :-1] / count, moments[-1, :-1] / count
    if b.bias is not None:
        c = c - torch.outer(mean, mean)
    if between.relu and not fitted:
        q = torch.zeros(d, dtype=torch.float64)
        q[0] = 1.0
    else:
        q = learn_circulant(c, k, seed=seed)
    rows = circulant_rows(q, k)
    if fitted:
        solution = rows @ torch.linalg.lstsq(gram, cross, driver="gelsd").solution.T
        weight, bias = solution[:, :-1], solution[:, -1]
    else:
        weight, bias = (rows @ part for part in _folded(a, between.norm))
    has_bias = fitted or a.bias is not None or between.norm is not None
    shaped = weight.reshape(k, *a.weight.shape[1:])
    return q, captured(c, rows), pca_bound(c, k), _made(a, shaped, bias if has_bias else None)


def _refitted(
    model: nn.Module,
    a: Layer,
    b: Layer,
    between: _Between,
    q: Tensor,
    new_first: Layer,
    inputs: Sequence[tuple[Any, ...]],
) -> tuple[Layer, float]:
    """The second layer on the compact maps, and the relative error of its responses."""
    rows = circulant_rows(q, new_first.weight.shape[0])
    old = b.weight.detach().to("cpu", torch.float64)
    # What would be exact if the compact maps were R z, and z = R' R z.
    prior = torch.einsum("od...,kd->ok...", old, rows)
    start = prior.flatten(1)
    bias = None if b.bias is None else b.bias.detach().to("cpu", torch.float64)
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    missing = energy = 0.0
    for x, _, y in _traced(model, a, b, inputs):
        z = new_first(x)
        patches = _patches(b, z.relu() if between.relu else z, y)
        wanted = _rows(b, y)
        rest = wanted - patches @ start.T
        if bias is not None:
            rest = rest - bias
            patches = _with_ones(patches)
        gram = gram + patches.T @ patches
        cross = cross + patches.T @ rest
        missing += float(rest.square().sum())
        energy += float(wanted.square().sum())
    assert isinstance(gram, Tensor) and isinstance(cross, Tensor)
    free = torch.ones(len(gram), dtype=gram.dtype)
    free[start.shape[1] :] = 0.0  # not the bias
    ridge = torch.diag(free * _RIDGE * (gram.diagonal() * free).sum() / free.sum())
    change = torch.linalg.lstsq(gram + ridge, cross, driver="gelsd").solution
    left = missing - float((2 * cross * change).sum() - (change * (gram @ change)).sum())
    weight = start + change[: start.shape[1]].T
    if bias is not None:
        bias = bias + change[-1]
    error = (max(left, 0.0) / energy) ** 0.5 if energy else 0.0
    return _made(b, weight.reshape(prior.shape), bias), error


def _inputs(batches: Iterable[Batch]) -> list[tuple[Any, ...]]:
    """The positional arguments of every batch."""
    inputs = []
    for batch in batches:
        if not isinstance(batch, (Tensor, tuple)):
            raise TypeError(
                "compact_maps_: expected batches of inputs, a tensor or a tuple of arguments, got "
                f"{type(batch).__name__}; leave labels out"
            )
        inputs.append(batch if isinstance(batch, tuple) else (batch,))
    if not inputs:
        raise ValueError("compact_maps_: expected at least one batch, got none")
    return inputs


def _layer(model: nn.Module, name: str) -> Layer:
    """The layer of a name, if it is one that can be refitted."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"compact_maps_: expected the names of two layers of the model, got {name!r}"
        ) from None
    if type(module) not in (nn.Conv2d, nn.Linear):
        raise UnsupportedLayer(
            f"compact_maps_: {name}: expected nn.Conv2d or nn.Linear, got {type(module).__name__}"
        )
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise UnsupportedLayer(f"compact_maps_: {name}: expected groups 1, got {module.groups}")
    if "weight" not in module._parameters or "bias" not in module._parameters:
        raise UnsupportedLayer(
            f"compact_maps_: {name}: expected plain weights, got masked ones; make the masks "
            "permanent first"
        )
    return module


def _between(
    model: nn.Module,
    a: Layer,
    b: Layer,
    batch: tuple[Any, ...],
    names: tuple[str, str],
    seed: int,
) -> _Between:
    """What `b` makes of the output of `a`; refuses all but batch norm and ReLU.

    The second run answers what the sources of a network cannot: random responses in place of the
    true ones must reach `b` as they are or through a ReLU, and with the output of `b` held as it
    was must leave no trace in the output of the network.
    """
    what = f"compact_maps_: expected {names[1]!r} to be the one reader of {names[0]!r}, "
    outputs: dict[nn.Module, list[Tensor]] = {a: [], b: []}
    norms: list[_BatchNorm] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in outputs:
            # An in-place activation may follow; which object left `a` is what matters there.
            outputs[module].append(output.clone() if module is b else output)
        elif outputs[a] and args and args[0] is outputs[a][-1]:
            assert isinstance(module, _BatchNorm)
            norms.append(module)

    watched = [a, b, *(m for m in model.modules() if isinstance(m, _BatchNorm))]
    with _hooked(m.register_forward_hook(note) for m in watched):
        before = model(*batch)
    if len(outputs[a]) != 1 or len(outputs[b]) != 1 or len(norms) > 1:
        raise UnsupportedLayer(
            f"{what}each called once, got {len(outputs[a])} and {len(outputs[b])} calls and "
            f"{len(norms)} batch norms"
        )
    norm = norms[0] if norms else None
    if norm is not None and norm.running_mean is None:
        raise UnsupportedLayer(f"{what}got a batch norm without running statistics")
    source = torch.Generator().manual_seed(seed)
    (response,), (held,) = outputs[a], outputs[b]
    probe = torch.randn(response.shape, generator=source).to(response)
    read: list[Tensor] = []
    with _hooked((
        (norm or a).register_forward_hook(lambda module, args, output: probe.clone()),
        b.register_forward_pre_hook(lambda module, args: read.append(args[0].clone())),
        b.register_forward_hook(lambda module, args, output: held),
    )):  # fmt: skip
        after = model(*batch)
    relu = torch.equal(read[0], probe.relu())
    if not relu and not torch.equal(read[0], probe):
        raise UnsupportedLayer(
            f"{what}with nothing but a batch norm and a ReLU in between, got another input"
        )
    leaves = [tree_leaves(output) for output in (before, after)]
    if not all(
        torch.equal(one, two) for one, two in zip(*leaves, strict=True) if isinstance(one, Tensor)
    ):
        raise UnsupportedLayer(f"{what}got an output of the model that depends on it otherwise")
    return _Between(norm, relu)


def _traced(
    model: nn.Module, a: Layer, b: Layer, inputs: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per batch: the input of `a`, the input of `b`, the output of `b`."""
    seen: dict[str, Tensor] = {}
    with _hooked((
        a.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].clone())),
        b.register_forward_pre_hook(lambda module, args: seen.update(z=args[0].clone())),
        b.register_forward_hook(lambda module, args, output: seen.update(y=output.clone())),
    )):  # fmt: skip
        for args in inputs:
            model(*args)
            yield seen["x"], seen["z"], seen["y"]


def _folded(layer: Layer, norm: _BatchNorm | None) -> tuple[Tensor, Tensor]:
    """Weight (d, J) and bias (d,) in float64, of the layer with its batch norm."""
    weight = layer.weight.detach().to("cpu", torch.float64).flatten(1)
    bias = weight.new_zeros(len(weight))
    if layer.bias is not None:
        bias = layer.bias.detach().to("cpu", torch.float64)
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    scale = (variance + norm.eps).rsqrt()
    shift = -mean * scale
    if norm.affine:
        gain = norm.weight.detach().cpu().double()
        scale, shift = scale * gain, shift * gain + norm.bias.detach().cpu().double()
    return weight * scale[:, None], bias * scale + shift


def _made(like: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """A layer with the geometry of another and these numbers."""
    out, inner = weight.shape[:2]
    kind: Any = {"device": "meta", "dtype": like.weight.dtype}
    made: Layer
    if isinstance(like, nn.Linear):
        made = nn.Linear(inner, out, bias is not None, **kind)
    else:
        size: list[Any] = [like.kernel_size, like.stride, like.padding, like.dilation]
        mode: Any = like.padding_mode
        made = nn.Conv2d(
            inner, out, size[0], size[1], size[2], size[3], 1, bias is not None, mode, **kind
        )
    made.weight = nn.Parameter(weight.to(like.weight), like.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(like.weight))
    return made


def _patches(layer: Layer, x: Tensor, output: Tensor) -> Tensor:
    """(n, S kh kw) inputs of a layer at every output position, float64 on the CPU."""
    every = torch.arange(output.numel() // layer.weight.shape[0])
    return patches_at(layer, x.to("cpu", torch.float64), output, every)[:, 0]


def _rows(layer: Layer, output: Tensor) -> Tensor:
    """(n, T) outputs of a layer at every position, float64 on the CPU."""
    every = torch.arange(output.numel() // layer.weight.shape[0])
    return responses_at(layer, output.to("cpu", torch.float64), every)[:, 0]


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
