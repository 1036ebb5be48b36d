"""What the operators have to compute, in float64 and without any code of the package.

Everything here is plain PyTorch in double precision or plain Python loops. It never imports
`sparsecnn.ops`, so an error in the package cannot hide behind the same error in its reference.
Letters: N C H W input, K R S filter, P Q output, G groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")

_ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": lambda y: y.clamp(min=0),
    "relu6": lambda y: y.clamp(0, 6),
    "silu": lambda y: y / (1 + torch.exp(-y)),
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
}


def activate(y: Tensor, name: str) -> Tensor:
    """Apply the activation called `name` to `y`, elementwise.

    Args:
        y: pre-activations, any shape.
        name: one of `ACTIVATIONS`.

    Returns:
        A tensor like `y`.
    """
    return _ACTIVATION_FUNCTIONS[name](y)


def activate_scalar(y: float, name: str) -> float:
    """`activate` for one Python float, written out once more for the loop reference."""
    if name == "none":
        return y
    if name == "relu":
        return max(y, 0.0)
    if name == "relu6":
        return min(max(y, 0.0), 6.0)
    if name == "silu":
        return y / (1.0 + math.exp(-y))
    return y * min(max(y + 3.0, 0.0), 6.0) / 6.0


def out_extent(size: int, pad_lo: int, pad_hi: int, dilation: int, kernel: int, stride: int) -> int:
    """Output size of one axis, as every convolution library defines it."""
    return (size + pad_lo + pad_hi - dilation * (kernel - 1) - 1) // stride + 1


def csr_to_dense(values: Tensor, col_idx: Tensor, row_ptr: Tensor, shape: Sequence[int]) -> Tensor:
    """Expand a CSR weight with plain loops over rows.

    Args:
        values: stored values (nnz,).
        col_idx: (nnz,), column (c * R + r) * S + s.
        row_ptr: (K + 1,).
        shape: (K, C/G, R, S).

    Returns:
        The dense weight, float64, of `shape`.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    bounds = row_ptr.tolist()
    for row in range(rows):
        for i in range(bounds[row], bounds[row + 1]):
            dense[row, int(col_idx[i])] += float(values[i])
    return dense.reshape(tuple(shape))


