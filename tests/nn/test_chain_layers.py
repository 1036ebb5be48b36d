"""ChainConv2d and PointwiseConv2d are what they replace: values, state, flags, moves, refusals."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparsecnn.nn import ChainConv2d, PointwiseConv2d, apply_layout_
from sparsecnn.nn import pointwise as pointwise_module
from tests import reference


def block(
    c: int = 6, t: int = 20, k: int = 6, stride: int = 1, act: type[nn.Module] = nn.ReLU6
) -> nn.Sequential:
    """An inverted residual's branch with trained-looking batch normalizations, in eval mode."""
    torch.manual_seed(0)
    seq = nn.Sequential(
        nn.Sequential(nn.Conv2d(c, t, 1, bias=False), nn.BatchNorm2d(t), act()),
        nn.Sequential(
            nn.Conv2d(t, t, 3, stride, 1, groups=t, bias=False), nn.BatchNorm2d(t), nn.Identity(),
            act(),
        ),
        nn.Conv2d(t, k, 1),
        nn.BatchNorm2d(k, affine=False),
    )  # fmt: skip
    for module in seq.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return seq.eval()


def image(c: int = 6) -> Tensor:
    return torch.randn(2, c, 9, 11, generator=torch.Generator().manual_seed(1))


def innermost(weight: Tensor) -> bool:
    """Whether output channels are innermost in memory."""
    return weight.permute(2, 3, 1, 0).is_contiguous()


LAYERS: dict[str, tuple[Callable[[], Any], int]] = {
    "chain": (lambda: ChainConv2d.from_sequential(block(), residual=True), 6),
    "chain without residual": (lambda: ChainConv2d.from_sequential(block(k=9, stride=2)), 6),
    "pointwise": (lambda: PointwiseConv2d.from_dense(nn.Conv2d(7, 5, 1), activation="silu"), 7),
    "pointwise in TF32": (
        lambda: PointwiseConv2d.from_dense(nn.Conv2d(7, 5, 1), activation="relu", allow_tf32=True),
        7,
    ),
}


@pytest.fixture(params=LAYERS)
def made(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    """A layer and an input."""
    torch.manual_seed(0)
    make, channels = LAYERS[request.param]
    return make(), image(channels)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("residual", [False, True])
def test_a_sequential_is_fused_with_its_norms(act: type[nn.Module], residual: bool) -> None:
    seq, x = block(act=act), image()
    chain = ChainConv2d.from_sequential(seq, residual=residual)
    want = seq(x) + x if residual else seq(x)
    torch.testing.assert_close(chain(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chain(x[0]), want[0], rtol=1e-4, atol=1e-5)
    plain = chain.to_sequential()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert all(type(m) in (nn.Conv2d, act) for m in plain)
    torch.testing.assert_close(plain(x), seq(x), rtol=1e-4, atol=1e-5)


def test_convs_with_their_activations() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(6, 8, (3, 1), (2, 1), "valid", bias=False), nn.Conv2d(8, 8, 5, groups=8,
             padding="same", dilation=2), nn.Conv2d(8, 4, 2)]  # fmt: skip
    names = ["silu", "none", "hardswish"]
    chain = ChainConv2d.from_convs(convs, names)
    x = image()
    y = x
    for conv, name in zip(convs, names, strict=True):
        y = reference.activate(conv(y), name)
    torch.testing.assert_close(chain(x), y, rtol=1e-4, atol=1e-5)
    other = torch.randn_like(y)
    last = convs[2](convs[1](reference.activate(convs[0](x), "silu"))) + other
    want = reference.activate(last, "hardswish")
    torch.testing.assert_close(chain(x, other), want, rtol=1e-4, atol=1e-5)
    back = [m for m in chain.to_sequential() if isinstance(m, nn.Conv2d)]
    for ours, theirs in zip(back, convs, strict=True):
        assert torch.equal(ours.weight, theirs.weight) and ours.weight.is_contiguous()
        assert ours.extra_repr() == theirs.extra_repr()


def test_the_weights_of_the_original_are_copied() -> None:
    seq, x = block(), image()
    conv = nn.Conv2d(6, 5, 1)
    layers = [ChainConv2d.from_sequential(seq), PointwiseConv2d.from_dense(conv)]
    layers.append(ChainConv2d.from_convs([conv], ["relu"]))
    before = [layer(x) for layer in layers]
    with torch.no_grad():
        for parameter in (*seq.parameters(), conv.weight):
            parameter.zero_()
    for layer, y in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(x), y)


