"""CSRConv2d and CSRLinear are what they replace: arguments, values, state, hooks, training."""

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

from sparsecnn.nn import SPARSE_LAYERS, CSRConv2d, CSRLinear
from tests import reference


def sparsify(layer: Any, density: float = 0.3, seed: int = 0) -> Any:
    """Zero most of the weight, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        keep = torch.rand(layer.weight.shape, generator=generator) < density
        layer.weight.mul_(keep.to(layer.weight))
    return layer


def conv(*args: Any, seed: int = 0, density: float = 0.3, **kwargs: Any) -> nn.Conv2d:
    """A dense convolution with a sparse weight."""
    torch.manual_seed(seed)
    layer: nn.Conv2d = sparsify(nn.Conv2d(*args, **kwargs), density)
    return layer


def linear(*args: Any, seed: int = 0, density: float = 0.3, **kwargs: Any) -> nn.Linear:
    """A dense linear layer with a sparse weight."""
    torch.manual_seed(seed)
    layer: nn.Linear = sparsify(nn.Linear(*args, **kwargs), density)
    return layer


# Every argument of nn.Conv2d away from its default, alone and in pairs that interact.
CONV_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"kernel_size": (3, 5)},
    {"kernel_size": 1},
    {"stride": 2},
    {"stride": (1, 3)},
    {"padding": 2},
    {"padding": (0, 3)},
    {"padding": "valid"},
    {"padding": "same"},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "same", "kernel_size": (4, 2), "dilation": (2, 3)},
    {"dilation": 2},
    {"dilation": (1, 3), "padding": 3},
    {"groups": 2},
    {"groups": 6},
    {"bias": False},
    {"padding_mode": "zeros", "padding": 1},
    {"padding_mode": "reflect", "padding": (1, 2)},
    {"padding_mode": "replicate", "padding": (2, 1)},
    {"padding_mode": "circular", "padding": 2},
    {"padding_mode": "circular", "padding": "same", "kernel_size": (2, 3)},
    {"padding_mode": "reflect", "padding": 0},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"device": "cpu"},
]


@pytest.mark.parametrize("ours, dense", [(CSRConv2d, nn.Conv2d), (CSRLinear, nn.Linear)])
def test_constructor_has_the_arguments_of_the_dense_layer(ours: type, dense: type) -> None:
    mine = inspect.signature(ours).parameters
    theirs = inspect.signature(dense).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert mine[name].default == parameter.default, name
        assert mine[name].kind == parameter.kind, name
    extra = set(mine) - set(theirs)
    assert extra == {"activation"}
    assert mine["activation"].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_argument_is_exercised_below() -> None:
    exercised = {name for arguments in CONV_ARGUMENTS for name in arguments}
    assert exercised | {"in_channels", "out_channels"} == set(
        inspect.signature(nn.Conv2d).parameters
    )


@pytest.mark.parametrize("arguments", CONV_ARGUMENTS, ids=str)
def test_conv_honours_every_argument(arguments: dict[str, Any]) -> None:
    arguments = {"kernel_size": 3} | arguments
    torch.manual_seed(1)
    dense = nn.Conv2d(6, 6, **arguments)
    torch.manual_seed(1)
    ours = CSRConv2d(6, 6, **arguments)
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(dense, name), name
    # A fresh layer starts with the weights nn.Conv2d draws from the same seed.
    assert torch.equal(ours.weight.to_dense(), dense.weight)
    assert ours.values.dtype == dense.weight.dtype
    assert (ours.bias is None) == (dense.bias is None)

    sparsify(dense)
    packed = CSRConv2d.from_dense(dense)
    x = torch.randn(2, 6, 9, 11).to(dense.weight.dtype)
    got, want = packed(x), dense(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 3e-2}[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_is_applied_after_the_residual(name: str) -> None:
    dense = conv(4, 5, 3, padding=1)
    packed = CSRConv2d.from_dense(dense, activation=name)
    x, residual = 3 * torch.randn(2, 4, 6, 7), 3 * torch.randn(2, 5, 6, 7)
    y = dense(x)
    torch.testing.assert_close(packed(x), reference.activate(y, name))
    torch.testing.assert_close(packed(x, residual), reference.activate(y + residual, name))
    # The activation belongs to the packed layer: the dense twin is the bare convolution.
    torch.testing.assert_close(packed.to_dense()(x), y)
    dense_linear = linear(7, 9)
    z = 5 * torch.randn(4, 7)
    torch.testing.assert_close(
        CSRLinear.from_dense(dense_linear, activation=name)(z),
        reference.activate(dense_linear(z), name),
    )


def test_unbatched_input() -> None:
    dense = conv(4, 5, 3)
    packed = CSRConv2d.from_dense(dense)
    x = torch.randn(4, 6, 7)
    torch.testing.assert_close(packed(x), dense(x))
    residual = torch.randn(5, 4, 5)
    torch.testing.assert_close(packed(x, residual), dense(x) + residual)


@pytest.mark.parametrize(
    "shape", [(9,), (1, 9), (5, 9), (2, 3, 9), (2, 0, 9), (0, 9), (2, 3, 4, 9)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_takes_any_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    dense = linear(9, 6, bias=bias)
    packed = CSRLinear.from_dense(dense)
    x = torch.randn(shape)
    got = packed(x)
    assert got.shape == dense(x).shape
    torch.testing.assert_close(got, dense(x))
    strided = torch.randn(*shape[:-1], 18)[..., ::2]
    torch.testing.assert_close(packed(strided), dense(strided))


def test_linear_gradients_are_those_of_the_dense_layer() -> None:
    dense = linear(9, 6, dtype=torch.float64)
    packed = CSRLinear.from_dense(dense)
    for shape in ((4, 9), (2, 3, 9), (0, 9)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        want = torch.autograd.grad(dense(x).square().sum(), [x, dense.weight, dense.bias])
        got = torch.autograd.grad(packed(x).square().sum(), [x, packed.values, packed.bias])
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1][dense.weight != 0])
        torch.testing.assert_close(got[2], want[2])


def test_empty_batch() -> None:
    packed = CSRConv2d.from_dense(conv(4, 5, 3, stride=2))
    assert packed(torch.randn(0, 4, 9, 8)).shape == (0, 5, 4, 3)
    y = packed(torch.randn(0, 4, 9, 8, requires_grad=True)).sum()
    y.backward()
    assert packed.values.grad is not None and not packed.values.grad.any()


@pytest.mark.parametrize("arguments", CONV_ARGUMENTS, ids=str)
def test_conv_round_trip_is_bitwise(arguments: dict[str, Any]) -> None:
    dense = conv(6, 6, **({"kernel_size": 3} | arguments))
    back = CSRConv2d.from_dense(dense).to_dense()
    assert type(back) is nn.Conv2d
    assert torch.equal(back.weight, dense.weight)
    assert back.weight.dtype == dense.weight.dtype
    assert (back.bias is None) == (dense.bias is None)
    if dense.bias is not None and back.bias is not None:
        assert torch.equal(back.bias, dense.bias)
    assert back.extra_repr() == dense.extra_repr()
    x = torch.randn(1, 6, 9, 9).to(dense.weight.dtype)
    assert torch.equal(back(x), dense(x))


def test_linear_round_trip_is_bitwise() -> None:
    for bias in (True, False):
        dense = linear(9, 6, bias=bias, dtype=torch.bfloat16)
        back = CSRLinear.from_dense(dense).to_dense()
        assert type(back) is nn.Linear
        assert torch.equal(back.weight, dense.weight)
        assert back.extra_repr() == dense.extra_repr()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(density: float) -> None:
    dense = conv(4, 5, 3, padding=1, density=density + 1e-6 if density else -1)
    packed = CSRConv2d.from_dense(dense)
    assert packed.density == density
    assert packed.nnz == packed.values.numel() == int(density * 180)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(packed(x), dense(x))
    assert torch.equal(packed.to_dense().weight, dense.weight)


# ---- what belongs to the user --------------------------------------------------------------------


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_independent(copier: str) -> None:
    for packed, x in (
        (CSRConv2d.from_dense(conv(4, 5, 3, padding="same"), activation="silu"), (2, 4, 6, 7)),
        (CSRLinear.from_dense(linear(4, 5), activation="relu"), (3, 4)),
    ):
        data = torch.randn(x)
        want = packed(data)
        if copier == "deepcopy":
            other = copy.deepcopy(packed)
        elif copier == "pickle":
            other = pickle.loads(pickle.dumps(packed))
        else:
            buffer = io.BytesIO()
            torch.save(packed, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        assert torch.equal(other(data), want)
        assert repr(other) == repr(packed)
        with torch.no_grad():
            other.values.zero_()
        assert torch.equal(packed(data), want)


def test_state_dict_keys_and_round_trip_with_another_number_of_nonzeros() -> None:
    source = CSRConv2d.from_dense(conv(4, 5, 3, density=0.2, seed=1))
    target = CSRConv2d.from_dense(conv(4, 5, 3, density=0.8, seed=2))
    state = source.state_dict()
    assert set(state) == {"values", "col_idx", "row_ptr", "bias"}
    assert source.nnz != target.nnz
    result = target.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(target(x), source(x))
    assert target.values.requires_grad and isinstance(target.values, nn.Parameter)
    assert target.nnz == source.nnz


def test_state_dict_inside_a_model() -> None:
    def model(seed: int) -> nn.Sequential:
        return nn.Sequential(
            CSRConv2d.from_dense(conv(3, 4, 3, seed=seed, density=0.1 * seed)),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            CSRLinear.from_dense(linear(64, 5, seed=seed, density=0.2 * seed)),
        ).eval()

    source, target = model(2), model(4)
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(source(x), target(x))
    assigned = model(3)
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(source(x), assigned(x))


def test_dense_weights_load() -> None:
    dense, dense_linear = conv(4, 5, 3, seed=5), linear(7, 6, seed=5)
    packed = CSRConv2d(4, 5, 3)
    packed.load_state_dict(dense.state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(packed(x), dense(x))
    assert packed.nnz == int((dense.weight != 0).sum())
    packed_linear = CSRLinear(7, 6)
    packed_linear.load_state_dict(dense_linear.state_dict())
    z = torch.randn(3, 7)
    torch.testing.assert_close(packed_linear(z), dense_linear(z))


def test_bad_states_are_refused_by_name_and_leave_the_layer_alone() -> None:
    packed = CSRConv2d.from_dense(conv(4, 5, 3))
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    good = packed.state_dict()
    wrong_column = good["col_idx"].clone()
    wrong_column[0] = 36
    wrong_rows = good["row_ptr"].clone()
    wrong_rows[1] = -1
    for change, message in (
        ({"col_idx": wrong_column}, r"col_idx in \[0, 36\)"),
        ({"row_ptr": wrong_rows}, r"row_ptr"),
        ({"row_ptr": good["row_ptr"][:-1]}, r"row_ptr with K \+ 1 = 6"),
        ({"values": good["values"][:-1]}, r"col_idx with nnz"),
    ):
        with pytest.raises(RuntimeError, match=message):
            packed.load_state_dict(good | change)
        for name, value in packed.state_dict().items():
            assert torch.equal(value, before[name]), f"{message}: {name} changed"
    with pytest.raises(RuntimeError, match=r"CSRConv2d: expected weight of shape \(5, 4, 3, 3\)"):
        packed.load_state_dict({"weight": torch.zeros(5, 4, 1, 1), "bias": torch.zeros(5)})
    with pytest.raises(RuntimeError, match="values"):
        packed.load_state_dict({"bias": torch.zeros(5)})
    with pytest.raises(RuntimeError, match="extra"):
        packed.load_state_dict(good | {"extra": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_moves(dtype: torch.dtype) -> None:
    dense = conv(4, 5, 3)
    packed = CSRConv2d.from_dense(dense).to(dtype)
    assert packed.values.dtype == dtype and packed.bias is not None and packed.bias.dtype == dtype
    assert packed.col_idx.dtype == packed.row_ptr.dtype == torch.int32
    x = torch.randn(2, 4, 6, 6).to(dtype)
    bits = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(packed(x), dense.to(dtype)(x), rtol=bits, atol=bits)


def test_half_moves_and_says_where_it_can_run() -> None:
    packed = CSRConv2d.from_dense(conv(4, 5, 3)).half()
    assert packed.values.dtype == torch.float16
    assert packed.to_dense().weight.dtype == torch.float16
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        packed(torch.randn(1, 4, 6, 6).half())
    assert torch.equal(packed.float().to_dense().weight, packed.weight.to_dense())


def test_device_moves(device: str) -> None:
    dense = conv(4, 5, 3, padding=1)
    packed = CSRConv2d.from_dense(dense).to(device)
    assert {t.device.type for t in packed.state_dict().values()} == {device}
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(packed(x.to(device)).cpu(), dense(x), rtol=1e-4, atol=1e-5)
    meta = packed.to("meta")
    assert meta(x.to("meta")).shape == (2, 5, 6, 6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_kept(channels_last: bool) -> None:
    packed = nn.Sequential(
        CSRConv2d.from_dense(conv(4, 6, 3, padding=1, padding_mode="reflect")),
        CSRConv2d.from_dense(conv(6, 5, 1), activation="relu"),
    )
    form = torch.channels_last if channels_last else torch.contiguous_format
    packed = packed.to(memory_format=form)
    x = torch.randn(2, 4, 6, 7).contiguous(memory_format=form)
    assert packed(x).is_contiguous(memory_format=form)


def test_requires_grad_and_training_are_kept() -> None:
    for frozen_weight in (False, True):
        for training in (False, True):
            dense = conv(4, 5, 3).train(training)
            dense.weight.requires_grad_(not frozen_weight)
            assert dense.bias is not None
            dense.bias.requires_grad_(frozen_weight)
            packed = CSRConv2d.from_dense(dense)
            back = packed.to_dense()
            assert packed.bias is not None and back.bias is not None
            assert packed.training == back.training == training
            assert packed.values.requires_grad == back.weight.requires_grad == (not frozen_weight)
            assert packed.bias.requires_grad == back.bias.requires_grad == frozen_weight


def test_hooks_are_kept() -> None:
    seen: list[str] = []
    dense = conv(4, 5, 3)
    dense.register_forward_pre_hook(lambda m, a: seen.append("before"))
    dense.register_forward_hook(lambda m, a, y: seen.append("after"))
    dense.register_forward_hook(lambda m, a, k, y: seen.append("kwargs"), with_kwargs=True)
    dense.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    packed = CSRConv2d.from_dense(dense)
    packed(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "kwargs", "backward"]
    seen.clear()
    packed.to_dense()(torch.randn(1, 4, 5, 5))
    assert seen == ["before", "after", "kwargs"]


def test_masks_of_torch_are_baked_in() -> None:
    dense = conv(4, 5, 3, density=1.1)
    prune.l1_unstructured(dense, "weight", amount=0.7)
    prune.random_unstructured(dense, "bias", amount=0.4)
    packed = CSRConv2d.from_dense(dense)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(packed(x), dense(x))
    assert packed.nnz == 180 - round(0.7 * 180)
    assert set(dict(packed.named_parameters())) == {"values", "bias"}
    copy.deepcopy(packed)(x)

    class Mask(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * (w > 0)

    parametrized = conv(4, 5, 3, density=1.1)
    parametrize.register_parametrization(parametrized, "weight", Mask())
    packed = CSRConv2d.from_dense(parametrized)
    torch.testing.assert_close(packed(x), parametrized(x))
    assert packed.nnz == int((parametrized.weight != 0).sum()) < 180
    packed(x).sum().backward()
    assert packed.values.grad is not None


# ---- training ------------------------------------------------------------------------------------


def test_training_is_masked_dense_training() -> None:
    """Ten steps of momentum SGD move kept entries as dense training with a mask does."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        conv(3, 8, 3, padding=1, dtype=torch.float64),
        nn.ReLU(),
        conv(8, 6, 3, stride=2, groups=2, dtype=torch.float64),
        nn.Flatten(),
        linear(6 * 9, 4, dtype=torch.float64),
    )
    assert isinstance(dense[0], nn.Conv2d) and isinstance(dense[2], nn.Conv2d)
    assert isinstance(dense[4], nn.Linear)
    packed = nn.Sequential(
        CSRConv2d.from_dense(copy.deepcopy(dense[0])),
        nn.ReLU(),
        CSRConv2d.from_dense(copy.deepcopy(dense[2])),
        nn.Flatten(),
        CSRLinear.from_dense(copy.deepcopy(dense[4])),
    )
    masks = {p: (p != 0) for layer in (dense[0], dense[2], dense[4]) for p in [layer.weight]}
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    target = torch.randint(0, 4, (16,))
    losses: dict[str, list[float]] = {"dense": [], "packed": []}
    optimizers = {
        "dense": torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9),
        "packed": torch.optim.SGD(packed.parameters(), lr=0.1, momentum=0.9),
    }
    for _ in range(10):
        for name, model in (("dense", dense), ("packed", packed)):
            optimizers[name].zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            losses[name].append(loss.item())
            if name == "dense":
                for p, mask in masks.items():
                    assert p.grad is not None
                    p.grad.mul_(mask)
            optimizers[name].step()
    assert losses["packed"][-1] < 0.9 * losses["packed"][0]
    torch.testing.assert_close(losses["packed"], losses["dense"], rtol=1e-9, atol=0)
    for index in (0, 2, 4):
        weight = packed[index].to_dense().weight
        torch.testing.assert_close(weight, dense[index].weight)
        assert not weight[~masks[dense[index].weight]].any()


