"""The inverse Hessian of a layer's weights, as the optimal brain surgeon needs it.

H is the Gauss-Newton matrix (1/N) sum_n J_n^T C_n J_n with J_n = d(output)/dw and
C_n = d2(loss)/d(output)2 of sample n: diag(p) - p p^T for cross entropy, the identity for half the
squared error. With C_n = R_n^2 the columns of J_n^T R_n are outer vectors, and every one of them
updates H^-1, which never has to be computed by inversion.

Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 5
(1992); other losses than the squared error: Hassibi, Stork, Wolff, "Optimal Brain Surgeon:
Extensions and performance comparisons", NIPS 6 (1993).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .calibration import Session, batch_size, register_collector
from .targets import Target

BlockSize = Literal["row"] | int | None
MAX_BLOCK = 4096
"""Weights that one block of H may couple: 128 MiB in float64."""
_CHUNK = 128  # outer vectors per step of the recursion: enough for matrix products to pay
_JACOBIAN_ELEMENTS = 2**23  # of all layers' outer vectors at once: 32 MiB in float32


def need(block: BlockSize, damping: float) -> str:
    """What a part asks of a calibration to get H^-1, (blocks, b, b) float64 per target.

    Args:
        block: None: one block; "row": one per filter or neuron; an int: one per so many
            consecutive weights, the last one padded.
        damping: alpha.
    """
    return f"inverse_hessian:{'full' if block is None else block}:{damping!r}"


def inverse_hessian(vectors: Tensor, damping: float, samples: int) -> Tensor:
    """(damping I + X^T X / samples)^-1 by the recursion of the paper.

    H_0^-1 = I / damping; every vector x updates H^-1 -= H^-1 x x^T H^-1 / (samples + x^T H^-1 x).

    Args:
        vectors: X, (..., m, n): m outer vectors of n weights; leading dimensions are blocks.
        damping: alpha > 0, 1e-8 to 1e-4 in the paper; makes a singular H invertible.
        samples: N > 0; a sample has as many vectors as outputs.

    Returns:
        (..., n, n) float64 on the CPU.

    Raises:
        ValueError: damping or samples not positive.

    Cost: O(m n^2) per block.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"inverse_hessian: expected damping > 0, got {damping}")
    if samples < 1:
        raise ValueError(f"inverse_hessian: expected samples >= 1, got {samples}")
    size = vectors.shape[-1]
    start = torch.eye(size, dtype=torch.float64) / damping
    inverse = start.expand(*vectors.shape[:-2], size, size).clone()
    return _updated(inverse, vectors.to("cpu", torch.float64), samples)


def _updated(inverse: Tensor, vectors: Tensor, samples: int) -> Tensor:
    """H^-1 after the outer vectors (..., m, n), by steps of several vectors.

    By Woodbury's identity H^-1 X^T (N I + X H^-1 X^T)^-1 X H^-1 is what the rank-one updates of
    the rows of X add up to.
    """
    for rows in vectors.split(_CHUNK, dim=-2):
        moved = rows @ inverse  # H^-1 is symmetric
        inner = moved @ rows.mT
        inner.diagonal(dim1=-2, dim2=-1).add_(float(samples))
        inverse = inverse - moved.mT @ torch.linalg.solve(inner, moved)
        inverse = (inverse + inverse.mT) / 2  # rounding must not make it drift from symmetry
    return inverse


