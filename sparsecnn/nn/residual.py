"""A residual block whose addition and activation run in the epilogue of its last layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``y = act(body(x) + shortcut(x))``: the last layer of the body adds and activates.

    The unfused block writes the body's output, reads it and the shortcut, and writes their sum:
    three passes over memory that the epilogue saves. ``act`` is the activation of the last layer.

    Args:
        body: layers in order, at least one; the last must take ``(x, residual)`` as
            ``FusedConv2d`` and the package's other convolutions do.
        shortcut: layers in order; none for the identity.

    Raises:
        ValueError: the body is empty.
    """

    def __init__(self, body: Iterable[nn.Module], shortcut: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*shortcut)
        if not len(self.body):
            raise ValueError("ResidualBlock: expected body with at least one layer, got none")

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, P, Q)``."""
        residual = self.shortcut(x)
        *first, last = self.body
        for layer in first:
            x = layer(x)
        y: Tensor = last(x, residual)
        return y
