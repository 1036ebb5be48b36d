"""A layer in the Winograd domain against loops, and its pruning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.nn import functional as F

from sparsecnn.measure import count_macs
from sparsecnn.nn import WinogradReLUConv2d
from sparsecnn.prune import Magnitude, Pruner, Random, find_targets, parse_granularity, prune_
from sparsecnn.prune.schedule import Iterative

GROUPS = {"plain": (4, 6, 1), "groups": (4, 6, 2), "depthwise": (4, 8, 4)}
# F(2x2, 3x3) written out; the layer takes its matrices from the package.
BT = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
AT = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])


def reference(x, u, bias, pads, groups, rectify=True):
    """Loops over images, filters, tiles and points; also counts the multiplications of points."""
    top, bottom, left, right = pads
    n, _, h, w = x.shape
    p, q = h + top + bottom - 2, w + left + right - 2
    rows, cols = -(-p // 2), -(-q // 2)
    padded = x.new_zeros(n, x.shape[1], 2 * rows + 2, 2 * cols + 2)
    padded[:, :, top : top + h, left : left + w] = x
    y = x.new_zeros(n, u.shape[0], 2 * rows, 2 * cols)
    per_group, multiplications = u.shape[0] // groups, 0
    for i in range(n):
        for k in range(u.shape[0]):
            first = k // per_group * u.shape[1]
            for a in range(rows):
                for b in range(cols):
                    total = x.new_zeros(4, 4)
                    for c in range(u.shape[1]):
                        d = padded[i, first + c, 2 * a : 2 * a + 4, 2 * b : 2 * b + 4]
                        v = BT.to(x) @ d @ BT.to(x).t()
                        v = v.clamp(min=0) if rectify else v
                        for r, s in torch.nonzero(u[k, c]).tolist():
                            total[r, s] += u[k, c, r, s] * v[r, s]
                            multiplications += 1
                    y[i, k, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2] = AT.to(x) @ total @ AT.to(x).t()
    y = y[:, :, :p, :q] + (0 if bias is None else bias[:, None, None])
    return y, multiplications


def layer_of(c, k, groups, padding=1, bias=True, seed=0):
    torch.manual_seed(seed)
    layer = WinogradReLUConv2d(c, k, padding=padding, groups=groups, bias=bias)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (4, 5), (3, 3)])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), (0, 1, 2, 1), "same", "valid"])
@pytest.mark.parametrize("kind", GROUPS)
def test_winograd_with_the_relu_outside_is_a_convolution(kind, padding, size):
    c, k, groups = GROUPS[kind]
    torch.manual_seed(1)
    pads = padding if isinstance(padding, tuple) and len(padding) == 4 else None
    conv = nn.Conv2d(c, k, 3, padding=0 if pads else padding, groups=groups)
    layer = WinogradReLUConv2d(c, k, padding=padding, groups=groups)
    assert torch.allclose(WinogradReLUConv2d.from_dense(conv).weight, G @ conv.weight @ G.t())
    layer.load_state_dict(WinogradReLUConv2d.from_dense(conv).state_dict())
    x = torch.randn(2, c, *size)
    rectified = x.relu()
    top, bottom, left, right = pads or (0, 0, 0, 0)
    want = conv(F.pad(rectified, (left, right, top, bottom)))
    outside = layer.output_of(layer.tiles_of(rectified), rectified)
    assert outside.shape == want.shape
    assert float((outside - want).detach().abs().max()) < 1e-5
    # Inside the domain it is another function, and twice is another one again.
    inside = layer(x)
    assert inside.shape == want.shape
    assert float((inside - want).detach().abs().max()) > 1e-2
    assert float((inside - layer(rectified)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("padding", [0, 1, (0, 1, 2, 1)])
@pytest.mark.parametrize("kind", GROUPS)
def test_winograd_equals_loops(kind, padding):
    c, k, groups = GROUPS[kind]
    layer = layer_of(c, k, groups, padding).double()
    pads = {0: (0,) * 4, 1: (1,) * 4}.get(padding, padding)
    x = torch.randn(2, c, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        want, _ = reference(x, layer.weight, layer.bias, pads, groups)
        assert float((layer(x) - want).abs().max()) < 1e-12
        spatial, _ = reference(x.relu(), layer.weight, layer.bias, pads, groups, rectify=False)
    assert float((spatial - want).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", GROUPS)
def test_winograd_gradients(kind):
    c, k, groups = GROUPS[kind]
    layer = layer_of(c, k, groups).double()
    x = torch.randn(1, c, 3, 4, dtype=torch.float64, requires_grad=True)
    # Far from the kinks of the ReLU, where a difference quotient is no derivative.
    assert float(layer.tiles_of(x).detach().abs().min()) > 1e-5

    def run(x, u, b):
        return torch.func.functional_call(layer, {"weight": u, "bias": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def net(seed=0, groups=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        WinogradReLUConv2d(8, 8, padding=1, groups=groups),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),
        WinogradReLUConv2d(8, 16, padding=1, groups=groups),
        nn.Flatten(),
        nn.Linear(16 * 3 * 3, 4),
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_winograd_pruned_entries_stay_zero(groups, optimizer):
    model = net(groups=groups)
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }[optimizer]
    targets = find_targets(model, types=(WinogradReLUConv2d,))
    assert [t.name for t in targets] == ["2", "5"]
    assert targets[1].grouped_shape == (groups, 16 // groups, 8 // groups, 16)
    parameters = [t.dense for t in targets]
    dense = [p.detach().clone() for p in parameters]
    opt = make(model.parameters())
    pruner = Pruner(
        model,
        importance=Magnitude(sparsity=0.7, granularity="winograd"),
        schedule=Iterative([0.5, 1.0], every=4),
        targets=targets,
    ).attach(opt)
    x, y = torch.randn(16, 1, 6, 6), torch.randint(4, (16,))
    first = None
    for _ in range(12):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        for t in targets:
            dead = ~pruner.masks()[t.key]
            assert not t.dense[dead].any() and not t.weight[dead].any()
        if first is None and any((~m).any() for m in pruner.masks().values()):
            first = {name: m.clone() for name, m in pruner.masks().items()}
    assert first is not None
    masks = pruner.masks()
    for t, old in zip(targets, dense, strict=True):
        assert int((~masks[t.key]).sum()) == round(0.7 * t.dense.numel())
        assert not bool((masks[t.key] & ~first[t.key]).any())  # the density only falls
        assert bool((t.dense != old)[masks[t.key]].any())
    pruner.finalize()
    assert model[2].weight is parameters[0] and model[5].weight is parameters[1]


def test_winograd_prunes_by_the_rank_in_the_domain():
    kept = {}
    for name, importance in (("rank", Magnitude), ("random", Random)):
        layer = layer_of(4, 6, 2)
        order = layer.weight.detach().abs().flatten().argsort()
        prune_(layer, importance(sparsity=0.75, granularity="winograd"))
        kept[name] = set(torch.nonzero(layer.weight.flatten()).flatten().tolist())
        want = set(order[-layer.weight.numel() // 4 :].tolist())
        assert (kept[name] == want) == (name == "rank")
    assert len(kept["rank"]) == len(kept["random"])


@pytest.mark.parametrize("kind", GROUPS)
def test_winograd_multiplications(kind):
    c, k, groups = GROUPS[kind]
    layer = layer_of(c, k, groups)
    prune_(layer, Magnitude(sparsity=0.75, granularity="winograd"))
    x = torch.randn(2, c, 5, 6)
    u = layer.weight.detach()
    _, counted = reference(x, u, layer.bias.detach(), (1,) * 4, groups)
    tiles = 2 * 3 * 3
    by_point = sum(int(torch.count_nonzero(u[:, :, r, s])) for r in range(4) for s in range(4))
    assert counted == by_point * tiles
    found = layer.multiplications((2, k, 5, 6))
    dense = k * c // groups * 16 * tiles
    # Both baselines: all of the domain's products, and a convolution without the transform.
    assert found == {
        "kept": counted, "winograd": dense, "direct": k * c // groups * 9 * 2 * 5 * 6,
    }  # fmt: skip
    assert counted * 4 == dense
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(k, 3, 1, bias=False))
    report = count_macs(model, x)
    cost = report.layers["0"]
    assert (cost.dense_macs, cost.effective_macs) == (dense, counted)
    assert cost.weight_shape == (k, c // groups, 4, 4) and cost.output_shape == (2, k, 5, 6)
    assert cost.params == u.numel() + k and cost.nonzero_params == by_point + k
    # The transforms are charged to nobody, and neither count nor parameters are taken twice.
    assert report.dense_macs == dense + 3 * k * 60
    assert report.params == u.numel() + k + 3 * k
    # Masks that are still attached count like zeros.
    torch_prune.custom_from_mask(layer, "weight", torch.arange(u.numel()).view_as(u) % 2 == 0)
    halved = int(torch.count_nonzero(layer.weight))
    assert halved < by_point
    assert count_macs(model, x).layers["0"].effective_macs == halved * tiles


def test_winograd_spatial_zeros_are_not_offered():
    pruned = prune_(nn.Conv2d(4, 6, 3), Magnitude(sparsity=0.5))
    masked = nn.Conv2d(4, 6, 3)
    torch_prune.l1_unstructured(masked, "weight", 0.5)
    for conv in (pruned, masked):
        with pytest.raises(ValueError, match=r"without zeros inside .*, got .* fills them"):
            WinogradReLUConv2d.from_dense(conv)
    # The reason: two of nine entries become up to twelve of sixteen.
    g = torch.zeros(3, 3)
    g[0, 1], g[1, 1] = 0.3, 0.7
    assert int(torch.count_nonzero(G @ g @ G.t())) > 16 * 2 / 9
    # Kernels without any weight stay so.
    whole = nn.Conv2d(4, 6, 3)
    prune_(whole, Magnitude(sparsity=0.5, granularity="kernel"))
    layer = WinogradReLUConv2d.from_dense(whole)
    assert int((layer.weight == 0).all(-1).all(-1).sum()) == 12
    for conv in (nn.Conv2d(4, 6, 3), nn.Linear(4, 6)):
        with pytest.raises(ValueError, match=r"winograd: expected layer '' to be a WinogradReLU"):
            prune_(conv, Magnitude(sparsity=0.5, granularity="winograd"))
    mixed = net()
    before = copy.deepcopy(mixed.state_dict())
    with pytest.raises(ValueError, match="expected layer '0' to be a WinogradReLUConv2d, got Conv"):
        Pruner(mixed, importance=Magnitude(sparsity=0.5, granularity="winograd"))
    after = mixed.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], v) for name, v in before.items())
    assert str(parse_granularity("winograd")) == "winograd"
    assert parse_granularity("winograd") != parse_granularity("element")


def test_winograd_initial_variance():
    for c, groups in ((64, 1), (128, 2)):
        layer = layer_of(c, 64, groups)
        variance = float(layer.weight.detach().double().var())
        assert variance == pytest.approx(2 * 9 / 32 / (16 * 64), rel=0.03)
    plain = WinogradReLUConv2d(64, 64, padding=1)
    assert not plain.bias.any()
    # Behind a batch norm the outputs keep the order of magnitude of the inputs.
    y = plain(torch.randn(4, 64, 8, 8)).detach()
    assert 0.5 < float(y.std()) < 1.2
    again = copy.deepcopy(plain)
    torch.manual_seed(3)
    again.reset_parameters()
    torch.manual_seed(3)
    plain.reset_parameters()
    assert torch.equal(plain.weight, again.weight)


def test_winograd_layer_survives_what_layers_go_through():
    layer = layer_of(4, 6, 2)
    x = torch.randn(2, 4, 5, 5)
    want = layer(x).detach()
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert list(layer.state_dict()) == ["weight", "bias"]
    other = layer_of(4, 6, 2, seed=9)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), want)
    half = copy.deepcopy(layer).half()
    assert half(x.half()).dtype == torch.float16
    assert float((half(x.half()).detach().float() - want).abs().max()) < 0.05
    pruner = Pruner(layer, importance=Magnitude(sparsity=0.5, granularity="winograd"))
    pruner.step()
    masked = layer(x).detach()
    assert not torch.equal(masked, want)
    assert torch.equal(copy.deepcopy(layer)(x), masked)
    assert copy.deepcopy(layer).half().weight.dtype == torch.float16
    assert torch.equal(pruner.finalize()(x), masked)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x), masked, atol=1e-6)
    assert "4, 6, m=2, padding=1, groups=2, bias=True" in repr(layer)
    assert layer_of(4, 6, 1, bias=False).bias is None
    assert WinogradReLUConv2d(3, 3)(torch.randn(0, 3, 4, 4)).shape == (0, 3, 2, 2)


def test_winograd_from_dense_carries_over():
    conv = nn.Conv2d(4, 6, 3, padding="same", groups=2, dtype=torch.float64).eval()
    conv.weight.requires_grad_(False)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    layer = WinogradReLUConv2d.from_dense(conv)
    assert layer.weight.dtype == torch.float64 and not layer.weight.requires_grad
    assert layer.bias is conv.bias and layer.groups == 2 and not layer.training
    assert layer(torch.randn(1, 4, 5, 5, dtype=torch.float64)).shape == (1, 6, 5, 5)
    assert calls == [1]
    assert WinogradReLUConv2d.from_dense(nn.Conv2d(4, 6, 3, bias=False)).bias is None
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    baked = WinogradReLUConv2d.from_dense(normed)
    assert torch.allclose(baked.weight, G @ normed.weight @ G.t(), atol=1e-6)
    assert baked.weight.requires_grad and baked.weight.is_leaf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: WinogradReLUConv2d(4, 6, m=4), ValueError, "m 2, got 4"),
        (lambda: WinogradReLUConv2d(0, 6), ValueError, "in_channels an int >= 1, got 0"),
        (lambda: WinogradReLUConv2d(4, 6.0), ValueError, r"out_channels an int >= 1, got 6\.0"),
        (lambda: WinogradReLUConv2d(4, 6, groups=4), ValueError, "groups to divide .* got 4"),
        (lambda: WinogradReLUConv2d(4, 6, padding=-1), ValueError, "padding .* got -1"),
        (lambda: WinogradReLUConv2d.from_dense(nn.Linear(3, 3)), TypeError, "got Linear"),
        (
            lambda: WinogradReLUConv2d.from_dense(nn.Conv2d(4, 6, 5)),
            NotImplementedError,
            r"kernel_size \(3, 3\), got \(5, 5\)",
        ),
        (
            lambda: WinogradReLUConv2d.from_dense(nn.Conv2d(4, 6, 3, stride=2)),
            NotImplementedError,
            r"stride \(1, 1\), got \(2, 2\)",
        ),
        (
            lambda: WinogradReLUConv2d.from_dense(nn.Conv2d(4, 6, 3, dilation=2)),
            NotImplementedError,
            r"dilation \(1, 1\), got \(2, 2\)",
        ),
        (
            lambda: WinogradReLUConv2d.from_dense(
                nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
            ),
            NotImplementedError,
            "padding_mode zeros, got reflect",
        ),
        (
            lambda: WinogradReLUConv2d(4, 6)(torch.randn(1, 3, 5, 5)),
            ValueError,
            r"x of shape \(N, 4, H, W\), got \(1, 3, 5, 5\)",
        ),
        (lambda: WinogradReLUConv2d(4, 6)(torch.randn(4, 5, 5)), ValueError, "x of shape"),
        (
            lambda: WinogradReLUConv2d(4, 6)(torch.randn(1, 4, 2, 5)),
            ValueError,
            "at least 3x3 with its padding 0",
        ),
    ],
)
def test_winograd_bad_inputs(call, error, message):
    with pytest.raises(error, match=f"^WinogradReLUConv2d: expected .*{message}"):
        call()
