r"""The diagonal of the Hessian, h_kk = d2E/dw_k^2, E the mean loss over the calibration samples.

The need is "hessian:MODE", for "hutchinson" followed by ":PROBES":

| mode        | what                                                   | passes per batch          |
|-------------|--------------------------------------------------------|---------------------------|
| backprop    | the recursion of LeCun et al., see `_Tape`             | 1 forward, ~4 backward    |
| levenberg   | the same without the terms in f'': non-negative        | likewise                  |
| exact       | double backward                                        | one per weight: small nets|
| hutchinson  | mean of v * Hv over random signs v                     | one per probe             |
| fisher      | mean over samples of the squared gradient of one loss  | 1, gradients per sample   |

LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 2 (1989), 598-605. Batch norm is in evaluation
mode in all of them. The square of the mean gradient is none of these: it is 0 at a minimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from sparsecnn._models import per_sample_gradients

from .activations import refuse_coupled_samples, tensors_in
from .calibration import Session, batch_size, observed, register_collector
from .targets import Target

Mode = Literal["backprop", "levenberg", "exact", "hutchinson", "fisher"]
EXACT_LIMIT = 100_000  # weights; one backward pass each
_ELEMENTWISE = frozenset(
    {"relu", "relu_", "relu6", "leaky_relu", "hardtanh", "tanh", "sigmoid", "softplus", "elu"}
    | {"selu", "celu", "gelu", "silu", "mish", "logsigmoid", "hardswish", "hardsigmoid"}
    | {"batch_norm", "dropout", "dropout2d", "clone", "contiguous"}
)
# Every output is one input: coefficients 0 and 1.
_SELECTIONS = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze", "max_pool2d"})
_AVERAGES = frozenset({"avg_pool2d", "adaptive_avg_pool2d", "mean"})
_METADATA = frozenset({"size", "dim", "numel", "__len__", "__get__", "is_contiguous"})


@register_collector("hessian")
def _hessian_diagonal(
    session: Session, targets: Sequence[Target], mode: str = "backprop", probes: str = "100"
) -> dict[Target, Tensor]:
    """h_kk of every weight, shape of W, float64 on the CPU."""
    if mode not in get_args(Mode):
        raise ValueError(
            f"hessian: expected mode among {', '.join(get_args(Mode))}, got {mode!r}"
        )
    refuse_coupled_samples(session.model)
    if mode == "exact":
        return _exact(session, targets)
    if mode == "hutchinson":
        return _hutchinson(session, targets, int(probes))
    if mode == "fisher":
        return _squared_gradients(session, targets)
    return _recursion(session, targets, second=mode == "backprop")


def _names(model: nn.Module, targets: Sequence[Target]) -> dict[Target, str]:
    """Names that `functional_call` knows: those behind the masks."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {t: names[id(t.dense)] for t in targets}


def _gradients(
    session: Session, targets: Sequence[Target]
) -> Iterator[tuple[float, list[tuple[Target, Tensor, Tensor]]]]:
    """Per batch: its share of the samples and (target, weight, differentiable gradient)."""
    names = _names(session.model, targets)
    for inputs, labels in session.each():
        weights = {t: t.dense.detach().clone().requires_grad_() for t in targets}
        output = functional_call(session.model, {names[t]: weights[t] for t in targets}, inputs)
        loss = session.loss_fn(output, labels)
        found = torch.autograd.grad(
            loss, list(weights.values()), create_graph=True, allow_unused=True
        )
        # Of a layer out of reach or a loss that is linear in the weight, h is 0.
        yield batch_size(inputs) / session.samples, [
            (t, weights[t], g)
            for t, g in zip(targets, found, strict=True)
            if g is not None and g.requires_grad
        ]


def _zeros(targets: Sequence[Target]) -> dict[Target, Tensor]:
    return {t: torch.zeros(t.shape, dtype=torch.float64) for t in targets}


def _exact(session: Session, targets: Sequence[Target]) -> dict[Target, Tensor]:
    count = sum(t.dense.numel() for t in targets)
    if count > EXACT_LIMIT:
        raise ValueError(
            f"hessian: expected at most {EXACT_LIMIT} weights for mode 'exact', got {count}; use "
            "mode 'hutchinson' or 'fisher'"
        )
    total = _zeros(targets)
    for share, found in _gradients(session, targets):
        for t, weight, gradient in found:
            diagonal = torch.zeros(weight.numel(), dtype=torch.float64)
            for k, entry in enumerate(gradient.reshape(-1)):
                (row,) = torch.autograd.grad(entry, weight, retain_graph=True, allow_unused=True)
                if row is not None:
                    diagonal[k] = row.reshape(-1)[k].double()
            total[t] += share * diagonal.reshape(t.shape)
    return total


