"""WinogradConv2d is what it replaces: arguments, values, state, hooks, training."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import sparsecnn
from sparsecnn.nn import WinogradConv2d
from tests import reference

INDICES = {"col_idx", "row_ptr"}
kinds = pytest.mark.parametrize("tile, sparse", [(4, False), (2, True), (2, False), (4, True)])


def conv(*args: Any, seed: int = 0, **kwargs: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(*args, **kwargs)


def mask_of(dense: nn.Conv2d, tile: int, keep: float = 0.5, seed: int = 0) -> Tensor:
    """Random taps to keep."""
    k, c = dense.weight.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((tile + 2) ** 2, k, c, generator=generator) < keep


def make(dense: nn.Conv2d, tile: int, sparse: bool, **kwargs: Any) -> WinogradConv2d:
    mask = mask_of(dense, tile) if sparse else None
    return WinogradConv2d.from_dense(dense, tile, mask=mask, **kwargs)


def expected(layer: WinogradConv2d, x: Tensor, **kwargs: Any) -> Tensor:
    """By the reference, from the layer's own taps; padding as numbers."""
    bias = None if layer.bias is None else layer.bias.detach()
    taps = layer.weight.taps().detach()
    return reference.winograd_conv2d(x, taps, bias, groups=layer.groups, **kwargs)


# Every argument of nn.Conv2d that the transform allows away from its default.
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"stride": (1, 1), "dilation": (1, 1)},
    {"padding": (0, 3)},
    {"padding": "valid"},
    {"padding": "same"},
    {"groups": 2},
    {"groups": 6},
    {"bias": False},
    {"padding_mode": "reflect", "padding": (1, 2)},
    {"padding_mode": "replicate", "padding": (2, 1)},
    {"padding_mode": "circular", "padding": "same"},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"device": "cpu"},
]


def test_constructor_has_the_arguments_of_the_dense_layer() -> None:
    mine = inspect.signature(WinogradConv2d).parameters
    theirs = inspect.signature(nn.Conv2d).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert mine[name].default == parameter.default, name
    assert set(mine) - set(theirs) == {"activation", "tile"} and mine["tile"].default == 4
    exercised = {name for arguments in ARGUMENTS for name in arguments}
    assert exercised | {"in_channels", "out_channels", "kernel_size"} == set(theirs)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("tile", [2, 4])
def test_every_argument_is_honoured(tile: int, arguments: dict[str, Any]) -> None:
    torch.manual_seed(1)
    fresh = nn.Conv2d(6, 12, 3, **arguments)
    torch.manual_seed(1)
    ours = WinogradConv2d(6, 12, 3, **arguments, tile=tile)
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(fresh, name), name
    # A fresh layer starts with the weights nn.Conv2d draws from the same seed, transformed.
    taps = reference.winograd_taps(fresh.weight.detach(), tile).to(fresh.weight.dtype)
    torch.testing.assert_close(ours.weight.taps(), taps)

    dense = conv(6, 12, 3, **arguments)
    packed = WinogradConv2d.from_dense(dense, tile)
    x = torch.randn(2, 6, 9, 11).to(dense.weight.dtype)
    got, want = packed(x), dense(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 4e-2}[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    back = packed.to_dense()
    assert type(back) is nn.Conv2d and back.extra_repr() == dense.extra_repr()
    # The taps were rounded, which of a weight far below the largest is more than a unit.
    atol = 8 * torch.finfo(want.dtype).eps * float(dense.weight.detach().abs().max())
    torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=atol)
    assert back.weight.is_contiguous() and back.bias is packed.bias


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@kinds
def test_activation_is_applied_after_the_residual(tile: int, sparse: bool, name: str) -> None:
    layer = make(conv(4, 8, 3, padding=(1, 2)), tile, sparse, activation=name)
    x, residual = 3 * torch.randn(2, 4, 6, 7), 3 * torch.randn(2, 8, 6, 9)
    options: dict[str, Any] = {"padding": (1, 1, 2, 2), "activation": name}
    want = expected(layer, x, **options).float()
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    want = expected(layer, x, residual=residual, **options).float()
    torch.testing.assert_close(layer(x, residual), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x[0], residual[0]), want[0], atol=1e-5, rtol=1e-5)


@kinds
def test_unbatched_and_empty_inputs(tile: int, sparse: bool) -> None:
    layer = make(conv(4, 8, 3), tile, sparse)
    x = torch.randn(4, 6, 7)
    assert torch.equal(layer(x), layer(x[None])[0]) and layer(x).shape == (8, 4, 5)
    y = layer(torch.randn(0, 4, 9, 8, requires_grad=True))
    assert y.shape == (0, 8, 7, 6)
    y.sum().backward()
    assert layer.values.grad is not None and not layer.values.grad.any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tile", [2, 4])
