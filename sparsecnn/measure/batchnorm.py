"""Batch norm statistics measured anew: pruning and factorization change what they describe.

A compressed network with the running means and variances of the dense one loses accuracy that no
weight is to blame for; a pass over some training data gives it back without training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecnn._models import evaluating


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, momentum: float | None = None
) -> nn.Module:
    """Estimate the running statistics of every batch norm from data, in place.

    ``running_mean = mean over batches of mean(x)``, ``running_var = mean over batches of the
    unbiased var(x)``, per channel. Only batch norms are in training mode for the pass: dropout is
    off, nothing is random. Parameters, gradients, modes and momenta are left as they were. A batch
    norm that no batch reaches keeps its statistics. Under torch.distributed every rank passes its
    own batches and all get the average over all of them.

    Args:
        model: the network, e.g. after `prune_`.
        batches: inputs without labels; each a tensor (N, C, H, W) or a tuple of the positional
            arguments of `model`, on its device.
        momentum: None: an average over the batches and nothing else. A number in (0, 1]: a moving
            average onward from the present statistics, each batch with that weight.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module or a batch is neither a tensor nor a tuple.
        ValueError: no batch norm with running statistics, a momentum out of range, or no batch
            that reaches one. The statistics are as before then, and after any other error too.

    Cost: one forward pass over the batches.
    """
    norms = _checked_norms(model, momentum)
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [{name: getattr(norm, name).clone() for name in names} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.momentum = momentum
                if momentum is None:
                    norm.reset_running_stats()
            for batch in batches:
                if not isinstance(batch, (Tensor, tuple)):
                    raise TypeError(
                        "recalibrate_batchnorm: expected batches of tensors or tuples of inputs, "
                        f"got {type(batch).__name__}"
                    )
                model(*(batch if isinstance(batch, tuple) else (batch,)))
        reached = 0
        for norm, old in zip(norms, before, strict=True):
            start = 0 if momentum is None else int(old["num_batches_tracked"])
            calls = _average_over_ranks_(norm, start)
            reached += calls
            if not calls:
                _restore_(norm, old)
        if not reached:
            raise ValueError(
                "recalibrate_batchnorm: expected batches that reach a batch norm, got none"
            )
    except BaseException:
        for norm, old in zip(norms, before, strict=True):
            _restore_(norm, old)
        raise
    finally:
        for norm, value in zip(norms, momenta, strict=True):
            norm.momentum = value
    return model


def _checked_norms(model: nn.Module, momentum: float | None) -> list[_BatchNorm]:
    """The batch norms that keep statistics, after all checks that need no data."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"recalibrate_batchnorm: expected model to be a torch.nn.Module, got {model!r:.80}"
        )
    number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool)
    if momentum is not None and not (number and 0 < momentum <= 1):
        raise ValueError(
            f"recalibrate_batchnorm: expected momentum None or in (0, 1], got {momentum!r}"
        )
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        raise ValueError(
            "recalibrate_batchnorm: expected model with a batch norm that keeps running "
            f"statistics, got none in {type(model).__name__}; were they folded?"
        )
    return norms


def _restore_(norm: _BatchNorm, old: dict[str, Tensor]) -> None:
    for name, value in old.items():
        getattr(norm, name).copy_(value)


def _average_over_ranks_(norm: _BatchNorm, start: int) -> int:
    """Average the statistics of all ranks, each with the weight of its batches.

    Returns:
        How many batches reached the layer, on all ranks.
    """
    mean, var, tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and var is not None and tracked is not None
    calls = int(tracked) - start
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return calls
    # One collective a layer; a rank without batches has weight 0 and takes part all the same.
    weighted = torch.cat([mean, var, mean.new_ones(1)]).double() * calls
    torch.distributed.all_reduce(weighted)
    total = round(weighted[-1].item())
    if total:
        mean.copy_(weighted[: mean.numel()] / total)
        var.copy_(weighted[mean.numel() : -1] / total)
        tracked.fill_(start + total)
    return total