def _hutchinson(
    session: Session, targets: Sequence[Target], probes: int
) -> dict[Target, Tensor]:
    total = _zeros(targets)
    for share, found in _gradients(session, targets):
        for _ in range(probes):
            signs = [
                (torch.randint(2, w.shape, generator=session.generator) * 2 - 1).to(w)
                for _, w, _ in found
            ]
            products = torch.autograd.grad(
                [g for _, _, g in found],
                [w for _, w, _ in found],
                signs,
                retain_graph=True,
                allow_unused=True,
            )
            for (t, _, _), v, hv in zip(found, signs, products, strict=True):
                if hv is not None:
                    total[t] += share / probes * (v * hv).detach().to("cpu", torch.float64)
    return total


def _squared_gradients(session: Session, targets: Sequence[Target]) -> dict[Target, Tensor]:
    """Mean over samples of (dL_n/dw)^2; the loss of every sample alone, whatever the batches."""
    names = _names(session.model, targets)
    weights = {names[t]: t.dense.detach() for t in targets}
    foreign = [t for t in targets if t.foreign_mask is not None]
    total = _zeros(targets)
    # The hook of torch.nn.utils.prune keeps a computed weight as an attribute: it must not be
    # left with a tensor of a transform that has ended.
    kept = [(owner, owner.weight) for t in foreign for owner in t.owners]
    try:
        for inputs, labels in session.each():
            if not isinstance(labels, Tensor):
                raise TypeError(f"hessian: expected labels to be a tensor, got {labels!r:.80}")
            for found in per_sample_gradients(
                session.model, session.loss_fn, weights, (*inputs, labels), batch_size(inputs)
            ):
                for t in targets:
                    value = found[names[t]].detach().double().square().sum(0)
                    total[t] += value.to("cpu") / session.samples
    finally:
        for owner, weight in kept:
            owner.weight = weight
    return total