def pattern_to_dense(
    values: Tensor,
    columns: Tensor,
    filters: Tensor,
    group_rows: Tensor,
    group_columns: Tensor,
    shape: Sequence[int],
) -> Tensor:
    """Expand a weight in groups of filters with shared columns, with plain loops.

    Args:
        values: block after block, column by column, the filters of a column together.
        columns: of every group, column (c * R + r) * S + s.
        filters: (K,) filter of each packed row.
        group_rows: first packed row of each group, and K.
        group_columns: first column of each group, and their number.
        shape: (K, C/G, R, S).

    Returns:
        The dense weight, float64, of `shape`.
    """
    dense = torch.zeros(shape[0], math.prod(shape[1:]), dtype=torch.float64)
    rows, ends = group_rows.tolist(), group_columns.tolist()
    place = 0
    for group in range(len(rows) - 1):
        for column in columns[ends[group] : ends[group + 1]].tolist():
            for row in range(rows[group], rows[group + 1]):
                dense[int(filters[row]), column] += float(values[place])
                place += 1
    assert place == values.numel()
    return dense.reshape(tuple(shape))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`activation(conv(x, weight) + bias + residual)` in float64 on the CPU.

    Args:
        x: (N, C, H, W), any dtype.
        weight: dense (K, C/G, R, S), any dtype.
        bias: (K,) or None.
        stride: (vertical, horizontal).
        padding: (top, bottom, left, right) zeros around the image.
        dilation: (vertical, horizontal).
        groups: G.
        activation: one of `ACTIVATIONS`.
        residual: (N, K, P, Q) or None.

    Returns:
        (N, K, P, Q), float64.
    """
    top, bottom, left, right = padding
    padded = F.pad(x.detach().cpu().double(), (left, right, top, bottom))
    y = F.conv2d(
        padded,
        weight.detach().cpu().double(),
        None if bias is None else bias.detach().cpu().double(),
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    if residual is not None:
        y = y + residual.detach().cpu().double()
    return activate(y, activation)


def conv2d_magnitude(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
) -> Tensor:
    """Sum of the magnitudes of all terms of each output: what rounding errors scale with.

    Arguments as `conv2d`; returns (N, K, P, Q), float64, no activation.
    """
    return conv2d(
        x.detach().abs(),
        weight.detach().abs(),
        None if bias is None else bias.detach().abs(),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=None if residual is None else residual.detach().abs(),
    )


def conv2d_loops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `conv2d` as eight nested loops: the reference of the reference.

    Arguments and result as `conv2d`. Cost: N*K*P*Q*C/G*R*S Python steps; keep it tiny.
    """
    n_batch, _, height, width = x.shape
    filters, group_channels, r_size, s_size = weight.shape
    top, bottom, left, right = padding
    p_size = out_extent(height, top, bottom, dilation[0], r_size, stride[0])
    q_size = out_extent(width, left, right, dilation[1], s_size, stride[1])
    y = torch.empty(n_batch, filters, p_size, q_size, dtype=torch.float64)
    xs, ws = x.double().tolist(), weight.double().tolist()
    for n, k, p, q in itertools.product(
        range(n_batch), range(filters), range(p_size), range(q_size)
    ):
        total = 0.0 if bias is None else float(bias[k])
        total += 0.0 if residual is None else float(residual[n, k, p, q])
        first = k // (filters // groups) * group_channels
        for c, r, s in itertools.product(range(group_channels), range(r_size), range(s_size)):
            h = p * stride[0] - top + r * dilation[0]
            w = q * stride[1] - left + s * dilation[1]
            if 0 <= h < height and 0 <= w < width:
                total += xs[n][first + c][h][w] * ws[k][c][r][s]
        y[n, k, p, q] = activate_scalar(total, activation)
    return y


def conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Gradient of the dense weight, by autograd through `F.conv2d` in float64.

    Args:
        grad_y: (N, K, P, Q).
        x: (N, C, H, W).
        weight_shape: (K, C/G, R, S).
        stride: as `conv2d`; likewise `padding`, `dilation`, `groups`.

    Returns:
        (K, C/G, R, S), float64.
    """
    top, bottom, left, right = padding
    weight = torch.zeros(tuple(weight_shape), dtype=torch.float64, requires_grad=True)
    y = F.conv2d(
        F.pad(x.detach().cpu().double(), (left, right, top, bottom)),
        weight,
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    (grad,) = torch.autograd.grad(y, weight, grad_y.detach().cpu().double())
    return grad


# F(2, 3) as Lavin & Gray print it; its signs are a convention that sparse taps depend on.
_F2 = (
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    [[1, 1, 1, 0], [0, 1, -1, -1]],
)
_F4_POINTS = (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), of the constant first."""
    out = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *out]
        out = [a - root * b for a, b in zip(shifted, [*out, Fraction(0)], strict=True)]
    return out


def winograd_matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """G (m + 2, 3), B^T (m + 2, m + 2) and A^T (m, m + 2) of F(m, 3), m = 2 or 4, float64.

    F(4, 3) from its points by the construction of Toom and Cook: a row of B^T holds the polynomial
    that vanishes at all other points, G divides by its value at the own point, A^T evaluates.
    """
    if tile == 2:
        g, bt, at = (torch.tensor(m, dtype=torch.float64) for m in _F2)
        return g, bt, at
    rows_g, rows_bt = [], []
    for point in _F4_POINTS:
        others = [q for q in _F4_POINTS if q != point]
        value = math.prod((point - q for q in others), start=Fraction(1))
        rows_g.append([point**i / value for i in range(3)])
        rows_bt.append([*_polynomial(others), Fraction(0)])
    # At infinity only the highest powers count.
    rows_g.append([Fraction(0), Fraction(0), Fraction(1)])
    rows_bt.append(_polynomial(_F4_POINTS))
    rows_at = [[p**i for p in _F4_POINTS] + [Fraction(i == 3)] for i in range(4)]
    g, bt, at = (
        torch.tensor([[float(v) for v in row] for row in m], dtype=torch.float64)
        for m in (rows_g, rows_bt, rows_at)
    )
    return g, bt, at


