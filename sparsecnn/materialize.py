"""From masks to a network that is smaller and faster: remove, pack, measure.

A mask alone changes neither size nor speed. `materialize` removes physically what can go without
changing the outputs (whole filters, channels nobody reads), and lets `accelerate` give every other
layer the form of its zeros that was measured to be fastest: columns, kernels and vectors
(`pattern_conv2d`), single weights (`csr_conv2d`), the Winograd domain, or dense.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._accelerate.copy import bake_, duplicate
from .accelerate import accelerate
from .measure import Report
from .prune import Pruner
from .prune.zeroed import remove_zeroed_

__all__ = ["materialize"]


def materialize(
    model: nn.Module | Pruner, example: Tensor | tuple[Tensor, ...], **options: Any
) -> nn.Module:
    """Return a smaller and faster copy of a pruned network for inputs like `example`.

    Args:
        model: a network with zeros or masks of any tool in its weights, or the `Pruner` that
            holds them; not changed.
        example: see `accelerate`: real batch size, image size, dtype and device.
        options: of `accelerate`.

    Returns:
        A new module in evaluation mode with the attribute `report`; what was removed, and what
        could not be and why, is in `report.notes`.

    Raises:
        TypeError: see `accelerate`.
        ValueError: see `accelerate`.

    Its outputs are those of the masked network within the bound of `accelerate`.
    """
    source = model.model if isinstance(model, Pruner) else model
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"materialize: expected model to be a torch.nn.Module or a Pruner, got {source!r:.80}"
        )
    smaller = duplicate(source, share=False).eval()
    bake_(smaller)
    removed = remove_zeroed_(smaller, example)
    fast = accelerate(smaller, example, **options)
    assert isinstance(fast.report, Report)
    fast.report.notes += [
        f"removed: {name} has {new} of {old} filters" for name, (old, new) in removed.layers.items()
    ]
    fast.report.notes += [f"not removed: {name}: {why}" for name, why in removed.kept.items()]
    return fast
