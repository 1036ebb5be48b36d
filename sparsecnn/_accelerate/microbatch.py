"""Whether a large batch is faster in parts, and with which layers.

On a CPU the activations of a large batch pass through main memory between layers; those of a few
images stay in its caches. Which kernel wins a layer depends on the number of images too, so layers
are chosen twice, for the whole batch and for one image, and whole models decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..nn.microbatch import has_own_forward
from .assemble import Plan
from .choice import Settings, surely_faster
from .model import MODEL_MARGIN, Outcome, Variants, time_trials

# Fewer images than this are not worth a second choice of all layers.
LEAST_BATCH = 4
# Images of a part that are tried.
PARTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Found:
    """A search for the best plan: what it was measured on, and what it kept."""

    variants: Variants
    outcome: Outcome


def one_image(whole: Variants) -> tuple[Tensor, ...] | None:
    """The inputs of the first image, or None where the batch cannot be taken in parts.

    Every tensor in and out must have the batch as its first axis, and the first image alone must
    give what it gives among the others.
    """
    inputs, images = whole.example, whole.images
    if (
        images < LEAST_BATCH
        or not whole.stable
        or has_own_forward(whole.model)
        or any(x.device.type != "cpu" for x in inputs)
        or any(x.shape[:1] != (images,) for x in (*inputs, *whole.reference))
    ):
        return None
    first = tuple(x[:1].clone(memory_format=torch.preserve_format) for x in inputs)
    alone = whole.disagreement(Plan(whole.own_layout, images=1))[1]
    return None if alone else first


def choose_parts(whole: Found, one: Found, settings: Settings) -> Found:
    """`whole`, or the plan of either search run in parts of the batch, where that is faster.

    Args:
        whole: the search on the whole batch.
        one: the search on its first image.
        settings: how to measure.
    """
    plain = whole.outcome
    example, reference = whole.variants.example, whole.variants.reference
    # The layers that were chosen for one image, to be run on the whole batch.
    sites = one.variants.sites
    split = Variants(one.variants.model, example, reference, sites, stable=True, layer_images=1)
    trials = {"whole": (whole.variants, plain.plan)}
    worst: dict[str, float] = {}  # difference of the outputs to the original's
    for kind, variants, plan in (
        ("batch", whole.variants, plain.plan),
        ("image", split, one.outcome.plan),
    ):
        for images in (n for n in PARTS if n < whole.variants.images):
            trial = replace(plan, images=images)
            difference, why = variants.disagreement(trial)
            if not why:
                trials[f"{kind} {images}"] = variants, trial
                worst[f"{kind} {images}"] = difference
    times = time_trials(trials, settings)
    best = min(trials, key=lambda name: times[name].median_s)
    if best == "whole":
        return whole
    before = Plan(whole.variants.own_layout)
    finalists = {"whole": trials["whole"], best: trials[best], "before": (whole.variants, before)}
    times = time_trials(finalists, settings, effort=4)
    if not surely_faster(times[best], times["whole"], MODEL_MARGIN):
        return whole
    variants, plan = trials[best]
    measured = whole if variants is whole.variants else one
    note = (
        f"takes {plan.images} images at a time: {times[best].median_s * 1e3:.3g} ms, "
        f"{times['whole'].median_s * 1e3:.3g} ms for the best whole batch"
    )
    if measured is one:
        note += "; its layers were measured on one image"
    outcome = Outcome(
        plan,
        min(times["before"], plain.before, key=lambda stats: stats.median_s),
        times[best],
        worst[best],
        [*measured.outcome.notes, note],
    )
    return Found(variants, outcome)

