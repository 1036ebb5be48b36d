"""What passes over a whole model share: its mode, its inputs, its names, a progress bar."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

CHUNK = 16  # samples whose gradients of all weights are held at a time


def positional(example_inputs: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """The positional arguments of a model from one input tensor or all of them."""
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in evaluation mode and restore the mode of every module afterwards.

    `model.train(was_training)` would not do: users freeze single layers (a batch norm in eval
    mode inside a training model), so the flag of each module is remembered on its own.

    Args:
        model: the network; shared submodules are fine.

    Yields:
        The same model, in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def progress_bar(shown: bool, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, if wanted; the function it yields advances it by one."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def per_sample_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    weights: dict[str, Tensor],
    arguments: tuple[Any, ...],
    samples: int,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the losses of some samples at a time, (samples, shape of W) by name.

    Args:
        model: the network, in evaluation mode; its own gradients stay as they are.
        loss_fn: mean loss of outputs and labels.
        weights: by their names as parameters of the model.
        arguments: the model's positional arguments, then the labels; the first dimension of
            tensors counts samples.
        samples: how many.
    """

    def loss(values: dict[str, Tensor], *sample: Any) -> Tensor:
        one = [x[None] if isinstance(x, Tensor) else x for x in sample]  # a batch of one
        return loss_fn(functional_call(model, values, tuple(one[:-1])), one[-1])

    gradient = grad(loss)
    rows = tuple(0 if isinstance(x, Tensor) else None for x in arguments)
    batched = vmap(gradient, in_dims=(None, *rows))
    for start in range(0, samples, CHUNK):
        stop = min(start + CHUNK, samples)
        part = [x[start:stop] if isinstance(x, Tensor) else x for x in arguments]
        try:
            yield batched(weights, *part)
        except RuntimeError:
            # Control flow that looks at values cannot run for several samples at once.
            for n in range(stop - start):
                sample = [x[n] if isinstance(x, Tensor) else x for x in part]
                yield {name: g[None] for name, g in gradient(weights, *sample).items()}


def refuse_sparse_layers(model: nn.Module, what: str) -> None:
    """Refuse a model whose layers were already swapped for sparse ones.

    Raises:
        ValueError: a module's class has a true attribute `is_sparsecnn_layer`; pruning
            and factorization come before the kernel swap: such a layer's form is fixed.
    """
    swapped = [
        f"{name or '(model)'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if getattr(type(module), "is_sparsecnn_layer", False)
    ]
    if swapped:
        shown = ", ".join(swapped[:5]) + (", ..." if len(swapped) > 5 else "")
        raise ValueError(
            f"{what}: expected model without swapped sparse layers, got {len(swapped)}: {shown}; "
            "call sc.densify(model) first"
        )


def match_names(pattern: object, names: Collection[str], what: str, kind: str) -> list[str]:
    """The names that a name or "re:<regular expression>" addresses, in their order.

    Args:
        pattern: a name, or "re:" and an expression that must match a name in full.
        names: where to look.
        what: start of the error message.
        kind: what the names are, with its article.

    Raises:
        TypeError: `pattern` is not a string.
        ValueError: nothing matches (near matches are listed) or the expression is invalid.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"{what}: expected a layer name, got {pattern!r}")
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(
                f"{what}: expected a valid regular expression, got {pattern!r} ({error})"
            ) from None
        found = [name for name in names if expression.fullmatch(name)]
        if not found:
            raise ValueError(
                f"{what}: expected a pattern that matches a layer in full, got {pattern!r}; "
                f"{_near(pattern[3:], names)}"
            )
        return found
    if pattern not in names:
        raise ValueError(
            f"{what}: expected the name of {kind}, got {pattern!r}; {_near(pattern, names)}"
        )
    return [pattern]


def _near(name: str, names: Collection[str]) -> str:
    """Remedy for an unknown name: inner layers of a block, close spellings, or all names."""
    inner = [known for known in names if known.startswith(f"{name}.")]
    if inner:
        return f"it is a block, use 're:{re.escape(name)}\\..*' for its {len(inner)} layers"
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(repr(known) for known in close) + "?"
    some = list(names)[:8]
    rest = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
    return "known layers: " + ", ".join(repr(known) for known in some) + rest
