"""Make a pruned model faster: fold, measure every candidate per layer, keep dense where it wins.

The steps, each undone where it does not hold:

1. Masks of `torch.nn.utils.prune` and parametrizations are baked into plain weights.
2. One recorded forward pass tells the real input of every layer and who reads its output.
3. Batch norms and activations that alone read a convolution's output are folded into it.
4. Every kernel that can run a layer is timed on the layer's real shape against the dense layer, in
   both memory layouts. A kernel must win by more than the margin and the spread.
5. Runs of dense convolutions are timed as one fused chain against the layers apart; the additions
   of residual blocks move into the last layer of the block.
6. Whole models are timed: the original, the folded one and the one with the winning kernels, in
   both layouts, and in one layout up to some module and the other behind it. The original wins
   ties.
7. On a CPU, a batch of four or more is also tried in parts of 1 to 8 images (`nn.microbatch_`),
   with the layers chosen for the whole batch and with those chosen for one image.
8. The outputs on the example must agree with the original's within `OUTPUT_BOUND`.

On CUDA, where `torch.backends.cudnn.conv.fp32_precision` is "tf32" (the default), float32 kernels
that can use TF32 are built to do so, and keep it: the dense layers beside them do the same. Results
are compared with those in full float32, within what TF32 rounds.

The recording is of one example: like `torch.export`, this assumes that the control flow of the
model does not depend on its data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ._accelerate.blocks import find_blocks, find_runs
from ._accelerate.chains import choose_chains
from ._accelerate.choice import Settings
from ._accelerate.copy import bake_, duplicate
from ._accelerate.densify import is_ours, to_dense_
from ._accelerate.kernels import CANDIDATES
from ._accelerate.layouts import find_cuts
from ._accelerate.microbatch import Found, choose_parts, one_image
from ._accelerate.model import Variants, check_folds, decide
from ._accelerate.outputs import compare
from ._accelerate.precision import dense_at_its_best, describe, strict_float
from ._accelerate.record import tensors_in
from ._accelerate.report import make_report
from ._accelerate.survey import FilterFn, Site, find_sites, fold_sites, measure_sites, record_sites
from .measure import Report
from .nn.microbatch import has_own_forward, microbatch_

__all__ = ["accelerate", "accelerate_", "densify", "densify_"]


def accelerate(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    filter_fn: FilterFn | None = None,
    candidates: Sequence[str] | None = None,
    warmup: int = 5,
    runs: int = 20,
    tie_margin: float = 0.03,
    progress: bool = False,
) -> nn.Module:
    """Return a faster copy of `model` for inference on inputs like `example`.

    The copy computes what `model.eval()` computes, within `1e-3 max |y|` in float32 (checked on
    the example), and is never slower beyond noise: the original is one of the candidates. It is
    in evaluation mode. `report` on it says what every layer runs now, and why.

    Args:
        model: any module with `nn.Conv2d` or `nn.Linear` layers; it is not changed. Zeros in the
            weights are what can be gained from; masks of `torch.nn.utils.prune` and
            parametrizations count.
        example: input (N, C, H, W) or the tuple of positional inputs, with the batch size, image
            size, dtype and device of the later use: all measurements are taken for it.
        filter_fn: `filter_fn(module, fqn) -> bool`; layers for which it is False are left as is.
        candidates: kernels to try besides dense: csr, pattern, depthwise, pointwise, winograd2,
            winograd4, and chain for runs of layers; None for all. The Winograd kernels round
            more coarsely than the others, see `ops.winograd_conv2d`.
        warmup: untimed rounds before each measurement.
        runs: timed rounds of each measurement (fewer, at least 5, where they take too long).
        tie_margin: share by which a kernel must beat the best dense layer.
        progress: show a progress bar.

    Returns:
        A new module that shares no tensor with `model`, with the attribute `report`.

    Raises:
        TypeError: an argument has the wrong type, or the model is compiled, scripted or wrapped.
        ValueError: the model has no layer to speed up or has swapped layers already, cannot be
            copied, or does not run on the example; or an argument is out of range.

    Hooks of the model run while whole models are measured, and stay. A layer with hooks is swapped
    but nothing is folded into it.

    Cost: about 200 forward passes; ResNet-50 at batch 1 takes less than a minute. From batch 4 on
    a CPU, the same once more for one image.
    """
    inputs, settings = _check(model, example, filter_fn, candidates, warmup, runs, tie_margin)
    if hasattr(model, "report") and not isinstance(model.report, Report):
        raise ValueError(
            "accelerate: expected model without an attribute 'report', got one of type "
            f"{type(model.report).__name__}; rename it"
        )
    shadow = duplicate(model, share=True)
    result = _accelerate(shadow, inputs, filter_fn, settings, progress)
    # Everything the result shares with the user's model or with measured variants is copied here.
    return duplicate(result, share=False)


def accelerate_(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    filter_fn: FilterFn | None = None,
    candidates: Sequence[str] | None = None,
    warmup: int = 5,
    runs: int = 20,
    tie_margin: float = 0.03,
    progress: bool = False,
) -> nn.Module:
    """`accelerate` in place: the model itself gets the new layers, is baked and put in eval mode.

    Arguments and errors are those of `accelerate`. The model is changed only when everything has
    been measured: an error leaves it as it was.

    Returns:
        `model`.

    Raises:
        ValueError: in addition, the model is itself a convolution or linear layer.
    """
    inputs, settings = _check(model, example, filter_fn, candidates, warmup, runs, tie_margin)
    if isinstance(model, (_ConvNd, nn.Linear)):
        raise ValueError(
            f"accelerate_: expected model with layers inside, got a bare {type(model).__name__}, "
            "which cannot be replaced in place; use accelerate"
        )
    if hasattr(model, "report") and not isinstance(model.report, Report):
        raise ValueError(
            "accelerate_: expected model without an attribute 'report', got one of type "
            f"{type(model.report).__name__}; rename it"
        )
    return _accelerate(model, inputs, filter_fn, settings, progress)


def _accelerate(
    target: nn.Module,
    inputs: tuple[Tensor, ...],
    filter_fn: FilterFn | None,
    settings: Settings,
    progress: bool,
) -> nn.Module:
    """Measure on shadows of `target`, then apply the outcome to it; returns it or a new root."""
    notes: list[str] = []
    if any(module.training for module in target.modules()):
        text = "the model was in training mode; the result is for inference, in evaluation mode"
        warnings.warn(f"accelerate: {text}", stacklevel=3)
        notes.append(text)
    model = duplicate(target, share=True)
    baked = bake_(model)
    if baked:
        notes.append(f"masks and parametrizations of {len(baked)} tensors were baked in")
    model.eval()
    if not has_own_forward(model):
        microbatch_(model, None)
    sites = find_sites(model, filter_fn)
    device = inputs[0].device
    # Of one search, layers and: the folding check, chains, the check of the variants, two timings.
    with _progress(progress, len(sites) + 5) as step, dense_at_its_best(device):
        found = _search(model, inputs, sites, settings, step)
    first = one_image(found.variants)
    if first is not None:
        sites = find_sites(model, filter_fn)
        with _progress(progress, len(sites) + 5) as step:
            found = choose_parts(found, _search(model, first, sites, settings, step), settings)
    variants, outcome = found.variants, found.outcome
    outcome.notes[:0] = notes + describe(device, variants.images)

    report = make_report(variants, outcome, bytes_before=_stored_bytes(target))
    bake_(target)
    result = variants.apply_(target, outcome.plan)
    report.bytes_after = _stored_bytes(result)
    result.report = report  # type: ignore[assignment]
    return result


def _search(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    sites: list[Site],
    settings: Settings,
    step: Callable[[str], None],
) -> Found:
    """The best plan for a model on an example; the model is not changed, the sites are filled."""
    notes: list[str] = []
    with strict_float():
        reference = _first_run(model, inputs)
        recording = record_sites(model, inputs, sites)
    if not recording.dataflow:
        notes.append("an operator of the model does not run under a dispatch mode: nothing folded")
    stable = not compare(reference, recording.outputs)[1]
    if not stable:
        notes.append(
            "the model returns something else on every call: its outputs could not be compared, "
            "only those of single layers"
        )
    fold_sites(sites, recording)
    variants = Variants(model, inputs, reference, sites, stable)
    notes += check_folds(variants)
    step("folded")
    measure_sites(sites, settings, step)
    blocks = find_blocks(model, sites, recording)
    runs = list(find_runs(sites, recording, blocks)) if "chain" in settings.candidates else []
    chains = choose_chains(runs, settings, step)
    cuts = find_cuts(model, sites, recording, blocks)
    outcome = decide(variants, blocks, chains, cuts, settings, step)
    outcome.notes[:0] = notes
    return Found(variants, outcome)


def densify(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with every layer of this package back as a dense one.

    A convolution becomes `nn.Conv2d`, or `FusedConv2d` where an activation or the addition of a
    block was fused into it; `CSRLinear` becomes `nn.Linear` (followed by its activation in an
    `nn.Sequential` if it has one); a chain becomes an `nn.Sequential` of its stages. `FusedConv2d`
    layers stay: they are dense convolutions. Batch norms stay folded, `ResidualBlock` modules stay.
    The weight of a `WinogradConv2d` is transformed back, which rounds it (about 1e-7 of the
    largest); one pruned or trained there becomes the nearest spatial weight.

    Args:
        model: any module; one without such layers is just copied.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"densify: expected model to be an nn.Module, got {type(model).__name__}")
    copied = duplicate(model, share=False)
    return to_dense_(copied)


def densify_(model: nn.Module) -> nn.Module:
    """`densify` in place; returns `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` is itself such a layer, which cannot be replaced in place.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"densify_: expected model to be an nn.Module, got {type(model).__name__}")
    if is_ours(model):
        raise ValueError(
            f"densify_: expected model with layers inside, got a bare {type(model).__name__}, "
            "which cannot be replaced in place; use densify"
        )
    return to_dense_(model)