def test_a_mask_keeps_what_it_says(tile: int, groups: int) -> None:
    dense = conv(4, 20, 3, padding=1, groups=groups)
    with torch.no_grad():
        dense.weight[3] = 0  # a filter whose taps are zero is kept all the same
        dense.weight[7] = float("inf")  # and one that is not finite is pruned where it says so
    mask = mask_of(dense, tile)
    mask[:, 3], mask[:, 7] = True, False
    layer = WinogradConv2d.from_dense(dense, tile, mask=mask)
    assert layer.nnz == int(mask.sum()) and layer.density == layer.nnz / mask.numel()
    assert layer.weight.is_sparse
    taps = reference.winograd_taps(dense.weight.detach(), tile).float()
    want = torch.where(mask, taps, torch.zeros_like(taps))
    torch.testing.assert_close(layer.weight.taps(), want)
    assert not layer.weight.taps()[~mask].any()
    x = torch.randn(2, 4, 7, 6)
    pads: dict[str, Any] = {"padding": (1, 1, 1, 1)}
    torch.testing.assert_close(layer(x), expected(layer, x, **pads).float(), atol=1e-5, rtol=1e-5)
    # The filter of zeros learns.
    layer(x).square().sum().backward()
    assert layer.values.grad is not None
    moved = mask.new_zeros(mask.shape).float()
    moved[mask] = 1
    grads = layer.values.grad[layer.weight.stored(moved * (torch.arange(20) == 3)[:, None]) > 0]
    assert len(grads) == mask[:, 3].sum() and bool((grads != 0).any())


def test_everything_may_be_pruned() -> None:
    dense = conv(4, 8, 3, padding="same")
    layer = WinogradConv2d.from_dense(dense, mask=torch.zeros(36, 8, 4, dtype=torch.bool))
    assert layer.nnz == 0 and layer.density == 0 and dense.bias is not None
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(layer(x), dense.bias[:, None, None].expand(1, 8, 5, 5))
    assert not layer.to_dense().weight.any()


def test_what_is_printed() -> None:
    dense = conv(4, 8, 3)
    assert "bias=True, tile=4, activation=none" in repr(WinogradConv2d.from_dense(dense))
    layer = make(dense, 2, True, activation="relu")
    assert f"tile=2, density={layer.density:.3f}, activation=relu" in repr(layer)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": 5}, r"kernel_size 3, got \(5, 5\)"),
    ({"kernel_size": (3, 1)}, r"kernel_size 3, got \(3, 1\)"),
    ({"stride": 2}, r"stride 1, got \(2, 2\)"),
    ({"stride": (1, 2)}, r"stride 1, got \(1, 2\)"),
    ({"dilation": 2}, r"dilation 1, got \(2, 2\)"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=lambda v: str(v)[:30])
def test_other_geometries_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    arguments = {"kernel_size": 3} | arguments
    with pytest.raises(NotImplementedError, match=f"WinogradConv2d: expected {message}"):
        WinogradConv2d(4, 8, **arguments)
    with pytest.raises(NotImplementedError, match=f"WinogradConv2d: expected {message}"):
        WinogradConv2d.from_dense(conv(4, 8, **arguments))


def test_other_bad_arguments_are_refused_by_name() -> None:
    dense = conv(4, 8, 3)
    refused: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "tile 2 or 4, got 3", lambda: WinogradConv2d(4, 8, 3, tile=3)),
        (ValueError, "tile 2 or 4, got 6", lambda: WinogradConv2d.from_dense(dense, 6)),
        (ValueError, "activation .*got 'gelu'", lambda: make(dense, 4, True, activation="gelu")),
        (
            TypeError, r"conv an nn\.Conv2d, got Linear",
            lambda: WinogradConv2d.from_dense(nn.Linear(3, 4)),  # type: ignore[arg-type]
        ),
        (
            TypeError, "mask a boolean tensor, got torch.float32",
            lambda: WinogradConv2d.from_dense(dense, mask=torch.ones(36, 8, 4)),
        ),
        (
            TypeError, "mask a boolean tensor, got list",
            lambda: WinogradConv2d.from_dense(dense, mask=[True]),  # type: ignore[arg-type]
        ),
        (
            ValueError, r"mask of shape \(16, 8, 4\), got \(36, 8, 4\)",
            lambda: WinogradConv2d.from_dense(dense, 2, mask=mask_of(dense, 4)),
        ),
    ]  # fmt: skip
    for error, message, call in refused:
        with pytest.raises(error, match=f"WinogradConv2d: expected {message}"):
            call()
    with pytest.raises(ValueError, match=r"winograd_conv2d: expected x with 4 channels .*got 5"):
        make(dense, 4, True)(torch.zeros(1, 5, 6, 6))