Make = Callable[[], object]
conv = nn.Conv2d
REFUSALS: list[tuple[Make, type[Exception], str]] = [
    (lambda: ChainConv2d.from_sequential(conv(3, 4, 1)), TypeError, "nn.Sequential, got Conv2d"),
    (lambda: ChainConv2d.from_sequential(nn.Sequential()), ValueError, "1 to 8 convs .* got 0"),
    (
        lambda: ChainConv2d.from_sequential(nn.Sequential(nn.ReLU(), conv(3, 4, 1))),
        NotImplementedError, "expected an nn.Conv2d first, got ReLU '0'",
    ),
    (
        lambda: ChainConv2d.from_sequential(nn.Sequential(conv(3, 4, 1), nn.GELU())),
        NotImplementedError, "got GELU '1' behind a conv",
    ),
    (
        lambda: ChainConv2d.from_sequential(
            nn.Sequential(conv(3, 4, 1), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4).eval()))
        ),
        NotImplementedError, "got BatchNorm2d '2.0' behind a activation",
    ),
    (
        lambda: ChainConv2d.from_sequential(nn.Sequential(conv(3, 4, 1), nn.ReLU(), nn.ReLU())),
        NotImplementedError, "got ReLU '2' behind a activation",
    ),
    (
        lambda: ChainConv2d.from_sequential(nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(4))),
        NotImplementedError, "BatchNorm2d '1' in eval mode with running statistics",
    ),
    (
        lambda: ChainConv2d.from_sequential(
            nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False).eval())
        ),
        NotImplementedError, "in eval mode with running statistics",
    ),
    (
        lambda: ChainConv2d.from_sequential(nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(5).eval())),
        ValueError, "BatchNorm2d '1' of 4 channels, got 5",
    ),
    (
        lambda: ChainConv2d.from_convs([conv(4, 4, 3, groups=2)], ["none"]),
        NotImplementedError, "stage 0: expected every stage dense .* got groups 2 with C = 4",
    ),
    (
        lambda: ChainConv2d.from_convs(
            [conv(3, 4, 3, padding=1, padding_mode="reflect")], ["none"]
        ),
        NotImplementedError, "padding_mode 'zeros' in stage 0, got 'reflect'",
    ),
    (
        lambda: ChainConv2d.from_convs([conv(3, 4, 1), conv(5, 4, 1)], ["none"] * 2),
        ValueError, "stage 1 to take the 4 channels of stage 0, got 5",
    ),
    (lambda: ChainConv2d.from_convs([conv(3, 4, 1)], []), ValueError, "got 1 and 0"),
    (lambda: ChainConv2d.from_convs([conv(3, 3, 1)] * 9, ["none"] * 9), ValueError, "got 9 and 9"),
    (lambda: ChainConv2d.from_convs([conv(3, 4, 1)], ["tanh"]), ValueError, "got 'tanh'"),
    (lambda: ChainConv2d.from_convs([nn.Linear(3, 4)], ["none"]), TypeError, "got Linear"),
    (
        lambda: ChainConv2d.from_convs([conv(3, 3, 1), conv(3, 3, 1).double()], ["none"] * 2),
        TypeError, "expected all stages of torch.float32, got torch.float64 in stage 1",
    ),
    (
        lambda: ChainConv2d.from_convs([conv(3, 4, 1)], ["none"], residual=True),
        ValueError, "as many output as input channels with residual=True, got 4 and 3",
    ),
    (
        lambda: ChainConv2d.from_convs([conv(3, 3, 3)], ["none"], residual=True),
        ValueError, "keep H and W with residual=True, got stage 0 with stride .1, 1. and padding",
    ),
    (
        lambda: ChainConv2d.from_convs([conv(3, 3, 1, 2)], ["none"], residual=True),
        ValueError, "keep H and W with residual=True, got stage 0 with stride .2, 2.",
    ),
    (lambda: PointwiseConv2d(3, 4, 3), NotImplementedError, "expected kernel_size 1, got .3, 3."),
    (lambda: PointwiseConv2d(4, 4, 1, groups=2), NotImplementedError, "expected groups 1, got 2"),
    (lambda: PointwiseConv2d(4, 4, 1, padding=1), NotImplementedError, "expected padding 0, got"),
    (lambda: PointwiseConv2d(4, 4, 1, activation="x"), ValueError, "expected activation one of"),
    (lambda: PointwiseConv2d.from_dense(nn.Linear(3, 4)), TypeError, "nn.Conv2d, got Linear"),
    (
        lambda: PointwiseConv2d(4, 4, 1, allow_tf32=None),  # type: ignore[arg-type]
        TypeError, "allow_tf32 a bool, got None",
    ),
    (
        lambda: PointwiseConv2d.from_dense(
            conv(4, 4, 1), allow_tf32="yes"  # type: ignore[arg-type]
        ),
        TypeError, "PointwiseConv2d: expected allow_tf32 a bool, got 'yes'",
    ),
]  # fmt: skip


