"""How far a result may be from the float64 reference, derived and not tuned.

A sum of L products accumulated in any order with unit roundoff u differs from the exact sum by at
most L*u / (1 - L*u) times the sum of the magnitudes of its terms (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 3.1). Storing in a shorter type adds one rounding of the
result. Activations multiply the error by their Lipschitz constant and add their own rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Largest absolute slope: max |d silu| = 1.0998, max |d hardswish| = 1.5.
_LIPSCHITZ = {"none": 1.0, "relu": 1.0, "relu6": 1.0, "silu": 1.1, "hardswish": 1.5}
# Roundings of one evaluation, relative to |pre-activation|: silu needs an exponential, a sum and
# a quotient (a vector exp is good to about 2 ulp); hardswish three operations.
_EVALUATION = {"none": 0.0, "relu": 0.0, "relu6": 0.0, "silu": 8.0, "hardswish": 4.0}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in for data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Half the distance from 1 to the next TF32 number: its mantissa has 10 bits.
TF32_ROUNDOFF = 2.0**-11


def conv_bound(
    magnitude: Tensor,
    reference: Tensor,
    terms: int,
    dtype: torch.dtype,
    activation: str = "none",
    *,
    tf32: bool = False,
) -> Tensor:
    """Largest allowed |result - reference|, elementwise.

    Args:
        magnitude: sum of the magnitudes of the terms of each output, float64.
        reference: the exact result after the activation, float64, same shape.
        terms: L, the largest number of products and addends in one output.
        dtype: of the data and the result; sums are float32 (float64 for float64).
        activation: fused activation.
        tf32: float32 factors are rounded to TF32 first, and tensor cores, which may drop bits
            where they would be rounded, form the sums.

    Returns:
        float64 tensor like `reference`. Zero where every term is zero.
    """
    u = unit_roundoff(accumulator(dtype))
    if tf32 and dtype == torch.float32:
        u_factor = 2 * TF32_ROUNDOFF + TF32_ROUNDOFF**2  # of a product of two
        once = conv_bound(magnitude, reference, 2 * terms, dtype, activation)
        return once * (1 + u_factor) + _LIPSCHITZ[activation] * u_factor * magnitude
    # The reference itself is a float64 sum: its own error is counted for float64 results.
    length = 2 * terms if dtype == torch.float64 else terms
    bound = _LIPSCHITZ[activation] * length * u / (1 - length * u) * magnitude
    bound = bound + _EVALUATION[activation] * u * magnitude
    if accumulator(dtype) != dtype:
        bound = bound + unit_roundoff(dtype) * (reference.abs() + bound)
        # Below the normal range a rounding is absolute.
        bound = bound + torch.finfo(dtype).smallest_normal * (magnitude > 0)
    return bound


# Roundings that a term meets in both passes of both transforms. A row of n coefficients takes at
# most n, one product and n - 1 sums, in whatever order and factoring and where a multiply-add
# rounds twice; one less where the coefficients are 1 and -1. F(2): rows of 2 in and of 3 out. F(4):
# of 4 and of 5.
_WINOGRAD_TRANSFORMS = {2: 2 * (1 + 2), 4: 2 * (4 + 5)}


def winograd_bound(
    magnitude: Tensor,
    reference: Tensor,
    channels: int,
    addends: int,
    tile: int,
    dtype: torch.dtype,
    activation: str = "none",
    *,
    chunks: int = 1,
    tensor_cores: bool = False,
) -> Tensor:
    """Largest allowed |result - reference| of a convolution in the Winograd domain.

    A computed sum of products with coefficients, whatever its order, is the sum of its terms, each
    multiplied by as many (1 + d), |d| <= u, as it meets roundings (Higham, section 3.1); through a
    chain of such sums the counts add up and the magnitudes of the coefficients multiply. A term
    meets those of both transforms, one product and C/G - 1 sums (the first sum, to zero, rounds
    nothing), and one for each addend. The coefficients are numbers of few bits: exact.

    Where the first pass of the output transform adds up several chunks of channels, its rows grow
    by their nonzero coefficients for each: 3 of F(2), 5 of F(4). Tensor cores may cut where others
    round, at most twice as far, and take the transformed input rounded to `dtype`, each term with
    it; data whose transform is below the normal range of float16 is not what this is for.

    Args:
        magnitude: |A^T| [sum |U| . (|B^T| |x| |B|)] |A| with the magnitudes of the addends.
        reference: the exact result after the activation, same shape.
        channels: C/G.
        addends: bias and residual, as present.
        tile: m.
        dtype: of the data and the result; sums are float32 (float64 for float64).
        activation: fused activation.
        chunks: of the channels, in the first pass of the output transform.
        tensor_cores: whether they formed the products, from data of `dtype`.

    Returns:
        float64 tensor like `reference`. Zero where every term is zero.
    """
    terms = channels + addends + _WINOGRAD_TRANSFORMS[tile] + (chunks - 1) * (tile + 1)
    if not tensor_cores:
        return conv_bound(magnitude, reference, terms, dtype, activation)
    # Behind the activation, and no larger in what is then rounded to `dtype`.
    once = _LIPSCHITZ[activation] * unit_roundoff(dtype) * magnitude
    bound = conv_bound(magnitude, reference, 2 * terms, dtype, activation)
    return bound + (1 + 2 * unit_roundoff(dtype)) * once


def winograd_on_cuda(
    channels: int, tile: int, sparse: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """What the CUDA kernels do otherwise, as arguments of `winograd_bound`.

    Args:
        channels: C/G.
        tile: m.
        sparse: whether the weight is in CSR: its kernel takes chunks of 16 channels at least.
        dtype: of the data.
    """
    cores = not sparse and tile == 2 and dtype in (torch.float16, torch.bfloat16)
    return {"chunks": max(1, -(-channels // 16)) if sparse else 1, "tensor_cores": cores}


def stage_bound(
    magnitude: Tensor, propagated: Tensor, terms: int, dtype: torch.dtype, activation: str
) -> Tensor:
    """Largest error behind one stage of a chain whose intermediates keep the accumulator's type.

    With an input that is wrong by at most e, the computed sum differs from the sum of the computed
    products by L*u / (1 - L*u) times the magnitudes of these, and that from the exact sum by at
    most |W| * e; the activation multiplies both by its Lipschitz constant and adds its rounding.

    Args:
        magnitude: sum of the magnitudes of the terms, of an input of magnitude |x| + e; float64.
        propagated: |W| * e, float64, same shape.
        terms: L, the largest number of products and addends in one output.
        dtype: of the data; sums and intermediates are float32 (float64 for float64).
        activation: fused activation.

    Returns:
        float64 tensor like `magnitude`.
    """
    u = unit_roundoff(accumulator(dtype))
    length = 2 * terms if dtype == torch.float64 else terms  # the reference is a float64 sum too
    bound = length * u / (1 - length * u) * magnitude + propagated
    return _LIPSCHITZ[activation] * bound + _EVALUATION[activation] * u * (magnitude + propagated)


def stored_bound(bound: Tensor, reference: Tensor, dtype: torch.dtype) -> Tensor:
    """`bound` with the rounding of the result to the storage type, where that is shorter."""
    if accumulator(dtype) == dtype:
        return bound
    bound = bound + unit_roundoff(dtype) * (reference.abs() + bound)
    # Below the normal range a rounding is absolute.
    return bound + torch.finfo(dtype).smallest_normal * (bound > 0)


def assert_within(actual: Tensor, reference: Tensor, bound: Tensor, what: str) -> None:
    """Fail unless |actual - reference| <= bound everywhere; NaN and infinity fail.

    Args:
        actual: result under test.
        reference: float64, same shape.
        bound: float64, same shape.
        what: named in the message, usually the test case.

    Raises:
        AssertionError: with the worst element, its index, both values and the bound.
    """
    assert actual.shape == reference.shape, f"{what}: {actual.shape} != {reference.shape}"
    if actual.numel() == 0:
        return
    error = (actual.detach().cpu().double() - reference).abs()
    excess = torch.nan_to_num(error - bound, nan=float("inf"))
    if bool((excess <= 0).all()):
        return
    worst = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), reference.shape))
    bad = int((excess > 0).sum())
    raise AssertionError(
        f"{what}: {bad} of {error.numel()} elements out of bound; worst at {index}: "
        f"got {actual[index].item()}, want {reference[index].item()}, "
        f"bound {bound[index].item():.3g}"
    )
