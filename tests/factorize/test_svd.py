"""Truncated singular value decompositions and Tucker by iterating them."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsecnn.factorize.solvers import svd as solvers
from sparsecnn.factorize.solvers.svd import (
    hoi,
    leading_left,
    svd_truncate,
    unfold,
    vh_closed_form,
    vh_matrix,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (20, 20)])
@pytest.mark.parametrize("gram", [False, True])
def test_truncation_leaves_the_tail(shape, gram, monkeypatch):
    monkeypatch.setattr(solvers, "_GRAM_FROM", 1 if gram else 10**9)
    a = randn(*shape)
    singular = torch.linalg.svdvals(a)
    for rank in (1, 7, 20):
        left, right, rest = svd_truncate(a, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        tail = singular[rank:].square().sum()
        torch.testing.assert_close((a - left @ right).square().sum(), tail, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(rest, singular[rank:], rtol=1e-6, atol=1e-7)
        # The singular values are split evenly.
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gram", [False, True])
def test_a_matrix_of_lower_rank_than_asked_for(gram, monkeypatch):
    monkeypatch.setattr(solvers, "_GRAM_FROM", 1 if gram else 10**9)
    a = randn(12, 3) @ randn(3, 15, seed=1)
    left, right, _ = svd_truncate(a, 9)
    assert left.isfinite().all() and right.isfinite().all()
    torch.testing.assert_close(left @ right, a, rtol=0, atol=1e-6)


def test_leading_vectors_are_orthonormal_and_those_of_the_svd():
    for shape in ((8, 40), (40, 8)):
        a = randn(*shape)
        found = leading_left(a, 5)
        torch.testing.assert_close(found.T @ found, torch.eye(5, dtype=torch.float64))
        wanted = torch.linalg.svd(a, full_matrices=False)[0][:, :5]
        torch.testing.assert_close((found.T @ wanted).abs(), torch.eye(5, dtype=torch.float64))


def test_hoi_never_gets_worse_and_beats_its_start():
    x = randn(12, 10, 3, 3)
    core, factors, errors = hoi(x, (5, 4), (0, 1))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    assert len(errors) > 2 and errors[-1] < errors[0]
    for factor in factors:
        eye = torch.eye(factor.shape[1], dtype=torch.float64)
        torch.testing.assert_close(factor.T @ factor, eye, rtol=0, atol=1e-10)
    found = torch.einsum("abij,ta,sb->tsij", core, *factors)
    torch.testing.assert_close(
        float((x - found).norm() / x.norm()), errors[-1], rtol=1e-8, atol=1e-12
    )


def test_hoi_recovers_a_planted_multilinear_rank():
    planted = torch.einsum("abij,ta,sb->tsij", randn(4, 3, 3, 3), randn(12, 4), randn(10, 3))
    assert hoi(planted, (4, 3), (0, 1))[2][-1] < 1e-7
    assert hoi(planted, (3, 3), (0, 1))[2][-1] > 1e-2
    assert hoi(planted, (4, 3, 3, 3), (0, 1, 2, 3))[2][-1] < 1e-7


def test_unfold():
    x = randn(2, 3, 4, 5)
    assert torch.equal(unfold(x, 0), x.reshape(2, -1))
    assert torch.equal(unfold(x, 1), x.permute(1, 0, 2, 3).reshape(3, -1))


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (4, 7, 1, 7), (5, 5, 3, 3)])
def test_vh_is_the_optimum(shape):
    weight = randn(*shape)
    t, s, kh, kw = shape
    singular = torch.linalg.svdvals(vh_matrix(weight))
    for rank in (1, 3):
        v, h, rest = vh_closed_form(weight, rank)
        assert v.shape == (rank, s, kh) and h.shape == (t, rank, kw)
        found = torch.einsum("ksi,tkj->tsij", v, h)
        error = (weight - found).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum(), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(rest, singular[rank:])