@pytest.mark.parametrize("make, kind, message", REFUSALS, ids=[r[2] for r in REFUSALS])
def test_refusals_name_what_they_cannot_take(
    make: Make, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_hooks_inside_a_chain_are_refused_and_those_of_the_whole_are_kept() -> None:
    seq = block()
    calls: list[str] = []
    seq.register_forward_hook(lambda *_: calls.append("forward"))
    chain = ChainConv2d.from_sequential(seq)
    chain(image())
    assert calls == ["forward"]
    chain.to_sequential()(image())
    assert calls == ["forward"] * 2
    for module in (seq[2], seq[0]):
        handle = module.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(
            NotImplementedError, match=r"no hooks inside the chain, got 1 on '[02]'"
        ):
            ChainConv2d.from_sequential(seq)
        handle.remove()


def test_pruned_and_parametrized_weights_are_baked_in() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 5, 1)
    prune.random_unstructured(first, "weight", 0.5)
    prune.random_unstructured(first, "bias", 0.5)
    parametrize.register_parametrization(second, "weight", nn.Softshrink(0.1))
    seq = nn.Sequential(first, second)
    chain, x = ChainConv2d.from_sequential(nn.Sequential(first)), image()
    torch.testing.assert_close(chain(x), first(x))
    assert set(chain.state_dict()) == {"stages.0.weight", "stages.0.bias"}
    both = ChainConv2d.from_convs(list(seq), ["none", "none"])
    torch.testing.assert_close(both(x), seq(x))
    for layer in seq:
        torch.testing.assert_close(PointwiseConv2d.from_dense(layer)(image(layer.in_channels)),
                                   layer(image(layer.in_channels)))  # fmt: skip


# ---- what belongs to the user --------------------------------------------------------------------


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_independent(copier: str, made: tuple[Any, Tensor]) -> None:
    layer, x = made
    want = layer(x)
    if copier == "deepcopy":
        other = copy.deepcopy(layer)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), want) and repr(other) == repr(layer)
    assert all(innermost(p) for p in other.parameters() if p.dim() == 4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), want)


def test_state_dicts_load_in_any_order_in_memory(made: tuple[Any, Tensor]) -> None:
    layer, x = made
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    state = {name: value.contiguous() for name, value in layer.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    assert all(innermost(p) for p in other.parameters() if p.dim() == 4)
    assigned = copy.deepcopy(other)
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(x), layer(x))
    wrong = {name: torch.zeros(1, 2, 3, 4) for name in state}
    with pytest.raises(RuntimeError, match="size mismatch for"):
        other.load_state_dict(wrong)


