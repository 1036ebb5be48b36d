"""Variants of the whole model, timed against each other, and what is kept in the end.

Three kinds of variant, each in both memory layouts: the original, the original with everything
folded, and that with the kernels that won their layer, residual additions and chains fused. The
original is always a candidate. A variant whose outputs on the example leave the bound loses the
layers that are to blame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..measure import LatencyStats, time_interleaved
from ..nn.layout import convert_input_
from ..nn.microbatch import has_own_forward, microbatch_
from .assemble import Assembler, Plan, other_layout
from .blocks import Block
from .chains import Chain, pick
from .choice import Settings, faster, surely_faster, unclear
from .copy import LAYOUTS, duplicate, relayout_, replace_by_name_
from .fold import Folded
from .layouts import Cut
from .outputs import compare
from .precision import rounds_to_tf32, strict_float
from .record import is_channels_last, tensors_in
from .survey import Site, make_layer

# Time for one round of comparisons of whole models; at least 5 runs of each happen.
MODEL_BUDGET_S = 12.0
# Cuts that are tried on whole models, of those with the best prediction.
CUT_TRIALS = 3
# A whole model must win by this much and by more than the spread.
MODEL_MARGIN = 0.01
_T = TypeVar("_T")


@dataclass
class Outcome:
    """The variant kept, and its time against that of the original."""

    plan: Plan
    before: LatencyStats
    after: LatencyStats
    max_abs_diff: float
    notes: list[str] = field(default_factory=list)


class Variants:
    """Builds, checks and times variants of one model.

    Args:
        model: shadow of the user's model, masks baked, in evaluation mode; never changed.
        example: positional inputs.
        reference: tensors the model returned for them.
        sites: its layers.
        stable: whether the model returns the same for the same input.
        layer_images: batch size that the layers were measured with; that of the example if None.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[Tensor, ...],
        reference: Sequence[Tensor],
        sites: list[Site],
        stable: bool,
        layer_images: int | None = None,
    ) -> None:
        self.images = example[0].shape[0] if example[0].dim() else 1
        self.layer_images = layer_images or self.images
        self.model = model
        self.example = example
        self.reference = list(reference)
        self.sites = sites
        self.stable = stable
        self.assembler = Assembler(model, sites)
        convs = any(isinstance(s.module, nn.Conv2d) for s in sites)
        images = any(x.dim() == 4 for x in example)
        # torch refuses to give 5-d weights (Conv3d) the channels_last format of 4-d ones.
        volumes = any(p.dim() == 5 for p in model.parameters())
        self.layouts = LAYOUTS if convs and images and not volumes else LAYOUTS[:1]
        weights = [s.module.weight for s in sites if isinstance(s.module, nn.Conv2d)]
        self.own_layout = LAYOUTS[int(any(is_channels_last(w) for w in weights))]

    def apply_(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Put the plan into a model with the names of this one; returns it (or a new root)."""
        two = len(self.layouts) > 1
        if two:
            relayout_(model, plan.layout)  # before new modules come in, which have theirs
        model = replace_by_name_(model, self.assembler.swaps(plan)).eval()
        # A contiguous model needs the hook only if something would give it another layout.
        given = any(is_channels_last(x) for x in self.example)
        if two and (plan.layout != "contiguous" or given or hasattr(model, "_sparsecnn_layout")):
            convert_input_(model, plan.layout)
        if plan.cut is not None:
            layout = other_layout(plan.layout)
            convert_input_(model.get_submodule(plan.cut.name), layout)
            named = dict(model.named_modules())
            for site in plan.cut.after:
                if type(named.get(site.name)) is type(site.module):
                    relayout_(named[site.name], layout)
        return model if has_own_forward(model) else microbatch_(model, plan.images or None)

    def build(self, plan: Plan) -> nn.Module:
        """A variant that shares every tensor it can with the model."""
        return self.apply_(duplicate(self.model, share=True), plan)

    @strict_float()
    def disagreement(self, plan: Plan) -> tuple[float, str]:
        """Largest difference of the outputs, and why the variant must not be used (or "")."""
        try:
            with torch.no_grad():
                model = self.build(plan)
                outputs = list(tensors_in(model(*self.example)))
        except Exception as error:
            return math.nan, f"the forward pass raised {type(error).__name__}: {error}"
        if not self.stable:
            return math.nan, ""
        return compare(self.reference, outputs, rounds_to_tf32(model))

    def forward(self, plan: Plan) -> Callable[[], object]:
        """One run of a variant on the example."""
        model = self.build(plan)
        return lambda: model(*self.example)

    def time(
        self, plans: Sequence[Plan], settings: Settings, effort: int = 1
    ) -> dict[Plan, LatencyStats]:
        """Time variants in turn, with `effort` times the usual runs and time."""
        stats = time_trials({plan.label: (self, plan) for plan in plans}, settings, effort)
        return {plan: stats[plan.label] for plan in plans}


def time_trials(
    trials: Mapping[str, tuple[Variants, Plan]], settings: Settings, effort: int = 1
) -> dict[str, LatencyStats]:
    """Time plans in turn, each with the variants it is one of, all on one example."""
    variants, _ = next(iter(trials.values()))
    return time_interleaved(
        {name: variants.forward(plan) for name, (variants, plan) in trials.items()},
        warmup=settings.warmup,
        runs=settings.runs * effort,
        max_time_s=MODEL_BUDGET_S * effort,
        device=variants.example[0].device,
    )


def keep_good(items: list[_T], good: Callable[[list[_T]], bool]) -> list[_T]:
    """A largest-effort subset for which `good` holds: halves that fail are split further."""
    if not items or good(items):
        return items
    if len(items) == 1:
        return []
    middle = len(items) // 2
    left, right = keep_good(items[:middle], good), keep_good(items[middle:], good)
    both = left + right
    if len(both) == max(len(left), len(right)) or good(both):
        return both
    return max(left, right, key=len)


def check_folds(variants: Variants) -> list[str]:
    """Undo foldings after which the model no longer computes what it did. Returns notes."""
    sites = [s for s in variants.sites if s.folded is not None and s.folded.replaced]
    for site in sites:
        site.layer = make_layer(site)
    why: list[str] = []

    def good(subset: list[Site]) -> bool:
        text = variants.disagreement(Plan("contiguous", frozenset(subset)))[1]
        if text:
            why.append(text)
        return not text

    kept = keep_good(sites, good)
    undone = [site for site in sites if site not in kept]
    for site in undone:
        assert isinstance(site.module, nn.Conv2d)
        site.folded = Folded(site.module, note=f"folding was undone: {why[-1]}")
    return [f"folding into {len(undone)} layers was undone: {why[-1]}"] if undone else []


def decide(
    variants: Variants,
    blocks: Sequence[Block],
    chains: Sequence[Chain],
    cuts: Sequence[Cut],
    settings: Settings,
    step: Callable[[str], None],
) -> Outcome:
    """Time the variants and keep the best that beats the original beyond noise."""
    notes: list[str] = []
    folds = frozenset(s for s in variants.sites if s.folded is not None and s.folded.replaced)
    plans: list[Plan] = []
    uniform: dict[str, Plan] = {}
    for layout in variants.layouts:
        plans.append(Plan(layout))
        if folds:
            plans.append(Plan(layout, folds))
        swaps = _checked_swaps(variants, layout, folds, notes)
        best = _fused(variants, Plan(layout, folds, swaps), blocks, pick(chains, layout), notes)
        uniform[layout] = best
        if not best.is_original and best not in plans:
            plans.append(best)
    step("checked the outputs")
    times = variants.time(plans, settings)
    step("compared whole models")
    originals = [p for p in plans if p.is_original]
    before = min(originals, key=lambda p: times[p].median_s)
    chosen = min(plans, key=lambda p: times[p].median_s)
    if chosen.swaps or chosen.chains:
        chosen = _without_losers(variants, chosen, plans, times, settings, notes)
    if len(uniform) > 1 and not chosen.is_original:
        chosen = _with_cut(variants, chosen, uniform, cuts, times, settings)
    # The three that may be kept, once more: the choice, the best original, the user's own layout.
    own = Plan(variants.own_layout)
    finalists = list(dict.fromkeys((own, before, chosen)))
    if len(finalists) > 1:
        for effort in (1, 4):
            times |= variants.time(finalists, settings, effort)
            if not unclear(times[chosen], times[before], MODEL_MARGIN) and not unclear(
                times[before], times[own], settings.tie_margin
            ):
                break
    if chosen not in originals and not surely_faster(times[chosen], times[before], MODEL_MARGIN):
        notes.append(
            f"the {chosen.label} model took {_ms(times[chosen])} and the original "
            f"{_ms(times[before])}: no gain beyond noise, so everything was put back"
        )
        for site in chosen.swaps:
            site.undone = "the whole model was not faster, put back"
        chosen = before
    if chosen in originals and not surely_faster(times[before], times[own], settings.tie_margin):
        chosen = before = own  # the user's own layout wins ties
    step("done")
    worst = 0.0 if chosen in originals else variants.disagreement(chosen)[0]
    return Outcome(chosen, times[before], times[chosen], worst, notes)


def _with_cut(
    variants: Variants,
    chosen: Plan,
    uniform: dict[str, Plan],
    cuts: Sequence[Cut],
    times: dict[Plan, LatencyStats],
    settings: Settings,
) -> Plan:
    """`chosen`, or the variant that changes its layout somewhere, if one is faster.

    The times of the layers say which cuts are worth a try; pooling and the like have none.
    """
    mixed = []
    for first, plan in uniform.items():
        second = uniform[other_layout(first)]
        for cut in cuts:
            chains = [c for c in plan.chains if not cut.after & set(c.sites)]
            chains += [c for c in second.chains if cut.after >= set(c.sites)]
            swaps = (plan.swaps - cut.after) | (second.swaps & cut.after)
            blocks = plan.blocks & second.blocks
            mixed.append(Plan(first, plan.folds, swaps, blocks, frozenset(chains), cut))
    mixed.sort(key=lambda plan: predicted_s(variants.sites, plan))
    trials = [p for p in mixed[:CUT_TRIALS] if not variants.disagreement(p)[1]]
    if not trials:
        return chosen
    again = variants.time([chosen, *trials], settings)
    best = min(trials, key=lambda p: again[p].median_s)
    if not faster(again[best], again[chosen], MODEL_MARGIN):
        return chosen
    times |= again
    return best


def predicted_s(sites: Sequence[Site], plan: Plan) -> float:
    """Seconds that the layers of a plan took when they were measured one by one."""
    total = -sum(chain.gain(plan.layout_of(chain.sites[0])) for chain in plan.chains)
    for site in sites:
        if site.choice is not None:
            layout = plan.layout_of(site)
            kernel = site.choice.kernel_in(layout) if site in plan.swaps else "dense"
            stats = site.choice.timing(kernel, layout)
            total += 0.0 if stats is None else stats.median_s
    return total


def _fused(
    variants: Variants,
    plan: Plan,
    blocks: Sequence[Block],
    chains: frozenset[Chain],
    notes: list[str],
) -> Plan:
    """The plan with blocks and chains, or with as much of them as leaves the outputs right."""
    both = replace(plan, blocks=frozenset(blocks), chains=chains)
    for attempt in (both, replace(both, chains=frozenset()), replace(both, blocks=frozenset())):
        if attempt == plan:
            break
        why = variants.disagreement(attempt)[1]
        if not why:
            return attempt
        notes.append(f"{plan.layout}: a fused variant was dropped: {why}")
    return plan


def _checked_swaps(
    variants: Variants, layout: str, folds: frozenset[Site], notes: list[str]
) -> frozenset[Site]:
    wins = [site for site in variants.sites if site.wins_in(layout)]
    why: list[str] = []

    def good(subset: list[Site]) -> bool:
        text = variants.disagreement(Plan(layout, folds, frozenset(subset)))[1]
        if text:
            why.append(text)
        return not text

    kept = keep_good(wins, good)
    if len(kept) < len(wins):
        notes.append(f"{layout}: {len(wins) - len(kept)} swaps were undone: {why[-1]}")
        for site in wins:
            if site not in kept:
                site.undone = f"undone, {why[-1]}"
    return frozenset(kept)


def _without_losers(
    variants: Variants,
    chosen: Plan,
    plans: Sequence[Plan],
    times: dict[Plan, LatencyStats],
    settings: Settings,
    notes: list[str],
) -> Plan:
    """`chosen`, or with the layers that won least put back, or the best plan without swaps."""
    dense = min((p for p in plans if not p.swaps and not p.chains), key=lambda p: times[p].median_s)
    if faster(times[chosen], times[dense], MODEL_MARGIN):
        return chosen
    ranked = sorted(chosen.swaps, key=lambda site: -_gain(site, chosen.layout))
    best = replace(chosen, swaps=frozenset(ranked[: len(ranked) // 2]))
    if best.swaps and not variants.disagreement(best)[1]:
        again = variants.time([dense, best], settings)
        if faster(again[best], again[dense], MODEL_MARGIN):
            times |= again
            dense = best
    back = chosen.swaps - dense.swaps
    for site in back:
        site.undone = "the whole model was not faster with it, put back"
    notes.append(
        f"{len(back)} layers that won alone were put back: the whole model took "
        f"{_ms(times[chosen])} with them and {_ms(times[dense])} without"
    )
    return dense


def _gain(site: Site, layout: str) -> float:
    """Seconds a forward pass saves by the swap of one layer."""
    choice = site.choice
    assert choice is not None
    stats = choice.timing(choice.kernel_in(layout), layout)
    return choice.times[choice.best_dense].median_s - (
        math.inf if stats is None else stats.median_s
    )


def _ms(stats: LatencyStats) -> str:
    return f"{stats.median_s * 1e3:.3g} ms"