def test_autocast_through_a_chain_of_layers() -> None:
    """The second layer gets the bfloat16 output of the first, beside its float32 parameters."""
    chain = nn.Sequential(
        CSRConv2d.from_dense(conv(3, 6, 3, padding=1), activation="relu"),
        nn.Conv2d(6, 6, 1),
        CSRConv2d.from_dense(conv(6, 4, 3)),
        nn.Flatten(),
        CSRLinear.from_dense(linear(4 * 16, 5)),
    )
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = chain(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), chain(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in chain.parameters())


# ---- torch.compile, torch.export -----------------------------------------------------------------


def chain() -> nn.Sequential:
    return nn.Sequential(
        CSRConv2d.from_dense(conv(3, 6, 3, stride=2, padding=1), activation="relu"),
        CSRConv2d.from_dense(conv(6, 4, 3, padding="same", padding_mode="circular")),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        CSRLinear.from_dense(linear(16, 5)),
    ).eval()


def test_compile_and_export() -> None:
    torch._dynamo.reset()
    model = chain()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("h", min=8, max=256)}
    exported = torch.export.export(model, (torch.randn(2, 3, 12, 10),), dynamic_shapes=(sizes,))
    program = exported.module()
    with torch.no_grad():
        for shape in ((2, 3, 12, 10), (5, 3, 9, 10), (3, 3, 31, 10)):
            x = torch.randn(shape)
            assert torch.equal(compiled(x), model(x)), shape
            assert torch.equal(program(x), model(x)), shape


