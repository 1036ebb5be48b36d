"""Dropout: random zeros in the activations while training, nothing removed afterwards.

For whole maps and without a generator `torch.nn.Dropout2d` does; here are the forms that torch
lacks, and the change of rates that a pruned network wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sparsecnn._models import evaluating, positional

from .budget import check_share
from .calibration import observed
from .regularization import check_choice, check_number
from .targets import Target

Form = Literal["inverted", "weight_scaling"]


class Dropout(nn.Module):
    """Zeroes every entry with probability p while training.

    | form             | training          | evaluation  |
    |------------------|-------------------|-------------|
    | "inverted"       | x * r / (1 - p)   | x           |
    | "weight_scaling" | x * r             | x * (1 - p) |

    with r ~ Bernoulli(1 - p). "weight_scaling" is the paper's: evaluation is the mean network,
    the outgoing weights times 1 - p. A network in this form equals one in the other whose outgoing
    weights are 1 - p times as large. Usual rates: 0.5 for hidden units, 0.2 for inputs.
    Hinton et al. (2012, arXiv 1207.0580); Srivastava et al., JMLR 15 (2014).

    Args:
        p: drop rate in [0, 1).
        form: "inverted" or "weight_scaling".
        generator: on the device of the inputs; None is torch's default one.

    Raises:
        TypeError: p is not a number.
        ValueError: a value out of range.
    """

    def __init__(
        self,
        p: float = 0.5,
        form: Form = "inverted",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("Dropout", "form", form, get_args(Form))
        check_share(p, "p", "Dropout")
        if p == 1:
            raise ValueError("Dropout: expected p in [0, 1), got 1")
        self.p = p
        self.form = form
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Shape of x, any."""
        if self.p == 0:
            return x
        keep = 1 - self.p
        if not self.training:
            return x * keep if self.form == "weight_scaling" else x
        r = torch.rand(x.shape, generator=self.generator, device=x.device) < keep
        return x * r / keep if self.form == "inverted" else x * r

    def extra_repr(self) -> str:
        """Rate and form for `print(model)`."""
        return f"p={self.p}, form={self.form!r}"


class MultinomialDropout(nn.Module):
    """Scales unit i by m_i / (k * p_i), m ~ Multinomial(k; p_1, ..., p_d), one draw per sample.

    Units drawn more than once count more than once; the mean factor is 1 (0 where p_i = 0, such a
    unit is dropped). Evaluation is the identity. Li, Gong, Yang, "Improved Dropout for Shallow and
    Deep Learning", NIPS 2016. Cost: O(N * (d + k)) per forward pass.

    Args:
        k: number of draws, >= 1; k = d / 2 compares with a drop rate of 0.5.
        probs: (d,) weights >= 0 of the units, normalized here; kept as a buffer.
        generator: on the device of the inputs; None is torch's default one.

    Raises:
        ValueError: k or probs out of range.
    """

    probs: Tensor

    def __init__(
        self, k: int, probs: Tensor, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"MultinomialDropout: expected k to be an int >= 1, got {k!r}")
        valid = probs.dim() == 1 and bool((probs >= 0).all()) and 0 < float(probs.sum())
        if not (valid and bool(probs.isfinite().all())):
            raise ValueError(
                "MultinomialDropout: expected probs (d,), finite, >= 0 and not all 0, got shape "
                f"{tuple(probs.shape)} and sum {float(probs.sum()):g}"
            )
        self.k = k
        self.generator = generator
        self.register_buffer("probs", probs / probs.sum())

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) or (N, d, H, W), likewise out.

        Raises:
            ValueError: another shape.
        """
        _check_units(x, "MultinomialDropout", self.probs.numel())
        return _scaled(x, self.probs, self.k, self.generator) if self.training else x

    def extra_repr(self) -> str:
        """Draws and units for `print(model)`."""
        return f"k={self.k}, units={self.probs.numel()}"


class EvolutionalDropout(nn.Module):
    """Multinomial dropout whose probabilities follow the mini-batch: p_i ~ sqrt(mean(x_i^2)).

    These minimize the variance that the mask adds, sum_i E[x_i^2] * (1 - p_i) / (k * p_i). The mean
    runs over the samples, for maps also over H and W; no gradient flows through p. A batch that
    is all zero is left as it is. Evaluation is the identity. Li, Gong, Yang, NIPS 2016.
    Cost: O(N * (d + k)) and one pass over x per forward pass.

    Args:
        k_ratio: draws per unit, > 0: k = max(1, round(k_ratio * d)).
        generator: on the device of the inputs; None is torch's default one.

    Raises:
        TypeError: k_ratio is not a number.
        ValueError: k_ratio out of range.
    """

    def __init__(self, k_ratio: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_number("EvolutionalDropout", "k_ratio", k_ratio, positive=True)
        self.k_ratio = k_ratio
        self.generator = generator

    @staticmethod
    @torch.no_grad()
    def probabilities(x: Tensor) -> Tensor:
        """(d,) probabilities of the units of a batch (N, d) or (N, d, H, W); uniform if all 0."""
        others = [axis for axis in range(x.dim()) if axis != 1]
        root = x.square().mean(others).sqrt()
        total = root.sum()
        uniform = torch.full_like(root, 1 / root.numel())
        return torch.where(total > 0, root / total, uniform)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) or (N, d, H, W), likewise out.

        Raises:
            ValueError: another shape.
        """
        _check_units(x, "EvolutionalDropout", None)
        if not self.training or x.numel() == 0:
            return x
        k = max(1, round(self.k_ratio * x.shape[1]))
        return _scaled(x, self.probabilities(x), k, self.generator)

    def extra_repr(self) -> str:
        """Ratio for `print(model)`."""
        return f"k_ratio={self.k_ratio}"


