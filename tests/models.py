"""Architectures of torchvision and timm beside a build of torch they were not made for.

The torchvision of a package index may be built for a CUDA torch. Beside a CPU torch its compiled
operators do not load, and its import stops at `operator torchvision::nms does not exist`, although
no classification network needs them. Declaring the names first lets the import through. With a
matching pair nothing is declared.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

_declared: list[torch.library.Library] = []  # a Library undoes its declarations when it dies


def prepare_torchvision() -> bool:
    """Make `import torchvision` and `import timm` possible; safe to call again.

    Returns:
        False where torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    if _declared:
        return True
    folder = Path(spec.origin).parent
    try:
        for library in [*folder.glob("_C.so"), *folder.glob("_C.*.so")]:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        torch.ops.torchvision.nms.default  # noqa: B018  (raises when it is not there)
        return True
    except (OSError, RuntimeError, AttributeError):
        pass
    names: set[str] = set()
    sources = [folder / "_meta_registrations.py", folder / "_autograd_registrations.py"]
    for path in [*sources, *folder.glob("ops/*.py")]:
        if path.exists():
            text = path.read_text()
            names |= set(re.findall(r"torchvision::(\w+)", text))
            names |= set(re.findall(r"torch\.ops\.torchvision\.(\w+)", text))
            names |= set(re.findall(r"register_meta\(\"(\w+)\"", text))
    declared = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            declared.define(f"{name}(Tensor x) -> Tensor")
    _declared.append(declared)
    return True


def create(name: str, *, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A network of timm with random weights, in evaluation mode.

    BatchNorm statistics are set from random images, because fresh ones let the activations of
    deep networks explode. Scales that timm starts at zero (the last norm of a residual branch) are
    set to one: folded, they would erase the convolution before them, weights and work alike.

    Args:
        name: of timm, for example "resnet50".
        seed: of the weights and the images.
        **options: of `timm.create_model`.

    Raises:
        ImportError: timm or torchvision is not installed.
    """
    if not prepare_torchvision():
        raise ImportError(
            "models: expected torchvision to be installed, got none; pip install timm"
        )
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = timm.create_model(name, pretrained=False, **options)
        model.train()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            if norm.weight is not None and not norm.weight.any():
                torch.nn.init.ones_(norm.weight)
            norm.momentum = None  # cumulative average of the calibration batches
        if norms:
            with torch.no_grad():
                for _ in range(2):
                    model(torch.randn(2, 3, 96, 96))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()
