"""Hard-concrete gates: which maps and units a network needs, learned under an L0 penalty.

```python
add_gates_(model, targets, example_inputs)
pruner = Pruner(model, targets=targets, granularity="filter", importance=Gates(),
                selector=Threshold(0), schedule=OneShot(at=steps), regularizers=[L0Penalty(lam)])
...                        # train; the optimizer must be built after add_gates_
fold_gates_(pruner.finalize())
```

A gate multiplies the output map or the input map of a layer. Behind a batch norm it multiplies
what the batch norm gives: in front of it, it would be rescaled away (ours).
Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018
(arXiv 1712.01312).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .followers import find_batch_norms
from .granularity import channel, filter_
from .importance import PruneConfig, register
from .protocols import Granularity, Stats
from .regularization import check_choice, check_number, zero
from .targets import Target

On = Literal["output", "input"]
_PARTITION = {"output": filter_, "input": channel}


class HardConcreteGate(nn.Module):
    """Multiplies each of n maps by a learned random gate z in [0, 1] that is often exactly 0 or 1.

    Training: u ~ U(0, 1), s = sigmoid((log u - log(1 - u) + log_alpha) / beta),
    z = min(1, max(0, s * (zeta - gamma) + gamma)).
    Evaluation: z = min(1, max(0, sigmoid(log_alpha) * (zeta - gamma) + gamma)), without beta:
    exactly 0 where log_alpha <= -2.3979 and exactly 1 where it is >= 2.3979, by the defaults.

    Args:
        n: number of maps or units.
        dim: dimension of the input that holds them, 1 for (N, C, H, W), -1 for (..., I).
        droprate: 1 - the open probability that training starts with, in (0, 1):
            log_alpha ~ N(log(1 - droprate) - log(droprate), 0.01^2).
        beta: temperature, > 0.
        gamma: lower end of the stretched interval, < 0.
        zeta: upper end, > 1.
        per_sample: draw one gate per sample (dimension 0) instead of one per forward pass.
        generator: of the initial values and the draws; None is torch's default one.

    Raises:
        TypeError: a number is none.
        ValueError: a value out of range.
    """

    log_alpha: nn.Parameter

    def __init__(
        self,
        n: int,
        dim: int = 1,
        *,
        droprate: float = 0.5,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        per_sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"HardConcreteGate: expected n to be an int >= 1, got {n!r}")
        check_number("HardConcreteGate", "droprate", droprate, positive=True)
        check_number("HardConcreteGate", "beta", beta, positive=True)
        if droprate >= 1:
            raise ValueError(f"HardConcreteGate: expected droprate in (0, 1), got {droprate:g}")
        if not (gamma < 0 and zeta > 1):
            raise ValueError(
                f"HardConcreteGate: expected gamma < 0 and zeta > 1, got {gamma:g} and {zeta:g}"
            )
        self.n, self.dim, self.beta, self.gamma, self.zeta = n, dim, beta, gamma, zeta
        self.per_sample = per_sample
        self.generator = generator
        device = None if generator is None else generator.device
        noise = torch.randn(n, generator=generator, device=device) * 0.01
        self.log_alpha = nn.Parameter(noise + math.log(1 - droprate) - math.log(droprate))

    def sample(self, count: int = 1) -> Tensor:
        """Training-time gates, (count, n); differentiable with respect to log_alpha."""
        u = self.log_alpha.new_empty(count, self.n).uniform_(generator=self.generator)
        # 0 comes up now and then; its logit is infinite: a gate of 0, but a gradient of NaN.
        logit = torch.logit(u, eps=torch.finfo(u.dtype).eps)
        return self._stretch(torch.sigmoid((logit + self.log_alpha) / self.beta))

    def test_gate(self) -> Tensor:
        """Evaluation-time gates, (n,)."""
        return self._stretch(torch.sigmoid(self.log_alpha))

    def open_probability(self) -> Tensor:
        """P(z != 0) = sigmoid(log_alpha - beta * log(-gamma / zeta)), (n,)."""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-self.gamma / self.zeta))

    def _stretch(self, s: Tensor) -> Tensor:
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """X times the gates along `dim`, shape of x."""
        dim = self.dim % x.dim()
        shape = [1] * x.dim()
        shape[dim] = self.n
        if not self.training:
            return x * self.test_gate().to(x.dtype).view(shape)
        if self.per_sample:
            shape[0] = x.shape[0]
        return x * self.sample(shape[0]).to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        """Size and open gates for `print(model)`."""
        with torch.no_grad():
            return f"{self.n}, dim={self.dim}, open={int((self.test_gate() > 0).sum())}"


def add_gates_(
    model: nn.Module,
    targets: Sequence[Target],
    example_inputs: Tensor | Sequence[Any] | None = None,
    *,
    on: On = "output",
    droprate: float = 0.5,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, HardConcreteGate]:
    """Put a gate on the output maps or on the input maps of every target, in place.

    A gate is a submodule of its layer, `output_gate` or `input_gate`, whose log_alpha is among the
    model's parameters; a hook applies it. On the output it acts behind a batch norm that takes the
    layer's output as it is. Layers keep their names and classes.

    Args:
        model: the network.
        targets: its layers, each weight in one layer.
        example_inputs: one input tensor or the positional arguments of `model`, for one forward
            pass in evaluation mode that finds the batch norms; needed for outputs.
        on: "output": maps or units; "input": what a layer reads, for linear layers mostly.
        droprate: see `HardConcreteGate`.
        per_sample: see `HardConcreteGate`.
        generator: see `HardConcreteGate`.

    Returns:
        The new gates by layer name.

    Raises:
        ValueError: no targets, a layer with such a gate, a weight shared between layers, no
            example inputs for outputs, or a batch norm without weight; nothing is changed then.
    """
    check_choice("add_gates_", "on", on, get_args(On))
    if not targets:
        raise ValueError("add_gates_: expected at least one target, got none")
    if on == "output" and example_inputs is None:
        raise ValueError("add_gates_: expected example_inputs for gates on outputs, got None")
    attribute = f"{on}_gate"
    for t in targets:
        if attribute in t.module._modules:
            raise ValueError(f"add_gates_: expected layer {t.name!r} without {attribute}, got one")
        if len(t.owners) > 1:
            raise ValueError(
                f"add_gates_: expected unshared weights, got {', '.join(t.aliases)} sharing one"
            )
    hosts = {t: t.module for t in targets}
    if on == "output":
        assert example_inputs is not None
        hosts = _hosts(model, targets, example_inputs)
    gates = {}  # everything is checked; from here on the model changes
    for t in targets:
        gate = HardConcreteGate(
            _PARTITION[on].n_groups(t),
            -1 if isinstance(t.module, nn.Linear) else 1,
            droprate=droprate,
            per_sample=per_sample,
            generator=generator,
        ).to(t.dense.device, t.dense.dtype)
        gate.train(t.module.training)
        t.module.add_module(attribute, gate)
        host = hosts[t]
        # Plain attributes: the layer alone owns the gate, so that it is in the state dict once.
        gate.__dict__["host"] = host
        if on == "input":
            host.register_forward_pre_hook(_apply_input_gate)
        else:
            if host is not t.module:
                host.__dict__[attribute] = gate
            host.register_forward_hook(_apply_output_gate)
        gates[t.name] = gate
    return gates


def _hosts(
    model: nn.Module, targets: Sequence[Target], example_inputs: Tensor | Sequence[Any]
) -> dict[Target, nn.Module]:
    """Behind which module each target is gated: its batch norm, or the layer itself."""
    norms = find_batch_norms(model, targets, example_inputs)
    for t, norm in norms.items():
        # A norm that ends in an activation of its own is not scaled by its weight and bias.
        plain = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if not plain or norm.weight is None:
            raise ValueError(
                f"add_gates_: expected a plain batch norm with weight and bias behind {t.name!r}, "
                f"got {norm}"
            )
        names = [other.name for other in targets if norms.get(other) is norm]
        if len(names) > 1 or "output_gate" in norm.__dict__:
            raise ValueError(
                f"add_gates_: expected one layer per batch norm, got one of {', '.join(names)}"
            )
    return {t: norms.get(t, t.module) for t in targets}


def _apply_output_gate(module: Any, _args: object, output: Tensor) -> Any:
    return module.output_gate(output)


def _apply_input_gate(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.input_gate(args[0]), *args[1:])


def gate_of(t: Target, on: On = "output") -> HardConcreteGate | None:
    """The gate of a layer, None without one."""
    gate = t.module._modules.get(f"{on}_gate")
    return gate if isinstance(gate, HardConcreteGate) else None


@dataclass(frozen=True)
class L0Penalty:
    """lam * sum_g |g| * P(z_g != 0): the expected number of weights whose gate is open.

    |g| counts the entries of W behind a gate. With `decay` the weights of open gates are decayed:
    plus decay * sum_g P(z_g != 0) * ||w_g||^2 / 2. After each step log_alpha is clamped to
    [log 1e-2, log 1e2], so that a closed gate can open again. Cost: O(gates), O(entries) with
    decay.

    Attributes:
        lam: weight of the penalty, >= 0; the paper gives it divided by the number of samples.
        decay: weight decay under the gates, >= 0.

    Raises:
        TypeError: a value is not a number.
        ValueError: a value out of range.
    """

    lam: float
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_number("L0Penalty", "lam", self.lam)
        check_number("L0Penalty", "decay", self.decay)

    def penalty(self, targets: Sequence[Target]) -> Tensor:
        """The penalty of all gates; differentiable with respect to log_alpha (and W by decay).

        Raises:
            ValueError: no target has a gate.
        """
        total = zero(targets)
        gated = _gated(targets)
        if not gated:
            raise ValueError("L0Penalty: expected targets with gates, got none; call add_gates_")
        for t, gate, granularity in gated:
            # Filters and channels are groups of one size.
            each = torch.full_like(gate.log_alpha, self.lam * t.dense.numel() / gate.n)
            if self.decay:
                each = each + self.decay / 2 * granularity.reduce(t.dense.square(), t, "sum")
            total = total + (each * gate.open_probability()).sum()
        return total

    @torch.no_grad()
    def prox_(self, targets: Sequence[Target], lr: float, step: int) -> None:
        """Clamp log_alpha."""
        for _, gate, _ in _gated(targets):
            gate.log_alpha.clamp_(math.log(1e-2), math.log(1e2))


def _gated(targets: Sequence[Target]) -> list[tuple[Target, HardConcreteGate, Granularity]]:
    return [
        (t, gate, _PARTITION[on])
        for t in targets
        for on in get_args(On)
        if (gate := gate_of(t, on)) is not None
    ]


@register
@dataclass(frozen=True)
class Gates(PruneConfig):
    """The evaluation-time gate of each group; `Threshold(0)` keeps what is not exactly closed.

    Granularity "filter" (or "neuron") reads output gates, "channel" reads input gates.
    Louizos, Welling, Kingma, ICLR 2018.
    """

    def group_score(self, t: Target, granularity: Granularity, stats: Stats | None) -> Tensor:
        """Gates in [0, 1], (n_groups,).

        Raises:
            ValueError: no gate on this layer for this granularity.
        """
        for on in cast(tuple[On, ...], get_args(On)):
            gate = gate_of(t, on)
            if gate is not None and granularity == _PARTITION[on]:
                return gate.test_gate().detach()
        raise ValueError(
            f"Gates: expected gates per {granularity} on layer {t.name!r}, got none; call "
            "add_gates_ with on='output' for filters, on='input' for channels"
        )


@torch.no_grad()
def fold_gates_(model: nn.Module) -> nn.Module:
    """Multiply evaluation-time gates into weights and take the gates away, in place.

    An output gate goes into weight and bias of its batch norm, or of the layer itself without
    one; an input gate into the columns of the weight. The folded network computes what the gated
    one computes in evaluation mode, up to rounding.

    Returns:
        The model.

    Raises:
        ValueError: no gates, or a mask still on a weight; nothing is changed then.
    """
    found = [
        (name, layer, on)
        for name, layer in model.named_modules()
        for on in cast(tuple[On, ...], get_args(On))
        if isinstance(layer._modules.get(f"{on}_gate"), HardConcreteGate)
    ]
    if not found:
        raise ValueError("fold_gates_: expected a model with gates, got none")
    for name, layer, _ in found:
        if parametrize.is_parametrized(layer, "weight") or not isinstance(
            layer._parameters.get("weight"), nn.Parameter
        ):
            raise ValueError(
                f"fold_gates_: expected layer {name!r} with a plain weight, got a masked one; "
                "finalize the Pruner first"
            )
    for name, layer, on in found:
        gate = cast(HardConcreteGate, layer._modules[f"{on}_gate"])
        host = cast(nn.Module, gate.__dict__["host"])
        z = gate.test_gate()
        t = Target(layer, "weight", name, (name,), (layer,))
        if on == "input":
            t.dense.mul_(channel.expand(z, t))
            _unhook(host._forward_pre_hooks, _apply_input_gate)
        else:
            if host is layer:
                t.dense.mul_(filter_.expand(z, t))
            else:
                cast(nn.Parameter, host.weight).mul_(z)
                del host.__dict__["output_gate"]
            if host.bias is not None:
                cast(nn.Parameter, host.bias).mul_(z)
            _unhook(host._forward_hooks, _apply_output_gate)
        del layer._modules[f"{on}_gate"]
    return model


def _unhook(hooks: dict[int, Any], function: object) -> None:
    for key in [key for key, hook in hooks.items() if hook is function]:
        del hooks[key]
