"""Whether two models return the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Largest |new - old| / max |old| of a float output of the model. Roundings add up over the depth
# of a network; short types lose bits in every activation that is stored.
OUTPUT_BOUND = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}


def compare(
    reference: Sequence[Tensor], outputs: Sequence[Tensor], tf32: bool = False
) -> tuple[float, str]:
    """Largest difference of two sequences of outputs and, if out of bound, what is wrong.

    With `tf32`, float32 may have been rounded to the 10 bits that float16 has too.

    Integer outputs (class numbers, say) must agree in shape only: ranks of equal scores flip.
    """
    if len(reference) != len(outputs):
        return math.nan, f"{len(outputs)} outputs instead of {len(reference)}"
    worst, wrong = 0.0, ""
    for old, new in zip(reference, outputs, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            return math.nan, f"output {tuple(new.shape)} instead of {tuple(old.shape)}"
        short = tf32 and old.dtype == torch.float32
        bound = OUTPUT_BOUND.get(torch.float16 if short else old.dtype)
        if bound is None or old.numel() == 0:
            continue
        a, b = old.detach().double(), new.detach().double()
        # What is infinite or NaN already must stay so, the rest is compared.
        same = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
        size = float(torch.where(a.isfinite(), a, 0.0).abs().max())
        worst = max(worst, float(error.max()))
        if float(error.max()) > bound * size:
            wrong = f"outputs differ by {float(error.max()):.3g}, more than {bound:g} * {size:.3g}"
    return worst, wrong
