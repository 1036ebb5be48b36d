"""Linear structure of filter banks: filters that share colours, and blocks of low rank.

Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting Linear Structure Within Convolutional Networks
for Efficient Evaluation", NIPS 2014. A bank W (T, S, kh, kw) has T filters of S input channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .clustering import balanced_assignment, balanced_kmeans

_ROUNDS = 100
# Alternating least squares ends when no error falls by this share of the norm in a sweep. Terms
# that are only the start of the joint refit need not be exact.
_SWEEPS = 100  # the last two thirds of 300 gave less than 0.2 % of the error
_TOLERANCE = 1e-8
_ROUGH = 1e-4


class Colours(NamedTuple):
    """W[t] ~ colours[labels[t]] (outer) taps[t].

    Attributes:
        colours: (C', S); one singular value is split evenly between a colour and its taps.
        taps: (T, kh, kw).
        labels: (T,) int64, T/C' filters of each colour.
        errors: ||W - approximation||^2 after every step of the alternation; never grows.
    """

    colours: Tensor
    taps: Tensor
    labels: Tensor
    errors: list[float]


def monochromatic(w: Tensor, colours: int, *, seed: int = 0) -> Colours:
    """Filters that read one colour, a fixed mix of the input channels, shared by T/C' of them.

        min over labels, unit c_j, taps v of sum_t ||W_t - c_{label(t)} v_t'||^2,  W_t (S, kh kw)

    The labels begin with the directions u_t of the filters' own rank-1 parts s_t u_t v_t', in
    clusters without regard to sign. Then in turn: c_j is the first left singular vector of
    its filters side by side, v_t = W_t' c_j; and the labels are assigned anew, by the exact gain
    ||c_j' W_t||^2. Both steps solve their part, so that the error never grows. (The paper
    clusters once.)

    Args:
        w: (T, S, kh, kw) float64.
        colours: C', 1 <= C' <= T; where it does not divide T, numbers of filters differ by one.
        seed: of the clustering.

    Raises:
        ValueError: C' out of range.

    Cost: O(T S kh kw C') and one assignment of T filters, O(T^3), per round.
    """
    filters = w.flatten(2)
    total = float(w.square().sum())
    u, s, _ = torch.linalg.svd(filters, full_matrices=False)
    labels = balanced_kmeans(u[:, :, 0] * s[:, :1], colours, dim=1, seed=seed)
    errors: list[float] = []
    found = _leading(filters, labels, colours)
    for _ in range(_ROUNDS):
        gains = torch.einsum("js,tsp->tjp", found, filters).square().sum(2)
        errors.append(total - float(gains[torch.arange(len(w)), labels].sum()))
        if len(errors) > 1 and errors[-2] - errors[-1] <= 1e-12 * total:
            break
        labels = balanced_assignment(-gains)
        errors.append(total - float(gains[torch.arange(len(w)), labels].sum()))
        found = _leading(filters, labels, colours)
    taps = torch.einsum("ts,tsp->tp", found[labels], filters)
    norms = torch.stack([taps[labels == j].norm() for j in range(colours)])
    scale = torch.where(norms > 0, norms, 1.0).sqrt()[:, None]
    taps = (taps / scale[labels]).reshape(len(w), *w.shape[2:])
    return Colours(found * scale, taps, labels, errors)


def bicluster(
    w: Tensor,
    groups_in: int,
    groups_out: int,
    *,
    ranks: tuple[int, int] | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Clusters of input channels and of filters, each of equal size, that cut W into blocks.

    Input channels are compared by their slices W[:, s], filters by W[t]: with the means of the
    clusters, or with their subspaces. Where the block of every pair of clusters has rank K, the
    slices of one cluster of channels lie in a subspace of dimension at most K times the number of
    filter clusters. Given `ranks`, both ways are tried, and the one whose blocks have less beyond
    the ranks is taken (ours; the paper takes subspaces). On the 32 x 32 convolutions of a network
    trained on 8x8 digits means were the better ones, 0.49 against 0.52 relative error at 4 x 4
    blocks of ranks 3, and random clusters gave 0.57; blocks of exact rank are found by subspaces.

    Args:
        w: (T, S, kh, kw) float64; G divides S and H divides T if `ranks` are given.
        groups_in: G, clusters of the S input channels.
        groups_out: H, clusters of the T filters.
        ranks: of the blocks, seen from the channels and from the filters; None for means.
        seed: of the clusterings.

    Returns:
        labels (S,) and (T,), int64.

    Raises:
        ValueError: more clusters than members.

    Cost: that of `balanced_kmeans` for channels and filters, twice if `ranks` are given.
    """
    sides = (w.transpose(0, 1).flatten(1), w.flatten(1))
    groups = (groups_in, groups_out)
    tries = [(0, 0)]
    if ranks is not None:
        # With as many dimensions as members every clustering would fit: half a cluster at most.
        half = [max(len(rows) // max(n, 1) // 2, 1) for rows, n in zip(sides, groups, strict=True)]
        tries.append((min(groups_out * ranks[0], half[0]), min(groups_in * ranks[1], half[1])))
    found = []
    for dims in tries:
        labels = [
            balanced_kmeans(rows, n, dim=dim, seed=seed)
            for rows, n, dim in zip(sides, groups, dims, strict=True)
        ]
        found.append((labels[0], labels[1]))
    if ranks is None:
        return found[0]
    return min(found, key=lambda labels: _beyond(blocks_of(w, *labels)[0].flatten(0, 1), ranks))


def blocks_of(w: Tensor, labels_in: Tensor, labels_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of a bank whose clusters have equal sizes.

    Args:
        w: (T, S, kh, kw).
        labels_in: (S,) in [0, G).
        labels_out: (T,) in [0, H).

    Returns:
        blocks (G, H, T/H, S/G, kh, kw), and the channels (S,) and filters (T,) in their order:
        w[filters][:, channels] is the bank with its blocks side by side.
    """
    channels, filters = (labels.argsort(stable=True) for labels in (labels_in, labels_out))
    groups_in, groups_out = int(labels_in.max()) + 1, int(labels_out.max()) + 1
    ordered = w[filters][:, channels]
    blocks = ordered.unflatten(0, (groups_out, -1)).unflatten(2, (groups_in, -1))
    return blocks.permute(2, 0, 1, 3, 4, 5).contiguous(), channels, filters


def outer_product(blocks: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """K terms a (outer) b (outer) c for every block: out channels, in channels, taps.

        block[t, s] ~ sum_k a[t, k] b[s, k] c[k]

    Greedy as in the paper: each term is the best that alternating least squares finds for what
    the terms before it have left. Greedy terms of a tensor, unlike those of a matrix, are not the
    best K together (ours): alternating least squares on all of them follows. From as many terms
    on as give any block exactly, `exact_terms`, they are written down instead of searched.

    Args:
        blocks: (B, t, s, kh, kw) float64.
        terms: K >= 1.

    Returns:
        a (B, t, K), b (B, s, K), c (B, K, kh, kw); a term's norm is split evenly in three.

    Raises:
        ValueError: K < 1.

    Cost: O(t s kh kw K) per block and sweep, at most 100 sweeps per term and for the refit.
    """
    if terms < 1:
        raise ValueError(f"outer_product: expected terms >= 1, got {terms}")
    x = blocks.flatten(3)
    if terms >= exact_terms(tuple(blocks.shape[1:])):
        factors = _exact(x, terms)
    else:
        rest = x
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(terms):
            term = _alternate(rest, _first_guess(rest), _ROUGH if terms > 1 else _TOLERANCE)
            found.append(term)
            rest = rest - _compose(term)
        a, b, c = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        factors = _alternate(x, (a, b, c), _TOLERANCE) if terms > 1 else (a, b, c)
    norms = [f.norm(dim=1, keepdim=True) for f in factors]
    third = (norms[0] * norms[1] * norms[2]).pow(1 / 3)
    a, b, c = (
        f * torch.where(n > 0, third / n, 0.0) for f, n in zip(factors, norms, strict=True)
    )
    return a, b, c.mT.reshape(len(c), terms, *blocks.shape[3:])


def exact_terms(shape: tuple[int, ...]) -> int:
    """Outer products that give any block (t, s, kh, kw): one for each pair of two indices."""
    t, s, kh, kw = shape
    return t * s * kh * kw // max(t, s, kh * kw)


def two_svds(blocks: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce the input channels of every block by one SVD, then its filters by another.

        block ~ last core first:  first (K1, s),  core (K2, K1, kh, kw),  last (t, K2)

    The first SVD is of the unfolding (s, t kh kw), the second of (t, K1 kh kw) for the block seen
    through the first K1 directions; the squared error is the sum of both tails.

    Args:
        blocks: (B, t, s, kh, kw) float64.
        rank_in: K1, cut at s.
        rank_out: K2, cut at t.

    Returns:
        first (B, K1, s), core (B, K2, K1, kh, kw), last (B, t, K2). What a rank has beyond the
        block's is zero. Scales are split evenly between neighbours.

    Raises:
        ValueError: a rank < 1 or more than its channels.

    Cost: O(t s kh kw min(s, t kh kw)) per block.
    """
    count, t, s, kh, kw = blocks.shape
    if not (1 <= rank_in <= s and 1 <= rank_out <= t):
        raise ValueError(
            f"two_svds: expected ranks between 1 and the {s} input and {t} output channels of a "
            f"block, got {rank_in} and {rank_out}"
        )
    u = torch.linalg.svd(blocks.transpose(1, 2).flatten(2), full_matrices=False).U
    u = _padded(u, rank_in)  # (B, s, K1)
    seen = torch.einsum("btsp,bsk->btkp", blocks.flatten(3), u)
    left, values, right = torch.linalg.svd(seen.flatten(2), full_matrices=False)
    half = values.sqrt()
    last = _padded(left * half[:, None], rank_out)
    core = _padded((half[:, :, None] * right).mT, rank_out).mT
    core = core.reshape(count, rank_out, rank_in, kh * kw)
    norms = core.square().sum((1, 3)).sqrt()
    scale = torch.where(norms > 0, norms, 1.0).sqrt()
    core = core / scale[:, None, :, None]
    first = u.mT * scale[:, :, None]
    return first, core.reshape(count, rank_out, rank_in, kh, kw), last


def _beyond(blocks: Tensor, ranks: tuple[int, int]) -> float:
    """What blocks (B, t, s, kh, kw) have beyond ranks, seen from the channels and the filters."""
    tails = [
        torch.linalg.svdvals(matrices.flatten(2))[:, rank:].square().sum()
        for matrices, rank in zip((blocks.transpose(1, 2), blocks), ranks, strict=True)
    ]
    return float(tails[0] + tails[1])


def _leading(filters: Tensor, labels: Tensor, colours: int) -> Tensor:
    """(C', S) first left singular vectors of every colour's filters side by side."""
    found = []
    for j in range(colours):
        side_by_side = filters[labels == j].transpose(0, 1).flatten(1)
        found.append(torch.linalg.svd(side_by_side, full_matrices=False).U[:, 0])
    return torch.stack(found)


def _padded(columns: Tensor, count: int) -> Tensor:
    """The first `count` of the last dimension, zeros where there are fewer."""
    missing = max(count - columns.shape[-1], 0)
    return torch.nn.functional.pad(columns[..., :count], (0, missing))


def _compose(factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(B, t, s, p) of a (B, t, K), b (B, s, K), c (B, p, K)."""
    return torch.einsum("btk,bsk,bpk->btsp", *factors)


def _first_guess(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One term per block (B, t, s, p): the first singular vectors, one mode after the other."""
    b = torch.linalg.svd(x.transpose(1, 2).flatten(2), full_matrices=False).U[:, :, :1]
    u, s, vh = torch.linalg.svd(torch.einsum("btsp,bsk->btp", x, b), full_matrices=False)
    return u[:, :, :1] * s[:, None, :1], b, vh[:, :1].mT


def _alternate(
    x: Tensor, factors: tuple[Tensor, Tensor, Tensor], tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares for one factor after the other until no block's error moves any more."""
    a, b, c = factors
    norms = x.flatten(1).norm(dim=1)
    before = (x - _compose(factors)).flatten(1).norm(dim=1)
    for _ in range(_SWEEPS):
        a = _solve(torch.einsum("btsp,bsk,bpk->btk", x, b, c), b, c)
        b = _solve(torch.einsum("btsp,btk,bpk->bsk", x, a, c), a, c)
        c = _solve(torch.einsum("btsp,btk,bsk->bpk", x, a, b), a, b)
        error = (x - _compose((a, b, c))).flatten(1).norm(dim=1)
        if bool(((before - error) <= tolerance * norms).all()):
            break
        before = error
    return a, b, c


def _solve(moment: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Moment (B, m, K) times the inverse of the Gram matrix of the products of two factors."""
    gram = (one.mT @ one) * (other.mT @ other)
    # Columns of unlike scale would let the cut of the pseudoinverse take small terms for none.
    scale = torch.diagonal(gram, dim1=1, dim2=2).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    gram = gram / scale[:, :, None] / scale[:, None, :]
    inverse = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
    solved: Tensor = (moment / scale[:, None]) @ inverse / scale[:, None]
    return solved


def _exact(x: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """X (B, t, s, p) as one term per pair of indices of its two shorter modes; the rest is zero."""
    sizes = x.shape[1:]
    longest = max(range(3), key=lambda mode: sizes[mode])
    others = [mode for mode in range(3) if mode != longest]
    rows, columns = (sizes[mode] for mode in others)
    fibres = x.movedim(1 + longest, -1).reshape(len(x), rows * columns, -1).mT
    eye = torch.eye(rows * columns, dtype=x.dtype).reshape(rows, columns, -1)
    factors: dict[int, Tensor] = {
        longest: fibres,
        others[0]: eye.sum(1).expand(len(x), -1, -1),
        others[1]: eye.sum(0).expand(len(x), -1, -1),
    }
    a, b, c = (_padded(factors[mode], terms) for mode in range(3))
    return a, b, c
