"""One recorded forward pass: which module feeds which, seen from outside, without tracing.

Hooks mark where the calls of the interesting modules begin and end; a dispatch mode sees every
operator and notes, for each tensor it reads, inside which calls that happened. The result says
for each output of a convolution who reads it, and so whether a batch norm is its *only* reader.
An operator that writes in place starts a new value of its tensor, so `relu_(y)` reads the old
value and later readers of `y` read the new one.

What such a recording cannot see is control flow that depends on the data, and Python code that
keeps a tensor without an operator reading it. Models with either give a wrong folding only if the
example does not show it; the outputs on the example are compared afterwards in any case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(eq=False)
class Value:
    """What a tensor holds between two writes to it.

    Attributes:
        readers: for each operator that read it, the recorded calls it happened inside of,
            outermost first.
        is_output: whether the model returned it.
        owner: the module whose parameter it is.
    """

    readers: list[tuple[Call, ...]] = field(default_factory=list)
    is_output: bool = False
    owner: nn.Module | None = None


@dataclass(eq=False)
class Operator:
    """One operator of the forward pass.

    Attributes:
        name: as in "aten.add.Tensor".
        stack: the recorded calls it happened inside of, outermost first.
        inputs: values it read, in the order of its arguments.
        outputs: values it gave.
        plain: whether its arguments that are not tensors have their default values.
    """

    name: str
    stack: tuple[Call, ...]
    inputs: list[Value]
    outputs: list[Value]
    plain: bool


@dataclass(eq=False)
class Call:
    """One call of a recorded module: what came in and what went out.

    Attributes:
        module: what was called.
        input: the first tensor among the arguments, as it was on entry.
        input_shape: of that tensor.
        input_dtype: likewise.
        input_channels_last: likewise.
        tensors: how many tensors came in.
        output: what it returned, if that was one tensor.
        output_shape: of that tensor.
    """

    module: nn.Module
    input: Value | None
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype | None
    input_channels_last: bool
    tensors: int = 1
    output: Value | None = None
    output_shape: tuple[int, ...] = ()


@dataclass
class Recording:
    """The calls of one forward pass and the tensors the model returned.

    Attributes:
        calls: recorded module -> its calls, in order of the first call.
        foreign: modules with a parameter that was read outside of their own calls.
        outputs: every tensor in the model's return value, in a fixed order.
        dataflow: whether readers were recorded; without them nothing may be folded.
        operators: in the order they ran; empty without dataflow.
    """

    calls: dict[nn.Module, list[Call]]
    foreign: set[nn.Module]
    outputs: list[Tensor]
    dataflow: bool
    operators: list[Operator] = field(default_factory=list)


def record(
    model: nn.Module,
    example: tuple[Tensor, ...],
    modules: Iterable[nn.Module],
    *,
    dataflow: bool = True,
) -> Recording:
    """Run `model` once on `example` and record the calls of `modules`.

    Args:
        model: in evaluation mode; gets hooks for the length of the call.
        example: positional inputs.
        modules: those to record.
        dataflow: also record who reads what (needs a dispatch mode, which not every operator
            supports).

    Raises:
        Exception: whatever the forward pass raises.

    Cost: one forward pass plus some microseconds per operator.
    """
    recorder = _Recorder()
    handles: list[RemovableHandle] = []
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                recorder.own(parameter, module)
        # First after the call, last before it: between the two is the module's own forward.
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave, prepend=True, always_call=True))
    try:
        with torch.no_grad():
            if dataflow:
                with _Readers(recorder):
                    result = model(*example)
            else:
                result = model(*example)
    finally:
        for handle in handles:
            handle.remove()
    outputs = list(tensors_in(result))
    for tensor in outputs:
        recorder.value(tensor).is_output = True
    return Recording(recorder.calls, recorder.foreign, outputs, dataflow, recorder.operators)


class _Recorder:
    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Call]] = {}
        self.foreign: set[nn.Module] = set()
        self.operators: list[Operator] = []
        self._stack: list[Call] = []
        # Weak, so that activations are freed as in any other forward pass.
        self._values: MutableMapping[Tensor, Value] = WeakTensorKeyDictionary()

    def own(self, parameter: Tensor, module: nn.Module) -> None:
        value = self.value(parameter)
        if value.owner is not None and value.owner is not module:
            self.foreign |= {value.owner, module}
        value.owner = module

    def value(self, tensor: Tensor) -> Value:
        value = self._values.get(tensor)
        if value is None:
            value = Value()
            self._values[tensor] = value
        return value

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = list(tensors_in((args, kwargs)))
        first = given[0] if given else None
        call = Call(
            module=module,
            input=None if first is None else self.value(first),
            input_shape=() if first is None else tuple(first.shape),
            input_dtype=None if first is None else first.dtype,
            input_channels_last=first is not None and is_channels_last(first),
            tensors=len(given),
        )
        self.calls.setdefault(module, []).append(call)
        self._stack.append(call)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._stack.pop()
        if isinstance(output, Tensor):
            call.output = self.value(output)
            call.output_shape = tuple(output.shape)

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operator:
        """Note what an operator is going to read and to overwrite."""
        stack = tuple(self._stack)
        inputs = [self.value(tensor) for tensor in tensors_in((args, kwargs))]
        for value in inputs:
            value.readers.append(stack)
            if value.owner is not None and not any(c.module is value.owner for c in stack):
                self.foreign.add(value.owner)
        plain = True
        for index, argument in enumerate(func._schema.arguments):
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_in(given):
                    self._values[tensor] = Value()
            elif not isinstance(given, Tensor) and given is not None:
                plain &= bool(given == argument.default_value)
        operator = Operator(str(func), stack, inputs, [], plain)
        self.operators.append(operator)
        return operator


class _Readers(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = self._recorder.before(func, args, kwargs)
        result = func(*args, **kwargs)
        operator.outputs += [self._recorder.value(tensor) for tensor in tensors_in(result)]
        return result


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-d tensor is stored channels-last and not contiguous as well."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def tensors_in(value: Any, depth: int = 8) -> Iterator[Tensor]:
    """Every tensor in nested containers, dataclasses and plain objects, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, bytes, int, float, nn.Module)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name, None), depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for item in vars(value).values():
            yield from tensors_in(item, depth - 1)