def multinomial_factors(
    probs: Tensor, k: int, samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """m_i / (k * p_i) of `samples` independent multinomial draws, (samples, d)."""
    drawn = torch.multinomial(
        probs.expand(samples, -1), k, replacement=True, generator=generator
    )
    counts = torch.zeros(samples, probs.numel(), device=probs.device, dtype=probs.dtype)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=probs.dtype))
    # A unit of probability 0 is never drawn: 0 / 0 would be NaN.
    return counts / (k * torch.where(probs > 0, probs, torch.ones_like(probs)))


def _scaled(x: Tensor, probs: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    factors = multinomial_factors(probs, k, x.shape[0], generator).to(x.dtype)
    return x * factors.reshape(*factors.shape, *[1] * (x.dim() - 2))


def _check_units(x: Tensor, what: str, units: int | None) -> None:
    if x.dim() not in (2, 4) or (units is not None and x.shape[1] != units):
        wanted = "d" if units is None else units
        raise ValueError(
            f"{what}: expected x of shape (N, {wanted}) or (N, {wanted}, H, W), got "
            f"{tuple(x.shape)}"
        )


def rescale_dropout_(
    model: nn.Module,
    targets: Sequence[Target],
    example_inputs: Tensor | Sequence[Any],
    rates: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Lower the drop rates of a pruned network: D_r = D_o * sqrt(C_r / C_o), in place.

    C_o counts the weights of the layer that reads the dropped activations and C_r those that are
    not zero: a sparser layer overfits less. A dropout belongs to the target called next after it.
    Han et al., "Deep Compression", ICLR 2016.

    Args:
        model: the network; masks count, they need not be finalized.
        targets: its pruned layers; `find_targets(model, include_classifier=True)`.
        example_inputs: one input tensor or the positional arguments of `model`, for one forward
            pass in evaluation mode that finds the order of calls.
        rates: D_o by module name, as the first call returned them; None takes the rates of now.
            Without them a second call would scale what is scaled already.

    Returns:
        D_o of every dropout that a target follows.

    Raises:
        ValueError: no such dropout, or `rates` of other modules; nothing is changed then.
    """
    args = positional(example_inputs)
    dropouts = {m: n for n, m in model.named_modules() if isinstance(m, (_DropoutNd, Dropout))}
    layers = {owner: t for t in targets for owner in t.owners}
    calls: list[nn.Module] = []
    with (
        evaluating(model),
        torch.no_grad(),
        observed([*dropouts, *layers], lambda module, _args, _output: calls.append(module)),
    ):
        model(*args)
    readers: dict[str, tuple[_DropoutNd | Dropout, Target]] = {}
    waiting: list[_DropoutNd | Dropout] = []
    for module in calls:
        if isinstance(module, (_DropoutNd, Dropout)):
            waiting.append(module)
            continue
        for dropout in waiting:
            readers.setdefault(dropouts[dropout], (dropout, layers[module]))
        waiting = []
    if not readers:
        raise ValueError("rescale_dropout_: expected a dropout in front of a target, got none")
    if rates is None:
        rates = {name: float(dropout.p) for name, (dropout, _) in readers.items()}
    if sorted(rates) != sorted(readers):
        raise ValueError(
            f"rescale_dropout_: expected rates of {', '.join(sorted(readers))}, got "
            f"{', '.join(sorted(rates))}"
        )
    for name, (dropout, t) in readers.items():
        density = int(t.weight.count_nonzero()) / t.dense.numel()
        dropout.p = rates[name] * density**0.5
    return dict(rates)
