"""Where a model may change its memory layout: places that the whole dataflow passes through.

One layout is rarely the best everywhere: a dense first layer and pooling want channels_last, sparse
layers behind them contiguous planes. A cut is a module whose input is all that the modules after it
get from those before it, so that one conversion of that input changes the layout of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .blocks import Block
from .fold import has_hooks
from .record import Recording, Value
from .survey import Site


@dataclass(frozen=True)
class Cut:
    """A place to change the layout.

    Attributes:
        name: module whose input is converted.
        after: sites that run behind it.
    """

    name: str
    after: frozenset[Site]


def find_cuts(
    model: nn.Module, sites: Sequence[Site], recording: Recording, blocks: Sequence[Block]
) -> list[Cut]:
    """The cuts of a model, none inside a block; right before a site where there is a choice.

    Args:
        model: as recorded.
        sites: its layers.
        recording: with dataflow, or nothing is found.
        blocks: of the model, which are replaced as a whole.
    """
    order: dict[nn.Module, int] = {}  # position of the first operator of every module
    for position, operator in enumerate(recording.operators):
        for call in operator.stack:
            order.setdefault(call.module, position)
    # Operators that gave a value, and that read it last.
    born: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for position, operator in enumerate(recording.operators):
        for value in operator.inputs:
            last[value] = position
        for value in operator.outputs:
            born.setdefault(value, position)
    cuts: dict[frozenset[Site], Cut] = {}
    inside = tuple(f"{block.name}." for block in blocks)
    seen: set[Value] = set()
    for name, module in model.named_modules():
        calls = recording.calls.get(module, [])
        if (
            not name
            or name.startswith(inside)
            or len(calls) != 1
            or has_hooks(module)
            or module not in order
        ):
            continue
        call = calls[0]
        if call.tensors != 1 or len(call.input_shape) != 4 or call.input is None:
            continue
        start = order[module]
        crossing = [
            value
            for value, position in born.items()
            if position < start and (value.is_output or last.get(value, -1) >= start)
        ]
        outside = any(
            call.input in operator.inputs and call not in operator.stack
            for operator in recording.operators[start:]
        )
        if crossing != [call.input] or outside or call.input in seen:
            continue
        seen.add(call.input)
        after = frozenset(s for s in sites if order.get(s.module, -1) >= start)
        if after and len(after) < len(sites):
            cuts[after] = Cut(name, after)
    return list(cuts.values())