@register_collector("inverse_hessian", across_ranks="first")
def _inverse_hessian(
    session: Session, targets: Sequence[Target], block: str, damping: str
) -> dict[Target, Tensor]:
    """H^-1 of each weight, (blocks, b, b) float64; padding of the last block is coupled to nothing.

    Inverses of shares of the data cannot be averaged: all ranks take the first one's.
    """
    sizes = {t: _block_size(t, block) for t in targets}
    inverses = {}
    for t, size in sizes.items():
        start = torch.eye(size, dtype=torch.float64) / float(damping)
        inverses[t] = start.repeat(-(-t.dense.numel() // size), 1, 1)
    for vectors in outer_vectors(session, targets):
        for t, flat in vectors.items():
            count, size, _ = inverses[t].shape
            flat = torch.nn.functional.pad(flat, (0, count * size - flat.shape[1]))
            blocks = flat.reshape(len(flat), count, size).movedim(1, 0)
            inverses[t] = _updated(inverses[t], blocks, session.samples)
    return inverses


def _block_size(t: Target, block: str) -> int:
    n = t.dense.numel()
    size = n if block == "full" else n // t.shape[0] if block == "row" else min(int(block), n)
    if size > MAX_BLOCK:
        raise ValueError(
            f"inverse_hessian: expected blocks of at most {MAX_BLOCK} weights, got {size} in layer "
            f"{t.name!r}; use block='row' or an int"
        )
    return size


def outer_vectors(session: Session, targets: Sequence[Target]) -> Iterator[dict[Target, Tensor]]:
    """The vectors x with H = (1/N) sum x x^T, some samples at a time.

    Per sample, one vector for each output: the columns of J^T C^(1/2).

    Args:
        session: the model, data and loss.
        targets: the weights.

    Yields:
        (m, n) float64 on the CPU per target, n the entries of W in order.

    Raises:
        ValueError: the model's output is not one tensor with the samples first.

    Cost: a backward pass per output and sample.
    """
    model = session.model
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {names[id(t.dense)]: t.dense.detach() for t in targets}
    per_vector = sum(weight.numel() for weight in weights.values())

    def products(inputs: tuple[Tensor, ...], roots: Tensor) -> dict[str, Tensor]:
        """Root columns (K, K') times the Jacobian of one sample: (K', *shape of W) per name."""

        def output(changed: dict[str, Tensor]) -> Tensor:
            one = tuple(x.unsqueeze(0) for x in inputs)
            result: Tensor = torch.func.functional_call(model, changed, one)
            return result.reshape(-1)

        pull: Any = torch.func.vjp(output, weights)[1]
        columns: dict[str, Tensor] = torch.func.vmap(lambda v: pull(v)[0], in_dims=1)(roots)
        return columns

    for inputs, labels in session.each():
        with torch.no_grad():
            outputs = model(*inputs)
        samples = batch_size(inputs)
        if not isinstance(outputs, Tensor) or outputs.shape[:1] != (samples,):
            raise ValueError(
                "inverse_hessian: expected the model's output to be a tensor of "
                f"{samples} samples, got {getattr(outputs, 'shape', type(outputs).__name__)}"
            )
        roots = _curvature_roots(session, outputs, labels)
        chunk = max(1, _JACOBIAN_ELEMENTS // (per_vector * roots.shape[-1]))
        for start in range(0, samples, chunk):
            part = tuple(x[start : start + chunk] for x in inputs)
            columns = torch.func.vmap(products)(part, roots[start : start + chunk])
            yield {
                t: columns[names[id(t.dense)]]
                .detach()
                .reshape(-1, t.dense.numel())
                .to("cpu", torch.float64)
                for t in targets
            }


def _curvature_roots(session: Session, outputs: Tensor, labels: Any) -> Tensor:
    """Symmetric square roots of d2(loss)/d(output)2, (samples, K, K).

    The loss of a batch is the mean of the samples' losses, so that row k of all samples' matrices
    is one derivative of the sum of the gradients' entries k. Negative curvature counts as none.
    """
    leaf = outputs.detach().requires_grad_()
    flat = leaf.reshape(len(leaf), -1)
    loss = session.loss_fn(flat.reshape(leaf.shape), labels) * len(leaf)
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    rows = []
    for k in range(flat.shape[1]):
        row = None
        if gradient.requires_grad:
            total = gradient[:, k].sum()
            (row,) = torch.autograd.grad(total, flat, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(flat) if row is None else row)
    curvature = torch.stack(rows, dim=1).detach().double()
    size, basis = torch.linalg.eigh((curvature + curvature.mT) / 2)
    root: Tensor = (basis * size.clamp(min=0).sqrt().unsqueeze(-2)) @ basis.mT
    return root.to(outputs.dtype)