# ---- what belongs to the user --------------------------------------------------------------------


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
@kinds
def test_copies_compute_the_same_and_are_independent(
    tile: int, sparse: bool, copier: str
) -> None:
    layer = make(conv(4, 8, 3, padding="same"), tile, sparse, activation="silu")
    data = torch.randn(2, 4, 6, 7)
    want = layer(data)
    if copier == "deepcopy":
        other = copy.deepcopy(layer)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(data), want) and repr(other) == repr(layer)
    with torch.no_grad():
        other.values.zero_()
    assert torch.equal(layer(data), want)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@kinds
def test_state_dict_round_trip(tile: int, sparse: bool, assign: bool) -> None:
    """A sparse one also with other positions and another number of values."""
    source = make(conv(4, 8, 3, seed=1), tile, sparse)
    other = conv(4, 8, 3, seed=2)
    mask = mask_of(other, tile, 0.8, seed=3) if sparse else None
    target = WinogradConv2d.from_dense(other, tile, mask=mask)
    names = {"values", "bias"} | (INDICES if sparse else set())
    assert set(source.state_dict()) == names
    assert (source.nnz != target.nnz) == sparse
    result = target.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(target(x), source(x)) and target.nnz == source.nnz
    assert target.values.requires_grad and isinstance(target.values, nn.Parameter)
    target.weight.validate()


@kinds
def test_a_dense_weight_loads(tile: int, sparse: bool) -> None:
    """Transformed; a sparse layer takes the taps at its positions."""
    dense, layer = conv(4, 8, 3, seed=5), make(conv(4, 8, 3), tile, sparse)
    mask = mask_of(dense, tile) if sparse else torch.ones((tile + 2) ** 2, 8, 4, dtype=torch.bool)
    layer.load_state_dict(dense.state_dict())
    taps = reference.winograd_taps(dense.weight.detach(), tile).float()
    torch.testing.assert_close(layer.weight.taps(), taps * mask)
    assert layer.nnz == int(mask.sum()) and torch.equal(layer.bias, dense.bias)
    x = torch.randn(2, 4, 6, 6)
    if not sparse:
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    nested = nn.Sequential(make(conv(4, 8, 3), tile, sparse))
    nested.load_state_dict({f"0.{name}": t for name, t in dense.state_dict().items()})
    assert torch.equal(nested(x), layer(x))


