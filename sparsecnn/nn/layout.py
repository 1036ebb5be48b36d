"""The memory format a whole model runs in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class _InputLayout:
    """Forward pre-hook bringing 4-d inputs into one memory format; a class, so that it pickles."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            a.contiguous(memory_format=LAYOUTS[self.layout])
            if isinstance(a, Tensor) and a.dim() == 4
            else a
            for a in args
        )


def apply_layout_(model: nn.Module, layout: str) -> nn.Module:
    """Make a model run in one memory format, in place.

    Dense 4-d parameters are stored in the format, and a forward pre-hook on the model converts its
    4-d inputs; from there on the layers propagate it. A second call replaces the first.

    Args:
        model: any module.
        layout: ``"contiguous"`` or ``"channels_last"``.

    Raises:
        ValueError: another layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"apply_layout_: expected layout one of {', '.join(LAYOUTS)}, got {layout!r}"
        )
    # A layer that keeps its weight in an order of its own computes in either format.
    own = {
        id(tensor)
        for module in model.modules()
        if getattr(module, "keeps_memory_format", False)
        for tensor in (*module.parameters(), *module.buffers())
    }
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4 and id(tensor) not in own:
            tensor.data = tensor.data.contiguous(memory_format=LAYOUTS[layout])
    return convert_input_(model, layout)


def input_layouts(model: nn.Module) -> dict[str, str]:
    """The modules that bring their inputs into a memory format: name -> which, parents first."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        layout = module.__dict__.get("_sparsecnn_layout")
        if layout is not None:
            found[name] = layout
    return found


def convert_input_(module: nn.Module, layout: str | None) -> nn.Module:
    """Make a module bring its 4-d inputs into one memory format, in place.

    A conversion where the input already has the format costs a microsecond. A second call replaces
    the first.

    Args:
        module: any module.
        layout: ``"contiguous"`` or ``"channels_last"``; None to take inputs as they are again.

    Raises:
        ValueError: another layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(
            f"convert_input_: expected layout one of {', '.join(LAYOUTS)}, got {layout!r}"
        )
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _InputLayout):
            del module._forward_pre_hooks[key]
    module.__dict__.pop("_sparsecnn_layout", None)
    if layout is not None:
        module.register_forward_pre_hook(_InputLayout(layout))
        module._sparsecnn_layout = layout  # type: ignore[assignment]
    return module
