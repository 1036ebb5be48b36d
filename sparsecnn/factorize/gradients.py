"""How much the loss minds a change of each weight: gradients, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecnn._models import evaluating, per_sample_gradients

from .collect import layer_of

Labelled = tuple[Any, Any]


def collect_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Labelled],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> dict[str, Tensor]:
    """Root mean square of the loss' gradients over samples: ``sqrt(mean_n (dl_n / dW_p)^2)``.

    The metric of Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting linear structure within
    convolutional networks for efficient evaluation", NIPS 2014, section 3.1, whose sum over samples
    differs by a factor; and the square root of the diagonal of the empirical Fisher information.
    Runs in evaluation mode; modes and gradients of the network stay as they are.

    Args:
        model: the network.
        names: layers, `nn.Conv2d` or `nn.Linear`.
        batches: (inputs, labels), the inputs a tensor or a tuple of the model's positional
            arguments, the labels a tensor; the first dimension of all counts samples.
        loss_fn: mean loss of outputs and labels.

    Returns:
        Name to a tensor in float64 on the CPU, shape of the weight.

    Raises:
        TypeError: batches of another kind, or a layer that is none.
        ValueError: an unknown name, masks or parametrizations, no sample, another number of labels
            than samples, or gradients that are not finite.

    Cost: a forward and a backward pass per sample, a few samples at a time; their gradients of all
    these weights are held together.
    """
    what = "collect_gradients"
    weights = {name: layer_of(model, name, what, "model").weight for name in names}
    for name, w in weights.items():
        if not isinstance(w, nn.Parameter):  # computed anew in every pass: no gradient reaches this
            raise ValueError(f"{what}: expected plain weights at {name!r}, got masked ones")
    device = next(iter(weights.values())).device if weights else torch.device("cpu")
    total = {name: torch.zeros(w.shape, dtype=torch.float64) for name, w in weights.items()}
    parameters = {f"{name}.weight".removeprefix("."): w.detach() for name, w in weights.items()}
    count = 0
    with evaluating(model):
        for arguments in _checked(batches, what, device):
            samples = len(arguments[0])
            count += samples
            for found in per_sample_gradients(model, loss_fn, parameters, arguments, samples):
                for squares, gradient in zip(total.values(), found.values(), strict=True):
                    squares += gradient.detach().to("cpu", torch.float64).square().sum(0)
    if not count:
        raise ValueError(f"{what}: expected at least one sample, got none")
    for name, squares in total.items():
        if not bool(torch.isfinite(squares).all()):
            raise ValueError(f"{what}: expected finite gradients, got NaN or infinity at {name!r}")
    return {name: (squares / count).sqrt() for name, squares in total.items()}


def _checked(
    batches: Iterable[Labelled], what: str, device: torch.device
) -> Iterator[tuple[Any, ...]]:
    """The model's positional arguments and the labels of every batch."""
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"{what}: expected batches of (inputs, labels), got {batch!r:.80}")
        inputs, labels = batch
        if not isinstance(inputs, tuple):
            inputs = (inputs,)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise TypeError(f"{what}: expected inputs to be tensors, got {batch[0]!r:.80}")
        if not isinstance(labels, Tensor):
            raise TypeError(f"{what}: expected labels to be a tensor, got {labels!r:.80}")
        if labels.shape[:1] != inputs[0].shape[:1]:
            raise ValueError(
                f"{what}: expected a label for each sample, got inputs {tuple(inputs[0].shape)} "
                f"and labels {tuple(labels.shape)}"
            )
        yield tuple(x.to(device) if isinstance(x, Tensor) else x for x in (*inputs, labels))