# ---- errors --------------------------------------------------------------------------------------


def test_from_dense_refuses_other_layers() -> None:
    with pytest.raises(TypeError, match=r"expected conv an nn\.Conv2d, got Linear"):
        CSRConv2d.from_dense(nn.Linear(2, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected conv an nn\.Conv2d, got ConvTranspose2d"):
        CSRConv2d.from_dense(nn.ConvTranspose2d(2, 3, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected linear an nn\.Linear, got Conv2d"):
        CSRLinear.from_dense(nn.Conv2d(2, 3, 1))  # type: ignore[arg-type]
    for make in (
        lambda: CSRConv2d(2, 3, 1, activation="tanh"),
        lambda: CSRConv2d.from_dense(nn.Conv2d(2, 3, 1), activation="tanh"),
        lambda: CSRLinear(2, 3, activation="tanh"),
    ):
        with pytest.raises(ValueError, match=r"expected activation one of none, .*got 'tanh'"):
            make()


def test_bad_input_names_the_expectation() -> None:
    packed = CSRConv2d.from_dense(conv(4, 5, 3))
    with pytest.raises(ValueError, match=r"x with 4 channels .*got 3"):
        packed(torch.randn(1, 3, 6, 6))
    with pytest.raises(ValueError, match=r"x of shape \(N, C, H, W\), got \(4, 6\)"):
        packed(torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"residual .*\(1, 5, 4, 4\), got \(1, 5, 3, 4\)"):
        packed(torch.randn(1, 4, 6, 6), torch.randn(1, 5, 3, 4))
    with pytest.raises(ValueError, match=r"csr_linear: expected x of shape \(\.\.\., 7\)"):
        CSRLinear(7, 6)(torch.randn(2, 6))


def test_constructor_refuses_what_the_dense_layer_refuses() -> None:
    bad: list[dict[str, Any]] = [
        {"groups": 4}, {"padding": "full"}, {"padding": "same", "stride": 2},
        {"padding_mode": "mirror"},
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(ValueError):
            nn.Conv2d(6, 6, 3, **arguments)
        with pytest.raises(ValueError):
            CSRConv2d(6, 6, 3, **arguments)


def test_layers_are_listed_by_name_and_describe_themselves() -> None:
    assert SPARSE_LAYERS == {"CSRConv2d": CSRConv2d, "CSRLinear": CSRLinear}
    packed = CSRConv2d.from_dense(conv(4, 5, 3, stride=2, groups=1, bias=False), activation="relu")
    for part in ("4, 5", "kernel_size=(3, 3)", "stride=(2, 2)", "bias=False", "density=", "relu"):
        assert part in repr(packed)
    assert "in_features=7, out_features=6" in repr(CSRLinear(7, 6))