def _check(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    filter_fn: FilterFn | None,
    candidates: Sequence[str] | None,
    warmup: int,
    runs: int,
    tie_margin: float,
) -> tuple[tuple[Tensor, ...], Settings]:
    what = "accelerate"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: expected model to be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{what}: expected model to be a plain nn.Module, got a ScriptModule, whose layers "
            "cannot be replaced; pass the module it was made from"
        )
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrapped) or hasattr(model, "_orig_mod"):
        inside = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise TypeError(
            f"{what}: expected model without a wrapper, got {type(model).__name__}; "
            f"pass model.{inside} and wrap the result"
        )
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs) or "an empty tuple"
        raise TypeError(f"{what}: expected example to be a tensor or a tuple of them, got {kinds}")
    for x in inputs:
        if x.numel() == 0:
            raise ValueError(
                f"{what}: expected example with at least one element, got shape {tuple(x.shape)}"
            )
    _check_layers(what, model, inputs)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"{what}: expected filter_fn to be callable or None, got {type(filter_fn).__name__}"
        )
    legal = (*CANDIDATES, "chain")
    names = legal if candidates is None else candidates
    if isinstance(names, str) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{what}: expected candidates to be a sequence of names, got {names!r}")
    for name in names:
        if name not in legal:
            raise ValueError(f"{what}: expected candidates among {', '.join(legal)}, got {name!r}")
    for label, count, least in (("warmup", warmup, 0), ("runs", runs, 1)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{what}: expected {label} to be an int, got {count!r}")
        if count < least:
            raise ValueError(f"{what}: expected {label} >= {least}, got {count}")
    if isinstance(tie_margin, bool) or not isinstance(tie_margin, (int, float)):
        raise TypeError(f"{what}: expected tie_margin to be a number, got {tie_margin!r}")
    if not 0 <= tie_margin < 1:
        raise ValueError(f"{what}: expected tie_margin in [0, 1), got {tie_margin}")
    return inputs, Settings(warmup, runs, float(tie_margin), tuple(names))


def _check_layers(what: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for name, module in model.named_modules():
        if is_ours(module):
            raise ValueError(
                f"{what}: expected model with dense layers, got {type(module).__name__} at "
                f"{name!r}; call sparsecnn.densify first"
            )
    if not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()):
        raise ValueError(
            f"{what}: expected model with nn.Conv2d or nn.Linear layers, got "
            f"{type(model).__name__} with none"
        )
    for name, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"{what}: expected model with initialized parameters, got the lazy {name!r}; "
                "run the model once"
            )
    devices = {x.device for x in inputs} | {p.device for p in model.parameters()}
    if len(devices) > 1 or devices & {torch.device("meta")}:
        got = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"{what}: expected model and example on one real device, got {got}")


def _first_run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    try:
        with torch.no_grad():
            # Cloned: some models return a buffer that the next run overwrites.
            return [tensor.clone() for tensor in tensors_in(model(*inputs))]
    except Exception as error:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(
            f"accelerate: expected example that the model accepts, got {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _stored_bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@contextmanager
def _progress(show: bool, steps: int) -> Iterator[Callable[[str], None]]:
    """A function to call after each step, with what was done; draws a bar if asked to."""
    if not show:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("accelerate", total=steps)

        def step(text: str) -> None:
            bar.update(task, advance=1, description=f"accelerate: {text}")

        yield step
