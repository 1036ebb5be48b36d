"""Suite `models`: whole networks with masked random weights, accelerated against eager PyTorch.

The accelerated network may take a large batch in parts, which stay in the caches; so that the gain
of that alone is not counted for the kernels, eager PyTorch is timed in parts too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.suite import LAYOUTS, Settings
from bench.timing import Run, measure
from sparsecnn.accelerate import accelerate
from sparsecnn.nn import microbatch_
from tests.models import create

NAMES = ("resnet50", "vgg16", "mobilenetv2_100")
QUICK = ("mobilenetv2_100",)
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
QUICK_DENSITIES = (0.1,)
# Images of a part in which a larger batch goes through eager PyTorch as well.
EAGER_PART = 4
# Folding and other summation orders move outputs by a few roundings per layer.
MAX_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def maskable(name: str, model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that get zeros: all but the first; of MobileNetV2 only the 1x1 ones.

    Args:
        name: of the model.
        model: the network.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
    if name.startswith("mobilenet"):
        return [m for m in convolutions if m.kernel_size == (1, 1) and m.groups == 1]
    return convolutions


def mask_(name: str, model: nn.Module, sparsity: float, *, seed: int = 0) -> float:
    """Zero a random, exact share of every maskable convolution, in place.

    Args:
        name: of the model.
        model: the network.
        sparsity: share of zeros.
        seed: of the choice.

    Returns:
        Share of zeros over all weights of convolutions.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for conv in maskable(name, model):
            size = conv.weight.numel()
            drop = torch.randperm(size, generator=generator)[: round(sparsity * size)]
            conv.weight.view(-1)[drop.to(conv.weight.device)] = 0
            # Keep the variance of the outputs, so that deep networks stay in range.
            conv.weight.mul_((1 - sparsity) ** -0.5)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    total = sum(w.numel() for w in weights)
    return 1 - sum(int(w.count_nonzero()) for w in weights) / total


def eager_factory(model: nn.Module, x: Tensor, layout: str, part: int | None) -> Callable[[], Run]:
    """Eager PyTorch with weights and input in one layout, in parts of the batch if asked to."""

    def make() -> Run:
        form = LAYOUTS[layout]
        model.to(memory_format=form)  # type: ignore[call-overload]
        image = x.clone(memory_format=form)
        root = microbatch_(copy.copy(model), part)
        return lambda: root(image)

    return make


def model_factory(model: nn.Module, x: Tensor) -> Callable[[], Run]:
    """A model as it is; an accelerated one brings its input into its own layout."""
    return lambda: lambda: model(x)


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure every network at every sparsity, on images of 224 x 224; one row at a time.

    Raises:
        AssertionError: the accelerated model computes something else.
    """
    batch, device = settings.batch, settings.device
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    x = x.to(device, settings.dtype)
    for name in settings.names:
        for density in settings.densities:
            sparsity = round(1 - density, 6)
            # Two eager copies: a layout is a property of the weights, so each needs its own.
            eager = {}
            for layout in LAYOUTS:
                model = create(name).to(device, settings.dtype)
                total = mask_(name, model, sparsity)
                eager[layout] = model
            fast = accelerate(eager["contiguous"], x)
            with torch.inference_mode():
                want, got = eager["contiguous"](x), fast(x)
            error = float((got - want).abs().max())
            scale = float(want.abs().max())
            limit = MAX_RELATIVE_ERROR[settings.dtype] * scale
            assert error <= limit, f"{name} at {sparsity}: {error} of {scale}"
            parts = (None, EAGER_PART) if batch > EAGER_PART and device == "cpu" else (None,)
            contestants = {
                f"dense {layout}" + (f" by {part}" if part else ""): eager_factory(
                    model, x, layout, part
                )
                for layout, model in eager.items()
                for part in parts
            }
            contestants["sparsecnn"] = model_factory(fast, x)
            stats = measure(
                contestants,
                runs=settings.runs,
                warmup=3,
                min_time_s=0,
                max_time_s=settings.max_time_s,
                settle=0,
                device=device,
                graph_calls=1,
            )
            ms = {key: s.median_s * 1e3 for key, s in stats.items()}
            best_dense = min((key for key in ms if key != "sparsecnn"), key=ms.__getitem__)
            kernels: dict[str, int] = {}
            for layer in fast.report.layers:  # type: ignore[union-attr]
                kernels[layer.kernel] = kernels.get(layer.kernel, 0) + 1
            yield {
                "case": name,
                "label": f"{name} ({100 * total:.0f} % of conv weights are zero)",
                "sparsity": sparsity,
                "batch": batch,
                "ms": ms,
                "spread": {key: s.iqr_s / s.median_s for key, s in stats.items()},
                "runs": min(s.runs for s in stats.values()),
                "best": "sparsecnn",
                "best_dense": best_dense,
                "ratios": {"sparsecnn": ms[best_dense] / ms["sparsecnn"]},
                "ratio": ms[best_dense] / ms["sparsecnn"],
                "kernels": kernels,
                "max_abs_error": error,
            }
