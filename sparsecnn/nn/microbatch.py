"""A batch in parts: a model that takes a few images at a time through all of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class _Microbatches:
    """The forward of a module, run on one part of the batch after the other; pickles and copies."""

    def __init__(self, module: nn.Module, images: int) -> None:
        self.module = module
        self.images = images

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, for those who ask before they call."""
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:
        return type(self.module).forward.__code__  # torch.export names its place in the source

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        forward = type(module).forward
        # Statistics over a batch need all of it, and a traced batch size would become a constant.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if module.training or traced or torch.compiler.is_compiling():
            return forward(module, *args, **kwargs)
        values, spec = tree_flatten((args, kwargs))
        batch = _batch_of(values)
        if batch <= self.images:
            return forward(module, *args, **kwargs)
        parts = []
        for start in range(0, batch, self.images):
            part = [
                v[start : start + self.images] if isinstance(v, Tensor) else v for v in values
            ]
            inner_args, inner_kwargs = tree_unflatten(part, spec)
            parts.append(forward(module, *inner_args, **inner_kwargs))
        return _joined(parts, self.images)


def _batch_of(values: Sequence[Any]) -> int:
    """The size of the first axis of all tensors, or 0 where they do not share one."""
    sizes = {v.shape[0] if v.dim() else 0 for v in values if isinstance(v, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def _joined(parts: Sequence[Any], images: int) -> Any:
    """The outputs of the parts, tensor by tensor one after the other; the last may be smaller."""
    flat = [tree_flatten(part) for part in parts]
    for values, _ in flat[:-1]:
        for value in values:
            if not isinstance(value, Tensor) or value.shape[:1] != (images,):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"microbatch_: expected outputs whose first axis is the batch, got {got} for "
                    f"{images} images; undo with microbatch_(model, None)"
                )
    columns = zip(*(values for values, _ in flat), strict=True)
    return tree_unflatten([torch.cat(column) for column in columns], flat[0][1])


def is_microbatched(module: nn.Module) -> bool:
    """Whether the module takes its batch in parts."""
    return isinstance(module.__dict__.get("forward"), _Microbatches)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody else gave this very object a `forward`, which would be lost."""
    return "forward" in module.__dict__ and not is_microbatched(module)


def microbatch_(module: nn.Module, images: int | None) -> nn.Module:
    """Make a module take at most so many images at a time, in place.

    A large batch streams every activation through main memory; a few images stay in the caches from
    layer to layer ("depth first"). The results are those of the whole batch for any module that
    treats images independently, as networks in evaluation mode do. In training mode and while
    `torch.compile`, `torch.export` or `torch.jit.trace` looks, the whole batch runs at once.

    Every tensor among the arguments is cut along its first axis, if all have the same there (else
    nothing is cut), and the outputs, tensors or nested tuples, lists and dicts of them, are
    concatenated. Hooks of the module run once, those of inner modules once for every part. A second
    call replaces the first. `sparsecnn.accelerate` decides by measurement; `save` and `load` keep
    it.

    Args:
        module: any module.
        images: largest part; None to run whole batches again.

    Raises:
        TypeError: `module` is no module or `images` no int.
        ValueError: `images` < 1, or the module has a `forward` of its own instance.

    Cost: some microseconds per part, and a copy of the outputs.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"microbatch_: expected module to be an nn.Module, got {type(module).__name__}"
        )
    if images is not None and (isinstance(images, bool) or not isinstance(images, int)):
        raise TypeError(f"microbatch_: expected images to be an int or None, got {images!r}")
    if images is not None and images < 1:
        raise ValueError(f"microbatch_: expected images >= 1, got {images}")
    if images is not None and has_own_forward(module):
        raise ValueError(
            "microbatch_: expected module without a forward of its own instance, got "
            f"{type(module).__name__} with one"
        )
    if is_microbatched(module):
        del module.__dict__["forward"]
    if images is not None:
        module.__dict__["forward"] = _Microbatches(module, images)
    return module


def microbatches(model: nn.Module) -> dict[str, int]:
    """The modules that take their batch in parts: name -> images of a part, parents first."""
    return {
        name: module.__dict__["forward"].images
        for name, module in model.named_modules()
        if is_microbatched(module)
    }
