"""Circulant layers are the dense layers with the matrix circ(q) D, by FFT and by product."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from sparsecnn.nn.circulant import (
    FFT_FROM,
    CirculantLinear,
    CirculantPointwise,
    circulant,
    nearest_circulant,
)

SIZES = (1, 2, 3, 7, 16, FFT_FROM - 1, FFT_FROM, FFT_FROM + 1, 200, 251)


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=source, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("d", SIZES)
def test_convention_is_that_of_scipy(d: int) -> None:
    q = normal(d)
    want = scipy.linalg.circulant(q.numpy())
    np.testing.assert_array_equal(circulant(q).numpy(), want)
    assert torch.equal(circulant(q)[:, 0], q)  # q is the first column, not the first row
    torch.testing.assert_close(nearest_circulant(circulant(q)), q, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sign_flip", [False, True])
@pytest.mark.parametrize("d", SIZES)
def test_fft_path_is_the_circulant_product(d: int, sign_flip: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer = CirculantLinear(d, dtype=dtype, sign_flip=sign_flip, seed=d)
        matrix = scipy.linalg.circulant(layer.weight.detach().numpy())
        if sign_flip:
            assert layer.signs is not None and (layer.signs.abs() == 1).all()
            matrix = matrix @ np.diag(layer.signs.numpy())
        x = normal(3, 2, d, dtype=dtype)
        assert layer.bias is not None
        want = torch.from_numpy(matrix @ x[..., None].numpy())[..., 0] + layer.bias
        torch.testing.assert_close(layer(x), want, rtol=tolerance, atol=tolerance)
        # Both paths, whatever the size.
        by_fft = layer._convolved(x, -1) + layer.bias
        torch.testing.assert_close(by_fft, want, rtol=tolerance, atol=tolerance)
        dense = layer.to_dense()
        torch.testing.assert_close(dense(x), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("d", [5, FFT_FROM])
def test_pointwise_is_the_linear_layer_on_every_pixel(d: int) -> None:
    layer = CirculantPointwise(d, dtype=torch.float64, seed=3)
    linear = CirculantLinear(d, dtype=torch.float64, seed=3)
    x = normal(2, d, 3, 4)
    want = linear(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x[0]), want[0])
    torch.testing.assert_close(layer.to_dense()(x), want)


@pytest.mark.parametrize("d", [5, FFT_FROM])
def test_large_layers_do_not_make_the_matrix(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(q: Tensor) -> Tensor:
        raise AssertionError("the matrix was made")

    layers = [(CirculantLinear(d), (2, d)), (CirculantPointwise(d), (2, d, 3, 3))]
    monkeypatch.setattr("sparsecnn.nn.circulant.circulant", refuse)
    for layer, size in layers:
        x = normal(*size, dtype=torch.float32)
        if d < FFT_FROM:
            with pytest.raises(AssertionError, match="the matrix was made"):
                layer(x)
        else:
            layer(x)


@pytest.mark.parametrize("d", [4, 5, FFT_FROM])
def test_gradients_agree_with_the_dense_layer(d: int) -> None:
    layer = CirculantLinear(d, dtype=torch.float64)
    x = normal(3, d).requires_grad_()
    weights = normal(3, d, seed=1)
    (layer(x) * weights).sum().backward()
    other = x.detach().clone().requires_grad_()
    q = layer.weight.detach().clone().requires_grad_()
    assert layer.bias is not None
    (((other * layer.signs) @ circulant(q).T + layer.bias) * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, q.grad)


def test_from_dense_is_the_nearest_circulant() -> None:
    linear = nn.Linear(6, 6, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(normal(6, 6))
    for sign_flip in (False, True):
        layer = CirculantLinear.from_dense(linear, sign_flip=sign_flip)
        basis = torch.stack([circulant(e) for e in torch.eye(6, dtype=torch.float64)])
        if layer.signs is not None:
            basis = basis * layer.signs
        want = torch.linalg.lstsq(basis.flatten(1).T, linear.weight.detach().reshape(-1)).solution
        torch.testing.assert_close(layer.weight.detach(), want)
        assert layer.bias is linear.bias


@pytest.mark.parametrize("pointwise", [False, True])
def test_from_dense_and_back(pointwise: bool) -> None:
    make = CirculantPointwise if pointwise else CirculantLinear
    layer = make(7, bias=pointwise, seed=2)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    layer.weight.requires_grad_(False)
    dense = layer.eval().to_dense()
    back = make.from_dense(dense, seed=2)
    torch.testing.assert_close(back.weight, layer.weight)
    assert torch.equal(back.signs, layer.signs) and back.bias is layer.bias
    for other in (dense, back):
        assert not other.training and not other.weight.requires_grad
        x = normal(2, 7, *([3, 3] if pointwise else []), dtype=torch.float32)
        torch.testing.assert_close(other(x), layer(x))


def test_seed_state_and_copies() -> None:
    one, two, other = (CirculantLinear(9, seed=s) for s in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(
        one.state_dict().values(), two.state_dict().values(), strict=True
    ))  # fmt: skip
    assert not torch.equal(one.weight, other.weight) and not torch.equal(one.signs, other.signs)
    other.load_state_dict(one.state_dict())
    x = normal(2, 9, dtype=torch.float32)
    assert torch.equal(other(x), one(x)) and torch.equal(copy.deepcopy(one)(x), one(x))
    assert set(one.state_dict()) == {"weight", "bias", "signs"}
    assert set(CirculantLinear(9, bias=False, sign_flip=False).state_dict()) == {"weight"}
    assert sum(p.numel() for p in CirculantLinear(500, bias=False).parameters()) == 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, FFT_FROM])
def test_half_precision(d: int, dtype: torch.dtype) -> None:
    layer = CirculantLinear(d, dtype=torch.float32)
    x = normal(4, d, dtype=torch.float32)
    got = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), layer(x), rtol=5e-2, atol=5e-2)


def test_export_with_a_dynamic_batch() -> None:
    for d in (8, FFT_FROM):
        layer = CirculantLinear(d)
        shapes = {"x": {0: torch.export.Dim("n", min=2)}}
        program = torch.export.export(
            layer, (normal(3, d, dtype=torch.float32),), dynamic_shapes=shapes
        )
        x = normal(5, d, seed=1, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_bad_arguments_are_refused() -> None:
    for bad in (0, True, 2.0):
        with pytest.raises(ValueError, match="expected channels an integer >= 1"):
            CirculantLinear(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 inputs and 6 outputs"):
        CirculantLinear.from_dense(nn.Linear(4, 6))
    with pytest.raises(TypeError, match=r"expected linear an nn.Linear, got Conv2d"):
        CirculantLinear.from_dense(nn.Conv2d(4, 4, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected conv an nn.Conv2d, got Linear"):
        CirculantPointwise.from_dense(nn.Linear(4, 4))  # type: ignore[arg-type]
    for options, message in (
        ({"kernel_size": 3}, "expected kernel_size"),
        ({"kernel_size": 1, "stride": 2}, "expected stride"),
        ({"kernel_size": 1, "groups": 2}, "expected groups"),
        ({"kernel_size": 1, "padding": 1}, "expected padding 0"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            CirculantPointwise.from_dense(nn.Conv2d(4, 4, **options))
    for d in (4, FFT_FROM):
        with pytest.raises(ValueError, match=rf"CirculantLinear: expected x .* with {d} channels"):
            CirculantLinear(d)(torch.zeros(2, 1))
        with pytest.raises(ValueError, match=rf"CirculantPointwise: .* with {d} channels"):
            CirculantPointwise(d)(torch.zeros(d, 3))