class _Step:
    """One function of the chain, to be run again on other values."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = getattr(func, "__name__", str(func))
        self.owner: Target | None = None

    def __call__(self, x: Tensor, *weight: Tensor) -> Tensor:
        """The function of x; with another weight, and then without bias, for linear maps."""
        args = (x, *weight, None, *self.args[3:]) if weight else (x, *self.args[1:])
        result: Tensor = self.func(*args, **self.kwargs)
        return result


class _Tape(TorchFunctionMode):
    """Record a forward pass that is one chain of functions of one tensor, or refuse.

    The recursion only holds where every value has one reader that it knows: sums of branches,
    products of activations and unknown functions are refused by name, and the chain must reach
    from the input to the output. What the network computes from sizes alone is its own affair.

    Raises:
        ValueError: the network is no such chain.
    """

    def __init__(self, start: Tensor, targets: Sequence[Target]) -> None:
        super().__init__()
        self.head = start
        self.steps: list[_Step] = []
        self.owner: Target | None = None
        self._owners = {owner: t for t in targets for owner in t.owners}
        self._weights = {id(t.dense): t for t in targets}
        # All values of the chain, kept so that their ids stay theirs.
        self._values = {id(start): start}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`; append it to the chain if it reads the chain."""
        kwargs = kwargs or {}
        step = _Step(func, args, kwargs)
        read = [x for x in tensors_in((args, kwargs)) if id(x) in self._values]
        if not read:
            return func(*args, **kwargs)
        if step.name in _METADATA:
            result = func(*args, **kwargs)
            if not any(True for _ in tensors_in(result)):
                return result
        self._check(step, read)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            raise _refused(f"{step.name} with several results")
        self.steps.append(step)
        self.head = result
        self._values[id(result)] = result
        return result

    def _check(self, step: _Step, read: list[Tensor]) -> None:
        linear = step.name in ("conv2d", "linear")
        known = linear or step.name in _ELEMENTWISE | _SELECTIONS | _AVERAGES
        if not known:
            raise _refused(f"{step.name}")
        if len(read) > 1 or read[0] is not self.head or step.args[:1] != (read[0],):
            raise _refused(f"a value with several readers at {step.name}")
        random = step.name in ("batch_norm", "dropout", "dropout2d")
        if (random and step.kwargs.get("training", True)) or (
            linear and (step.kwargs or len(step.args) < 3)
        ):
            raise _refused(f"{step.name} in training mode or with other arguments than a layer's")
        if linear:
            step.owner = self._weights.get(id(step.args[1]), self.owner)
            if step.owner is not None and not torch.equal(step.args[1], step.owner.weight):
                raise _refused(f"a function of the weight of {step.owner.name!r}")
        if step.name == "mean":
            dims = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim")
            axes = {d % 4 for d in dims} if isinstance(dims, (tuple, list)) else set()
            if read[0].dim() != 4 or axes != {2, 3}:
                raise _refused("a mean over other axes than the positions of maps")

    def run(self, model: nn.Module) -> Tensor:
        """The output of the network; afterwards `steps` lead to it."""
        start = self.head

        def entering(module: nn.Module, _inputs: tuple[Any, ...]) -> None:
            self.owner = self._owners[module]

        def leaving(_module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
            self.owner = None

        handles = [owner.register_forward_pre_hook(entering) for owner in self._owners]
        try:
            with torch.no_grad(), observed(self._owners, leaving), self:
                output: Tensor = model(start)
        finally:
            for handle in handles:
                handle.remove()
        if output is not self.head:
            raise _refused("an output that does not come from the last of these functions")
        return self.head


def _refused(got: str) -> ValueError:
    return ValueError(
        "hessian: expected a chain of convolutions, linear layers, batch norms, elementwise "
        f"activations, poolings and flattens for mode 'backprop', got {got}; use mode 'fisher' or "
        "'hutchinson'"
    )


def _recursion(
    session: Session, targets: Sequence[Target], second: bool
) -> dict[Target, Tensor]:
    """Back through the chain with d1 = dE/da and d2 = d2E/da^2 of every value.

    Linear maps a = Wx: d2E/dw_ij^2 = d2_i x_j^2, summed over positions where a weight is shared,
    and d2E/dx_j^2 = sum_i w_ij^2 d2_i. Elementwise x = f(a): d2E/da^2 = f'^2 d2 + f'' d1.
    """
    total = _zeros(targets)
    for inputs, labels in session.each():
        if len(inputs) != 1:
            raise _refused(f"{len(inputs)} inputs")
        start = inputs[0].detach().clone()
        tape = _Tape(start, targets)
        if len(tape.run(session.model)) != len(start):
            raise _refused("an output whose first dimension does not count samples")
        # In-place functions have overwritten values of the first run.
        values = [inputs[0].detach()]
        with torch.no_grad():
            for step in tape.steps:
                values.append(step(values[-1].clone()))
        output = values.pop()
        d1, d2 = _at_output(session, output, labels)
        for step, value in zip(reversed(tape.steps), reversed(values), strict=True):
            d1, d2, h = _back(step, value, d1, d2, second)
            if step.owner is not None and h is not None:
                total[step.owner] += h.to("cpu", torch.float64) / session.samples
    return total


def _at_output(session: Session, output: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """First and diagonal second derivatives of the summed loss, shape of the output.

    p - y and p(1 - p) for the cross entropy of a softmax, 2(x - d) and 2 for squared errors.
    Cost: one backward pass through the loss per output of a sample.
    """
    x = output.detach().requires_grad_()
    loss = session.loss_fn(x, labels) * len(x)
    (d1,) = torch.autograd.grad(loss, x, create_graph=True)
    d2 = torch.zeros_like(x).reshape(len(x), -1)
    if d1.requires_grad:
        columns = d1.reshape(len(x), -1)
        for k in range(columns.shape[1]):
            # Samples do not depend on each other: one pass serves all of them.
            (row,) = torch.autograd.grad(
                columns[:, k].sum(), x, retain_graph=True, allow_unused=True
            )
            if row is not None:
                d2[:, k] = row.reshape(len(x), -1)[:, k]
    return d1.detach(), d2.detach().reshape(x.shape)


def _back(
    step: _Step, value: Tensor, d1: Tensor, d2: Tensor, second: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """d1 and d2 at the input of a step from those at its output, and h of its weight."""
    x = value.detach().requires_grad_()
    with torch.enable_grad():
        out = step(x.clone())
        if step.name in _ELEMENTWISE:
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            below = slope.detach().square() * d2
            if second and slope.requires_grad:
                (bend,) = torch.autograd.grad(slope.sum(), x, allow_unused=True)
                below = below if bend is None else below + bend * d1
            return slope.detach() * d1, below, None
        (below1,) = torch.autograd.grad(out, x, d1.reshape(out.shape))
        if step.name in ("conv2d", "linear"):
            squared = value.detach().square().requires_grad_()
            weight = step.args[1].detach().square().requires_grad_()
            below, h = torch.autograd.grad(step(squared, weight), (squared, weight), d2)
            return below1, below, h
    if step.name in _SELECTIONS:
        x = value.detach().requires_grad_()
        with torch.enable_grad():
            (below,) = torch.autograd.grad(step(x.clone()), x, d2)
        return below1, below, None
    # A pooling treats all maps alike: the coefficients of one map, squared.
    one = torch.zeros((1, 1, *value.shape[2:]), dtype=value.dtype, device=value.device)
    jacobian = torch.autograd.functional.jacobian(step, one, vectorize=True)
    squares = jacobian.reshape(-1, one.numel()).square()
    below = d2.reshape(-1, squares.shape[0]) @ squares
    return below1, below.reshape(value.shape), None