def test_state_of_the_dense_layers_loads() -> None:
    dense = nn.Conv2d(7, 5, 1)
    layer = PointwiseConv2d(7, 5, 1)
    layer.load_state_dict(dense.state_dict())
    x = image(7)
    torch.testing.assert_close(layer(x), dense(x))
    chain = ChainConv2d.from_convs([nn.Conv2d(7, 5, 1)], ["none"])
    chain.load_state_dict({f"stages.0.{k}": v for k, v in dense.state_dict().items()})
    torch.testing.assert_close(chain(x), dense(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_moves(dtype: torch.dtype, made: tuple[Any, Tensor]) -> None:
    layer, x = made
    want = layer(x)
    moved = copy.deepcopy(layer).to(dtype)
    assert all(p.dtype == dtype for p in moved.parameters())
    assert all(innermost(p) for p in moved.parameters() if p.dim() == 4)
    bits = 5e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(moved(x.to(dtype)).float(), want, rtol=bits, atol=bits)
    half = layer.half()
    with pytest.raises(TypeError, match=r"float32, bfloat16, float64 on cpu, got torch.float16"):
        half(x.half())


def test_memory_formats_of_models_leave_the_weights_alone(made: tuple[Any, Tensor]) -> None:
    layer, x = made
    want = layer(x)
    for form in (torch.channels_last, torch.contiguous_format):
        model = nn.Sequential(copy.deepcopy(layer)).to(memory_format=form)
        assert all(innermost(p) for p in model.parameters() if p.dim() == 4)
        assert model(x.contiguous(memory_format=form)).is_contiguous(memory_format=form)
    for layout in ("contiguous", "channels_last"):
        model = apply_layout_(nn.Sequential(copy.deepcopy(layer)), layout)
        assert all(innermost(p) for p in model.parameters() if p.dim() == 4)
        assert torch.equal(model(x), want)


def test_meta_device(made: tuple[Any, Tensor]) -> None:
    layer, x = made
    want = layer(x)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == want.shape


def test_flags_are_kept() -> None:
    for frozen in (False, True):
        for training in (False, True):
            dense = nn.Conv2d(3, 4, 1).train(training)
            dense.weight.requires_grad_(not frozen)
            assert dense.bias is not None
            dense.bias.requires_grad_(frozen)
            point = PointwiseConv2d.from_dense(dense)
            chain = ChainConv2d.from_sequential(nn.Sequential(dense).train(training))
            (back,) = chain.to_sequential()
            assert isinstance(back, nn.Conv2d)
            stage = chain.stages[0]
            for layer in (point, stage, back, point.to_dense()):
                assert layer.training == training
                assert layer.weight.requires_grad == (not frozen)
                assert layer.bias.requires_grad == frozen
            assert chain.training == training


def test_layers_train() -> None:
    """One step of training moves every parameter as it moves those of the plain layers."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8),
             nn.Conv2d(8, 6, 1)]  # fmt: skip
    chain = ChainConv2d.from_convs(convs, ["silu", "relu", "none"], residual=True)
    plain = nn.Sequential(convs[0], nn.SiLU(), convs[1], nn.ReLU(), convs[2])
    x = image()
    chain(x).square().mean().backward()
    (plain(x) + x).square().mean().backward()
    ours, theirs = list(chain.parameters()), list(plain.parameters())
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    torch.optim.SGD(chain.parameters(), 0.1).step()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    torch.testing.assert_close(chain(x), plain(x) + x, rtol=1e-4, atol=1e-5)


def test_pointwise_has_the_arguments_of_the_dense_layer() -> None:
    mine = inspect.signature(PointwiseConv2d).parameters
    theirs = inspect.signature(nn.Conv2d).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    for arguments in (
        {}, {"stride": 2}, {"stride": (1, 3)}, {"bias": False}, {"padding": "same"},
        {"padding": "valid"}, {"dilation": 3}, {"dtype": torch.float64},
        {"padding_mode": "reflect"}, {"device": "cpu"},
    ):  # fmt: skip
        torch.manual_seed(3)
        dense = nn.Conv2d(5, 7, 1, **arguments)
        torch.manual_seed(3)
        ours = PointwiseConv2d(5, 7, 1, **arguments)
        x = image(5).to(dense.weight.dtype)
        torch.testing.assert_close(ours(x), dense(x))
        back = ours.to_dense()
        assert type(back) is nn.Conv2d and back.extra_repr() == dense.extra_repr()
        assert torch.equal(back.weight, dense.weight) and back.weight.is_contiguous()


def test_readable_repr() -> None:
    text = repr(ChainConv2d.from_sequential(block(), residual=True))
    assert "residual=True" in text and text.count("activation=relu6") == 2
    layer = PointwiseConv2d(3, 4, 1, activation="relu")
    assert repr(layer).startswith("PointwiseConv2d(3, 4, kernel_size=(1, 1)")


def test_tf32_belongs_to_the_layer() -> None:
    made = [
        PointwiseConv2d(3, 4, 1, allow_tf32=True),
        PointwiseConv2d.from_dense(nn.Conv2d(3, 4, 1), allow_tf32=True),
    ]
    for layer in made:
        copies = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double()]
        assert all(c.allow_tf32 and "allow_tf32=True" in repr(c) for c in copies)
    for layer in (PointwiseConv2d(3, 4, 1), PointwiseConv2d.from_dense(nn.Conv2d(3, 4, 1))):
        assert not layer.allow_tf32 and "tf32" not in repr(layer)


def test_the_op_hears_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []
    for name in ("try_quick", "run_pointwise_conv2d"):
        original = getattr(pointwise_module, name)

        def spy(*args: Any, original: Any = original, name: str = name) -> object:
            heard.append(args[1][-1] if name == "try_quick" else args[-1])
            return original(*args)

        monkeypatch.setattr(pointwise_module, name, spy)
    layer = PointwiseConv2d(3, 4, 1, allow_tf32=True)
    layer(image(3))  # recorded: the short way gives up
    with torch.no_grad():
        layer(image(3))
        layer.allow_tf32 = False
        layer(image(3))
    assert heard == [True, True, True, False]