def test_bad_states_are_refused_by_name_and_leave_the_layer_alone() -> None:
    layer, full = make(conv(4, 8, 3), 4, True), make(conv(4, 8, 3), 4, False)
    good = layer.state_dict()
    before = {name: value.clone() for name, value in good.items()}
    columns, ends = good["col_idx"].clone(), good["row_ptr"].clone()
    columns[0], ends[1] = 4, -1
    for change, message in (
        ({"col_idx": columns}, r"col_idx in \[0, 4\)"),
        ({"row_ptr": ends}, r"row_ptr"),
        ({"row_ptr": ends[:-1]}, r"row_ptr"),
        ({"values": good["values"][:-1]}, r"nnz"),
        ({"values": full.state_dict()["values"]}, r"values"),
    ):
        with pytest.raises(RuntimeError, match=rf"WinogradConv2d: [\s\S]*{message}"):
            layer.load_state_dict(good | change)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), f"{message}: {name} changed"
    # Sparse into dense, dense into sparse, tiles of another size.
    with pytest.raises(RuntimeError, match=r"values of shape \(1, 36, 4, 8\), got \(\d+,\)"):
        full.load_state_dict(good)
    with pytest.raises(RuntimeError, match="col_idx"):
        layer.load_state_dict(full.state_dict())
    with pytest.raises(RuntimeError, match=r"\(1, 16, 4, 8\), got \(1, 36, 4, 8\)"):
        make(conv(4, 8, 3), 2, False).load_state_dict(full.state_dict())
    with pytest.raises(RuntimeError, match=r"WinogradConv2d: expected weight of shape \(8, 4, 3, "):
        full.load_state_dict({"weight": torch.zeros(8, 4, 1, 1), "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match="values"):
        full.load_state_dict({"bias": torch.zeros(8)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@kinds
def test_dtype_moves(tile: int, sparse: bool, dtype: torch.dtype) -> None:
    layer = make(conv(4, 8, 3), tile, sparse).to(dtype)
    assert layer.values.dtype == dtype and layer.bias is not None and layer.bias.dtype == dtype
    if sparse:
        assert layer.col_idx is not None and layer.row_ptr is not None
        assert layer.col_idx.dtype == layer.row_ptr.dtype == torch.int32
    x = torch.randn(2, 4, 6, 6).to(dtype)
    bits = 1e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(layer(x), expected(layer, x).to(dtype), rtol=bits, atol=bits)
    half = make(conv(4, 8, 3), tile, sparse).half()
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        half(torch.randn(1, 4, 6, 6).half())


def test_flags_and_hooks_are_kept() -> None:
    dense = conv(4, 8, 3).eval()
    dense.weight.requires_grad_(False)
    seen: list[str] = []
    dense.register_forward_hook(lambda *_: seen.append("forward"))
    dense.register_forward_pre_hook(lambda *_: seen.append("pre"))
    for count, sparse in enumerate((False, True)):
        layer = make(dense, 4, sparse)
        assert not layer.training and not layer.values.requires_grad
        assert layer.bias is dense.bias
        layer(torch.randn(1, 4, 5, 5))
        back = layer.to_dense()
        assert not back.training and not back.weight.requires_grad
        back(torch.randn(1, 4, 5, 5))
        assert seen == ["pre", "forward"] * 2 * (count + 1)


@pytest.mark.parametrize("tile", [2, 4])
def test_masks_and_parametrizations_are_baked_in(tile: int) -> None:
    x = torch.randn(1, 4, 6, 6)
    dense = nn.Conv2d(4, 8, 3)
    prune.ln_structured(dense, "weight", amount=2, n=2, dim=1)
    layer = WinogradConv2d.from_dense(dense, tile)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    dense = conv(4, 8, 3)
    parametrize.register_parametrization(dense, "weight", Double())
    layer = WinogradConv2d.from_dense(dense, tile)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


@kinds
def test_training_moves_the_taps_that_are_kept(tile: int, sparse: bool) -> None:
    """As gradient descent on the reference's taps does; what is pruned stays pruned."""
    dense = conv(4, 8, 3, padding=1, dtype=torch.float64)
    mask = mask_of(dense, tile) if sparse else torch.ones((tile + 2) ** 2, 8, 4, dtype=torch.bool)
    layer = make(dense, tile, sparse)
    taps = layer.weight.taps().detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    mine = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    theirs = torch.optim.SGD([taps, bias], lr=0.01, momentum=0.9)
    for _ in range(3):
        mine.zero_grad()
        layer(x).square().mean().backward()
        mine.step()
        theirs.zero_grad()
        reference.winograd_conv2d(x, taps, bias, padding=(1, 1, 1, 1)).square().mean().backward()
        assert taps.grad is not None
        taps.grad.mul_(mask)
        theirs.step()
    torch.testing.assert_close(layer.weight.taps(), taps)
    torch.testing.assert_close(layer.bias, nn.Parameter(bias))
    # What fills the last block of filters has stayed zero.
    layer.weight.validate()
    assert not layer.weight.taps()[~mask].any()


def test_filters_that_fill_a_block_stay_zero() -> None:
    """Weight decay and gradients leave them alone: they are no parameters of the model."""
    layer = make(conv(4, 5, 3), 4, False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 4, 9, 9)).square().mean().backward()
    optimizer.step()
    assert layer.values[..., :5].all() and not layer.values[..., 5:].any()
    assert layer.nnz == 36 * 5 * 4 and layer.density == 1


@kinds
def test_channels_last_stays(tile: int, sparse: bool) -> None:
    layer = make(conv(4, 8, 3), tile, sparse)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    # Of a model in channels_last too, whose weights of four dimensions are laid out anew.
    want = layer(x)
    assert torch.equal(layer.to(memory_format=torch.channels_last)(x), want)


@kinds
def test_densify_gives_a_dense_layer_back(tile: int, sparse: bool) -> None:
    layer = make(conv(4, 8, 3), tile, sparse)
    nearest = layer.weight.to_dense().detach()
    back = sparsecnn.densify(nn.Sequential(layer, nn.ReLU()))
    assert type(back[0]) is nn.Conv2d and torch.equal(back[0].weight, nearest)
    model = nn.Sequential(make(conv(4, 8, 3), tile, sparse), nn.ReLU())
    with pytest.raises(ValueError, match=r"dense layers, got WinogradConv2d at '0'"):
        sparsecnn.accelerate(model, torch.randn(1, 4, 6, 6))