def winograd_taps(weight: Tensor, tile: int) -> Tensor:
    """The transform ((m + 2)^2, K, C/G) of a spatial weight (K, C/G, 3, 3), float64."""
    g, _, _ = winograd_matrices(tile)
    return torch.einsum("ir,kcrs,js->ijkc", g, weight.double(), g).flatten(0, 1)


def _winograd(
    x: Tensor,
    taps: Tensor,
    matrices: tuple[Tensor, Tensor],
    padding: tuple[int, int, int, int],
    groups: int,
) -> Tensor:
    """Tile after tile: A^T [sum over c of U . (B^T d B)] A; float64."""
    bt, at = matrices
    tile, edge = at.shape
    top, bottom, left, right = padding
    n_batch, _, height, width = x.shape
    k, c = taps.shape[1:]
    p_size, q_size = height + top + bottom - 2, width + left + right - 2
    rows, columns = -(-p_size // tile), -(-q_size // tile)
    # Up to whole tiles of outputs, of which those that do not exist are dropped again.
    more = (right + columns * tile - q_size, bottom + rows * tile - p_size)
    padded = F.pad(x.double(), (left, more[0], top, more[1]))
    inputs = torch.stack(
        [
            padded[:, :, i * tile : i * tile + edge, j * tile : j * tile + edge]
            for i, j in itertools.product(range(rows), range(columns))
        ],
        1,
    ).reshape(n_batch, rows * columns, groups, c, edge * edge)
    u = taps.double().reshape(edge * edge, groups, k // groups, c)
    # B^T d B of a tile in one row is the row times kron(B^T, B^T) transposed.
    products = torch.einsum("agkc,ntgca->ntgka", u, inputs @ torch.kron(bt, bt).t())
    outputs = products @ torch.kron(at, at).t()
    outputs = outputs.reshape(n_batch, rows, columns, k, tile, tile)
    y = outputs.permute(0, 3, 1, 4, 2, 5).reshape(n_batch, k, rows * tile, columns * tile)
    return y[:, :, :p_size, :q_size]


def winograd_conv2d(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    *,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """3x3 convolution of stride 1 with a weight in the Winograd domain; differentiable.

    Args:
        x: (N, C, H, W), any dtype.
        taps: U, ((m + 2)^2, K, C/G), any dtype.
        bias: (K,) or None.
        padding: (top, bottom, left, right) zeros around the image.
        groups: G.
        activation: one of `ACTIVATIONS`.
        residual: (N, K, P, Q) or None.

    Returns:
        (N, K, P, Q), float64.
    """
    _, bt, at = winograd_matrices(math.isqrt(len(taps)) - 2)
    y = _winograd(x, taps, (bt, at), padding, groups)
    if bias is not None:
        y = y + bias.double()[:, None, None]
    if residual is not None:
        y = y + residual.double()
    return activate(y, activation)


def winograd_magnitude(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    *,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    groups: int = 1,
    residual: Tensor | None = None,
) -> Tensor:
    """|A^T| [sum over c of |U| . (|B^T| |x| |B|)] |A| + |bias| + |residual|.

    What the rounding errors of `winograd_conv2d` scale with; arguments as there. (N, K, P, Q),
    float64.
    """
    _, bt, at = winograd_matrices(math.isqrt(len(taps)) - 2)
    x, taps = x.detach().abs(), taps.detach().abs()
    y = _winograd(x, taps, (bt.abs(), at.abs()), padding, groups)
    if bias is not None:
        y = y + bias.detach().double().abs()[:, None, None]
    if residual is not None:
        y = y + residual.detach().double().abs()
    return y
