"""Clusters of equal size: k-means whose assignment step is a transport problem."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_STARTS = 8
_ROUNDS = 100  # a start ends when the labels stay, in practice after 3 to 15 rounds


def balanced_assignment(cost: Tensor) -> Tensor:
    """Give n items to k clusters at the least total cost, all clusters of one size.

    Every cluster has floor(n/k) places that must be filled and, where k does not divide n, one more
    that may be: sizes then differ by one. Solved exactly, as a linear assignment of items to places
    (each cluster's column of the cost repeated).

    Args:
        cost: (n, k), finite; cost[i, j] of item i in cluster j.

    Returns:
        (n,) int64 labels in [0, k).

    Raises:
        ValueError: fewer items than clusters, or no cluster.

    Cost: O(n^3) at worst.
    """
    items, clusters = cost.shape
    _check_count(items, clusters, "balanced_assignment")
    size, rest = divmod(items, clusters)
    places = cost.numpy().repeat(size, axis=1)
    owners = np.arange(clusters).repeat(size)
    if rest:
        # Stand-ins take the optional places that stay empty, and may take no others.
        idle = clusters - rest
        stand_ins = np.full((idle, items - rest), np.inf)
        places = np.block([[places, cost.numpy()], [stand_ins, np.zeros((idle, clusters))]])
        owners = np.concatenate([owners, np.arange(clusters)])
    from scipy.optimize import linear_sum_assignment  # starts threads when imported

    _, chosen = linear_sum_assignment(places)
    return torch.from_numpy(owners[chosen[:items]])


def balanced_kmeans(x: Tensor, k: int, *, dim: int = 0, seed: int = 0) -> Tensor:
    """Cluster rows into k clusters of equal size by their distance to points or to subspaces.

        min over equally sized clusters of sum_i d(x_i, cluster of i)^2

    With `dim` = 0, d is the Euclidean distance to the mean of the cluster. With `dim` >= 1 it is
    the distance to the best linear subspace of that dimension, ||x||^2 - ||B' x||^2 for B the
    first left singular vectors of the members: dim 1 clusters directions without regard to their
    sign. Equal sizes and the projection distance are those of Denton, Zaremba, Bruna, LeCun,
    Fergus, "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation",
    NIPS 2014; the assignment here is optimal in each round (`balanced_assignment`), so that the
    sum never grows. The best of several starts is taken, each seeded in the manner of k-means++
    by rows far from the clusters so far. A subspace begins as that of the n/k rows most like the
    drawn one: in the whitened coordinates of the first k dim principal directions, where rows of
    independent subspaces are orthogonal (the shape interaction matrix of Costeira, Kanade, IJCV
    1998).

    Args:
        x: (n, features) float64.
        k: clusters, 1 <= k <= n.
        dim: of the subspaces; 0 for points.
        seed: of the starts.

    Returns:
        (n,) int64 labels; clusters are numbered in the order of their first members. Sizes are n/k,
        or differ by one where k does not divide n.

    Raises:
        ValueError: k out of range or a negative dim.

    Cost: 8 starts of a few rounds, each O(n^3) for the assignment and O(n features min(n/k,
    features)) for the subspaces.
    """
    _check_count(len(x), k, "balanced_kmeans")
    if dim < 0:
        raise ValueError(f"balanced_kmeans: expected dim >= 0, got {dim}")
    generator = torch.Generator().manual_seed(seed)
    alike = _alikeness(x, k * dim)
    best, least = torch.zeros(len(x), dtype=torch.int64), torch.inf
    for _ in range(_STARTS):
        models = _seeds(x, alike, k, dim, generator)
        labels = torch.full((len(x),), -1)
        total = torch.inf
        for _ in range(_ROUNDS):
            cost = torch.stack([_distances(x, model, dim) for model in models], 1)
            found = balanced_assignment(cost)
            now = float(cost[torch.arange(len(x)), found].sum())
            if torch.equal(found, labels) or now >= total:
                break
            labels, total = found, now
            models = [_model(x[labels == j], dim) for j in range(k)]
        if total < least:
            best, least = labels, total
    return _in_order(best)


def _check_count(items: int, clusters: int, what: str) -> None:
    if not 1 <= clusters <= items:
        raise ValueError(
            f"{what}: expected between 1 cluster and one per item, got {clusters} clusters for "
            f"{items} items"
        )


def _model(members: Tensor, dim: int) -> Tensor:
    """The mean (features,), or an orthonormal basis (features, dim) of the best subspace."""
    if dim == 0:
        return members.mean(0)
    basis: Tensor = torch.linalg.svd(members, full_matrices=False).Vh[:dim].T
    return basis


def _distances(x: Tensor, model: Tensor, dim: int) -> Tensor:
    """(n,) squared distances to a mean or to a subspace."""
    if dim == 0:
        return (x - model).square().sum(1)
    return (x.square().sum(1) - (x @ model).square().sum(1)).clamp_min(0)


def _alikeness(x: Tensor, rank: int) -> Tensor:
    """(n, n) |cosine| of rows in the whitened coordinates of their first principal directions."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    kept = u[:, :rank][:, s[:rank] > 1e-10 * s[:1]]
    unit = torch.nn.functional.normalize(kept, dim=1)
    return (unit @ unit.T).abs()


def _seeds(
    x: Tensor, alike: Tensor, k: int, dim: int, generator: torch.Generator
) -> list[Tensor]:
    """A model for each cluster, around rows drawn with their distance from those before."""
    chances = x.square().sum(1) if dim else torch.ones(len(x), dtype=x.dtype)
    models: list[Tensor] = []
    for _ in range(k):
        # All rows are met exactly already, or are zero: any will do.
        drawn = chances if float(chances.sum()) > 0 else torch.ones_like(chances)
        first = int(torch.multinomial(drawn, 1, generator=generator))
        if dim == 0:
            models.append(x[first])
        else:
            near = alike[first].argsort(descending=True, stable=True)
            models.append(_model(x[near[: max(len(x) // k, 1)]], dim))
        distance = _distances(x, models[-1], dim)
        chances = distance if len(models) == 1 else torch.minimum(chances, distance)
    return models


def _in_order(labels: Tensor) -> Tensor:
    """The same clusters, numbered in the order of their first members."""
    clusters = int(labels.max()) + 1
    firsts = torch.stack([(labels == j).nonzero()[0, 0] for j in range(clusters)])
    return firsts.argsort().argsort()[labels]
