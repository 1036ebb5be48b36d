"""Residual blocks and chains of convolutions, found in a recorded forward pass.

A block is a module that adds two paths from its input: convolutions with what was folded into
them, and whole modules of any kind (a squeeze-and-excitation, say) with one input and one output.
It is replaced as a whole, so that the addition and an activation after it run in the epilogue of
the last convolution. A run is convolutions each of which alone reads the one before.

Nothing is guessed from names or types of the model's own modules: only who read what counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .fold import ACTIVATIONS, has_hooks
from .record import Call, Operator, Recording, Value
from .survey import Site

_ADDITIONS = ("aten.add.Tensor", "aten.add_.Tensor")
_FUNCTIONS = {
    "aten.relu.default": "relu",
    "aten.relu_.default": "relu",
    "aten.silu.default": "silu",
    "aten.silu_.default": "silu",
    "aten.hardswish.default": "hardswish",
    "aten.hardswish_.default": "hardswish",
}


@dataclass(eq=False)
class Block:
    """A module that computes ``act(body(x) + shortcut(x))``.

    Attributes:
        name: fully qualified name of the module.
        body: the path whose last layer, a site, adds and activates; names stand for modules that
            are kept as they are.
        shortcut: the other path; empty for the identity.
        activation: after the addition, "none" for nothing.
    """

    name: str
    body: tuple[Site | str, ...]
    shortcut: tuple[Site | str, ...]
    activation: str

    @property
    def last(self) -> Site:
        """The layer that adds."""
        site = self.body[-1]
        assert isinstance(site, Site)
        return site


@dataclass(eq=False)
class _Unit:
    """One call of a convolution with what was folded into it, or of a whole module."""

    part: Site | str
    modules: frozenset[nn.Module]
    input: Value
    output: Value


def _units(sites: Sequence[Site], recording: Recording) -> list[_Unit]:
    """The convolutions that are called once and stand for themselves."""
    found = []
    for site in sites:
        folded = site.folded
        if site.left_alone or folded is None or len(site.calls) != 1 or has_hooks(site.module):
            continue
        call = site.calls[0]
        output = call.output
        # What is left where a module was folded would run between this layer and the next.
        if any(not isinstance(rest, nn.Identity) for rest in folded.replaced.values()):
            continue
        if folded.replaced:
            last = list(folded.replaced)[-1]
            output = recording.calls[last][0].output
        if call.input is not None and output is not None and call.tensors == 1:
            modules = frozenset((site.module, *folded.replaced))
            found.append(_Unit(site, modules, call.input, output))
    return found


def find_blocks(model: nn.Module, sites: Sequence[Site], recording: Recording) -> list[Block]:
    """The residual blocks of a model, innermost modules first and none inside another.

    Args:
        model: as recorded; all its modules were.
        sites: its layers, folded.
        recording: with dataflow, or nothing is found.
    """
    blocks: list[Block] = []
    if not recording.dataflow:
        return blocks
    units = _units(sites, recording)
    names = dict(model.named_modules())
    taken: set[nn.Module] = set()
    for name, module in reversed(names.items()):
        calls = recording.calls.get(module, [])
        inside = list(module.modules())
        if not name or len(inside) < 2 or len(calls) != 1 or calls[0].tensors != 1:
            continue
        if any(m in taken or has_hooks(m) for m in inside):
            continue
        block = _as_block(name, calls[0], _with_modules(name, module, units, recording), recording)
        if block is not None:
            blocks.append(block)
            taken |= set(inside)
    return blocks[::-1]


def _with_modules(
    name: str, block: nn.Module, units: Sequence[_Unit], recording: Recording
) -> list[_Unit]:
    """The units inside a block: its convolutions and, behind them, its modules of other kinds."""
    inside = set(block.modules())
    found = [unit for unit in units if unit.modules <= inside]
    for path, module in block.named_modules(prefix=name):
        calls = recording.calls.get(module, [])
        if module is block or len(calls) != 1 or calls[0].tensors != 1:
            continue
        call, modules = calls[0], frozenset(module.modules())
        if call.input is not None and call.output not in (None, call.input):
            assert call.output is not None
            found.append(_Unit(path, modules, call.input, call.output))
    return found


def _as_block(name: str, call: Call, units: Sequence[_Unit], recording: Recording) -> Block | None:
    start = call.input
    additions = [op for op in recording.operators if op.name in _ADDITIONS and call in op.stack]
    if start is None or len(additions) != 1:
        return None
    add = additions[0]
    if not add.plain or len(add.inputs) != 2 or len(add.outputs) != 1:
        return None
    activation, output = "none", add.outputs[0]
    after = [op for op in recording.operators if output in op.inputs and call in op.stack]
    if after and output is not call.output:
        activation = _activation_of(after[0])
        if not activation or len(output.readers) != 1:
            return None
        output = after[0].outputs[0]
    if output is not call.output:
        return None
    paths = [_path(value, start, units) for value in add.inputs]
    if paths[0] is None or paths[1] is None:
        return None
    shortcut, body = sorted(paths, key=lambda p: len(p or ()))
    assert body is not None and shortcut is not None
    used = [*shortcut, *body]
    if not body or len(set(used)) != len(used):
        return None
    if any(unit.output.is_output or len(_readers(unit.output)) != 1 for unit in used):
        return None
    last = body[-1].part
    if not isinstance(last, Site) or last.folded is None or last.folded.activation != "none":
        return None
    # What ran outside of the paths would be lost.
    known = frozenset().union(*(unit.modules for unit in used))
    for op in recording.operators:
        if call in op.stack and op is not add and not any(c.module in known for c in op.stack):
            if activation == "none" or op is not after[0]:
                return None
    return Block(name, tuple(u.part for u in body), tuple(u.part for u in shortcut), activation)


def _activation_of(op: Operator) -> str:
    """Name of the activation an operator computes, "" if it is none that kernels fuse."""
    for call in op.stack:
        if type(call.module) in ACTIVATIONS and not has_hooks(call.module):
            return ACTIVATIONS[type(call.module)]
    return _FUNCTIONS.get(op.name, "") if op.plain else ""


def _path(value: Value, start: Value, units: Sequence[_Unit]) -> list[_Unit] | None:
    """The units from `start` to `value`, in order; None where something else is between."""
    path: list[_Unit] = []
    while value is not start:
        unit = next((u for u in units if u.output is value), None)
        if unit is None or unit in path:
            return None
        path.insert(0, unit)
        value = unit.input
    return path


def _readers(value: Value) -> set[Call | None]:
    """The outermost readers of a value: each call counts once, loose operators as None."""
    return {next((c for c in stack if c.input is value), None) for stack in value.readers}


def find_runs(
    sites: Sequence[Site], recording: Recording, blocks: Sequence[Block]
) -> Iterator[tuple[Site, ...]]:
    """Maximal runs of two or more convolutions of which each alone reads the one before.

    A run never crosses the border of a block.
    """
    if not recording.dataflow:
        return
    units = _units(sites, recording)
    border = {part: block for block in blocks for part in (*block.shortcut, *block.body)}
    by_input = {unit.input: unit for unit in units}
    following: dict[_Unit, _Unit] = {}
    for unit in units:
        after = by_input.get(unit.output)
        if after is None or unit.output.is_output:
            continue
        assert isinstance(after.part, Site)
        alone = all(after.part.calls[0] in stack for stack in unit.output.readers)
        if alone and border.get(unit.part) is border.get(after.part):
            following[unit] = after
    heads = [unit for unit in units if unit not in following.values()]
    for unit in heads:
        run = [unit]
        while run[-1] in following:
            run.append(following[run[-1]])
        if len(run) > 1:
            yield tuple(u.part for u in run if isinstance(u.part, Site))
