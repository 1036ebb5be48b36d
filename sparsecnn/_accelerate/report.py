"""From the measurements to the report: every layer with its kernel and the reason for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..measure import LayerReport, ModelTiming, Report
from ..measure.environment import environment
from .assemble import Plan
from .chains import Chain
from .model import Outcome, Variants
from .survey import Site


def make_report(variants: Variants, outcome: Outcome, bytes_before: int) -> Report:
    """The report of a conversion; `bytes_after` is left for who applies it."""
    layers = [_layer_report(variants, site, outcome.plan) for site in variants.sites]
    images = variants.images
    parts = images // variants.layer_images
    return Report(
        layers=layers,
        before=ModelTiming.from_stats(outcome.before, images),
        after=ModelTiming.from_stats(outcome.after, images),
        bytes_before=bytes_before,
        macs=parts * sum(layer.macs for layer in layers),
        effective_macs=parts * sum(layer.effective_macs for layer in layers),
        max_abs_diff=outcome.max_abs_diff,
        layout=outcome.plan.layouts,
        notes=outcome.notes,
        environment=environment(),
    )


def _layer_report(variants: Variants, site: Site, plan: Plan) -> LayerReport:
    module = site.module if site.layer is None else site.layer.module
    weight = module._parameters.get("weight")
    shape = () if weight is None else tuple(weight.shape)
    density, per_weight = _density(module), 0
    if weight is not None:
        per_weight = sum(_uses(site, call.input_shape, call.output_shape) for call in site.calls)
    used = 0 if weight is None else weight.numel()
    macs = per_weight * used
    first = site.calls[0] if site.calls else None
    report = LayerReport(
        name=site.name,
        type=type(site.module).__name__,
        input_shape=() if first is None else first.input_shape,
        output_shape=() if first is None else first.output_shape,
        weight_shape=shape,
        density=density,
        macs=macs,
        effective_macs=0 if weight is None else round(macs * density),
        dense_ms=math.nan,
        chosen_ms=math.nan,
        kernel="dense",
        reason=site.left_alone,
    )
    if site.as_is is not None:
        report.dense_ms = report.chosen_ms = site.as_is.median_s * 1e3
    if site.choice is not None:
        _fill_choice(report, variants, site, plan)
    return report


def _fill_choice(report: LayerReport, variants: Variants, site: Site, plan: Plan) -> None:
    choice = site.choice
    assert choice is not None
    layout = plan.layout_of(site)
    kernel = choice.kernel_in(layout) if site in plan.swaps else "dense"
    stats = choice.timing(kernel, layout) or choice.times[choice.best_dense]
    report.candidates_ms = {name: s.median_s * 1e3 for name, s in choice.times.items()}
    report.dense_ms = choice.times[choice.best_dense].median_s * 1e3
    report.chosen_ms = stats.median_s * 1e3
    report.kernel = kernel
    if kernel == "dense" and isinstance(site.module, nn.Conv2d):
        report.kernel = f"dense {layout}"
    reasons = [choice.reason_in(layout)]
    if site not in plan.swaps and site.wins_in(layout):
        reasons.append(site.undone or "the original model was faster as a whole")
    folded = site.folded
    report.max_abs_diff = 0.0
    if folded is not None:
        if folded.note:
            reasons.append(folded.note)
        if folded.replaced and (site in plan.folds or site in plan.swaps):
            report.folded = tuple(variants.assembler.names[module] for module in folded.replaced)
            report.max_abs_diff = folded.max_abs_diff
            gone = _density(site.module) - report.density
            if gone >= 0.01:
                reasons.append(f"zero scales of the batch norm removed {gone:.0%} of the weights")
    if site in plan.swaps:
        # Each against the dense folded layer: the sum bounds the difference to the original one.
        report.max_abs_diff += site.built[kernel].max_abs_diff
    chain = next((c for c in plan.chains if site in c.sites), None)
    if chain is not None:
        _fill_chain(report, chain, site, layout)
        reasons[0] = report.reason
    if any(site is block.last for block in plan.blocks):
        reasons.append("adds the residual of its block")
    report.reason = "; ".join(reasons)


def _fill_chain(report: LayerReport, chain: Chain, site: Site, layout: str) -> None:
    """A chain is one call: its time stands with its first layer."""
    fused, apart = chain.times[f"chain {layout}"], chain.times[f"apart {layout}"]
    report.kernel = "chain"
    report.chosen_ms = fused.median_s * 1e3 if site is chain.sites[0] else 0.0
    names = f"{chain.sites[0].name} to {chain.sites[-1].name}"
    report.reason = (
        f"chain {names}: {fused.median_s * 1e3:.3g} ms vs {apart.median_s * 1e3:.3g} ms apart"
    )


def _density(module: nn.Module) -> float:
    weight = module._parameters.get("weight")
    if weight is None:
        return math.nan
    return int(weight.detach().count_nonzero()) / max(weight.numel(), 1)


def _uses(site: Site, inputs: Sequence[int], outputs: Sequence[int]) -> int:
    """How often one call multiplies each weight: output pixels (input ones when transposed)."""
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    spatial = weight.dim() - 2
    sides = inputs if getattr(site.module, "transposed", False) else outputs
    if spatial == 0:
        return math.prod(sides[:-1])
    batch = math.prod(sides[: len(sides) - spatial - 1])
    return batch * math.prod(sides[len(sides) - spatial :])
