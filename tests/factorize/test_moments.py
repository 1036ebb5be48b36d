"""Calibration statistics: what is read, where, from which network, and that memory is bounded."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.factorize.collect import collect_moments, layer_inputs
from sparsecnn.factorize.moments import Moments, patches_at, positions_of, responses_at


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def seeded(model: nn.Module, seed: int = 1) -> nn.Module:
    """Parameters drawn anew, in float64."""
    model = model.double()
    for i, p in enumerate(model.parameters()):
        p.data.copy_(rand(*p.shape, seed=seed + i) / max(1, p[0].numel()) ** 0.5)
    return model


def net() -> nn.Sequential:
    """Two convolutions, grouped the second, with in-place ReLUs, dropout and a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Conv2d(8, 6, (3, 2), 2, groups=2, padding_mode="circular", padding=1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    return seeded(model)  # type: ignore[return-value]


# ---- the moments ---------------------------------------------------------------------------------


def test_moments_in_parts_equal_those_of_all_rows() -> None:
    z, y = rand(500, 2, 9), rand(500, 2, 4, seed=1) * 3 + 1000
    found = Moments()
    for start in (0, 1, 100, 250):
        stop = {0: 1, 1: 100, 100: 250, 250: 500}[start]
        found.update(z[start:stop], y[start:stop])
    found.update(z[:0], y[:0])
    assert found.count == 500 and found.groups == 2 and not found.asymmetric
    for g in range(2):
        torch.testing.assert_close(found.cov_in()[g], z[:, g].T @ z[:, g] / 500)
        wanted = torch.cov(y[:, g].T, correction=0)
        torch.testing.assert_close(found.cov_out()[g], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.mean_out(), y.mean(0))
    kept = found.samples()
    assert torch.equal(kept[0], z.transpose(0, 1)) and torch.equal(kept[1], y.transpose(0, 1))
    torch.testing.assert_close(found.responses()[1], kept[1])


def test_moments_do_not_lose_the_variance_beside_a_large_mean() -> None:
    y = rand(400, 1, 3)
    found = Moments()
    for part in (y + 1e8).split(50):
        found.update(None, part)
    wanted = torch.cov(y[:, 0].T, correction=0)
    torch.testing.assert_close(found.cov_out()[0], wanted, rtol=1e-5, atol=1e-6)


def test_moments_of_float32_are_summed_in_float64() -> None:
    y = rand(400, 1, 3).float()
    found = Moments()
    for part in y.split(10):
        found.update(part, part)
    wanted = y[:, 0].double().T @ y[:, 0].double() / 400
    torch.testing.assert_close(found.cov_in()[0], wanted, rtol=1e-12, atol=1e-12)
    assert all(part.dtype == torch.float64 for part in (found.cov_out(), *found.samples()))


def test_moments_keep_a_fair_sample_of_bounded_size() -> None:
    places = torch.zeros(100)
    for seed in range(60):
        found = Moments(limit=20, seed=seed)
        for part in torch.arange(100.0).reshape(-1, 1, 1).split(7):
            found.update(part, part, part + 0.5)
            assert sum(len(chunk) for chunk in found._rows["y"]) <= 40
        z, y = found.samples()
        assert z.shape == (1, 20, 1) and found.count == 100
        assert torch.equal(z, y) and torch.equal(found.responses()[1], y + 0.5)
        assert bool((y.flatten().diff() > 0).all())
        places[y.flatten().long()] += 1
    # 12 of 60 expected for each place, early or late.
    assert float(places.min()) >= 3 and float(places.max()) <= 24
    assert 500 < float(places[:50].sum()) < 700
    # All rows count in the moments.
    torch.testing.assert_close(found.mean_out(), torch.full((1, 1), 49.5, dtype=torch.float64))


def test_moments_refuse_rows_that_do_not_fit() -> None:
    y = rand(5, 2, 4)
    with pytest.raises(ValueError, match="expected limit an integer >= 1, got 0"):
        Moments(limit=0)
    with pytest.raises(ValueError, match=r"expected rows \(m, groups, width\), got"):
        Moments().update(None, y[0])
    with pytest.raises(ValueError, match="rows of equal length and groups, got"):
        Moments().update(y[:4], y)
    with pytest.raises(ValueError, match="rows of equal length and groups, got"):
        Moments().update(None, y, y[:, :, :3])
    with pytest.raises(ValueError, match="expected finite rows, got NaN or infinity in y_hat"):
        Moments().update(None, y, y / 0)
    found = Moments()
    with pytest.raises(ValueError, match="expected at least one update, got none"):
        found.cov_out()
    with pytest.raises(ValueError, match="expected at least one update, got none"):
        found.mean_out()
    with pytest.raises(ValueError, match="expected at least one update, got none"):
        found.responses()
    found.update(None, y)
    with pytest.raises(ValueError, match="the parts and widths of the first update"):
        found.update(None, y, y)
    with pytest.raises(ValueError, match="the parts and widths of the first update"):
        found.update(None, y[:, :, :3])
    for read in (found.cov_in, found.samples):
        with pytest.raises(ValueError, match="expected updates with patches, got responses only"):
            read()


# ---- patches and positions -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"padding": 2}, {"padding": 1, "stride": 2}, {"dilation": 2, "padding": 1},
    {"groups": 2}, {"groups": 4}, {"padding": "same"}, {"padding": "valid"},
    {"kernel_size": (2, 4), "padding": "same"}, {"kernel_size": 1, "stride": 2},
    {"padding": 2, "padding_mode": "reflect"}, {"padding": (1, 2), "padding_mode": "circular"},
    {"kernel_size": (4, 2), "padding": "same", "padding_mode": "replicate", "groups": 2},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "bias": False},
], ids=str)  # fmt: skip
def test_patches_times_the_weight_are_the_responses(options: dict[str, object]) -> None:
    layer = nn.Conv2d(4, 8, **{"kernel_size": 3, **options})  # type: ignore[arg-type]
    seeded(layer)
    x = rand(3, 4, 11, 9, seed=7)
    output = layer(x).detach()
    at = positions_of(layer, output, 1000, torch.Generator())
    assert torch.equal(at, torch.arange(output.numel() // 8))
    z, y = patches_at(layer, x, output, at), responses_at(layer, output, at)
    weight = layer.weight.detach().reshape(layer.groups, -1, z.shape[2])
    wanted = torch.einsum("mgd,gtd->mgt", z, weight)
    if layer.bias is not None:
        wanted += layer.bias.detach().reshape(layer.groups, -1)
    torch.testing.assert_close(y, wanted)


def test_positions_are_spread_over_images_and_maps() -> None:
    layer = nn.Conv2d(1, 2, 1)
    output = torch.zeros(40, 2, 5, 4)
    source = torch.Generator().manual_seed(0)
    at = positions_of(layer, output, 6, source)
    assert at.dtype == torch.int64 and len(at) == 240
    assert bool((at.diff() > 0).all())
    assert torch.equal(torch.bincount(at // 20), torch.full((40,), 6))
    # 12 of 40 images per place expected.
    assert int(torch.bincount(at % 20, minlength=20).min()) >= 3
    assert not torch.equal(at, positions_of(layer, output, 6, source))


# ---- one pass ------------------------------------------------------------------------------------

NAMES = ["0", "3", "7"]


def rows_of(model: nn.Sequential, x: Tensor, name: str) -> Tensor:
    """All responses of a layer (rows, K), before the ReLU."""
    y = copy.deepcopy(model).eval()[: int(name) + 1](x).detach()
    return y.movedim(1, -1).reshape(-1, y.shape[1])


def test_collect_reads_inputs_and_responses_of_every_layer() -> None:
    model, x = net(), rand(6, 3, 10, 8)
    found = collect_moments(model, NAMES, x.split(4), positions=1000)
    for name in NAMES:
        rows = rows_of(model, x, name)
        z, y = found[name].samples()
        assert found[name].count == len(rows)
        torch.testing.assert_close(y.movedim(0, 1).flatten(1), rows)
        layer = model[int(name)]
        weight = layer.weight.detach().reshape(len(z), -1, z.shape[2])
        bias = layer.bias.detach().reshape(len(z), 1, -1)
        torch.testing.assert_close(z @ weight.mT + bias, y)
        torch.testing.assert_close(found[name].mean_out().flatten(), rows.mean(0))


def test_collect_draws_a_bounded_number_of_seeded_positions() -> None:
    model, x = net(), rand(6, 3, 10, 8)

    def collect(seed: int, names: list[str]) -> dict[str, Moments]:
        return collect_moments(model, names, x.split(2), seed=seed, positions=7, limit=30)

    a, b, c = collect(0, NAMES), collect(0, ["3"]), collect(1, NAMES)
    assert [a[name].count for name in NAMES] == [42, 42, 6]
    assert a["3"].samples()[0].shape == (2, 30, 24)
    # The draw of a layer does not depend on the other layers.
    assert torch.equal(a["3"].samples()[1], b["3"].samples()[1])
    assert torch.equal(a["3"].cov_in(), b["3"].cov_in())
    assert not torch.equal(a["3"].cov_in(), c["3"].cov_in())
    # Rows of the layer, each at most once.
    rows = rows_of(model, x, "3")
    distance = torch.cdist(a["3"].samples()[1].movedim(0, 1).flatten(1), rows)
    assert float(distance.min(1).values.max()) < 1e-6
    assert len(distance.argmin(1).unique()) == 30


def test_collect_leaves_the_networks_as_they_were() -> None:
    model, x = net(), rand(4, 3, 10, 8)
    reference = copy.deepcopy(model)
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    given = x.clone()
    state = torch.get_rng_state()
    found = collect_moments(model, NAMES, [x], reference=reference)
    layer_inputs(model, "3", [x], reference=reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)
    assert [m.training for m in model.modules()] == modes
    assert all(m.training for m in reference.modules())
    for part in (*model.modules(), *reference.modules()):
        assert not part._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not any(part.requires_grad for part in found["3"].samples())
    with pytest.raises(RuntimeError):  # also where a pass fails
        collect_moments(model, NAMES, [x[:, :1]])
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_collect_asymmetric_reads_both_networks_at_the_same_positions() -> None:
    original, x = net(), rand(6, 3, 10, 8)
    now = copy.deepcopy(original)
    with torch.no_grad():
        now[0].weight[4:] = 0  # a compressed layer before
    found = collect_moments(now, ["3"], x.split(4), positions=5, reference=original)["3"]
    assert found.asymmetric
    y, y_hat = (part.movedim(0, 1).flatten(1) for part in found.responses())
    places = [torch.cdist(part, rows_of(net_, x, "3")).min(1) for part, net_ in
              ((y, original), (y_hat, now))]  # fmt: skip
    assert all(float(place.values.max()) < 1e-6 for place in places)
    assert torch.equal(places[0].indices, places[1].indices)
    assert float((y - y_hat).norm() / y.norm()) > 0.05
    # The patches are those that the compressed network has, and give Y_hat.
    z = found.samples()[0]
    weight = now[3].weight.detach().reshape(2, 3, -1)
    again = z @ weight.mT + now[3].bias.detach().reshape(2, 1, 3)
    torch.testing.assert_close(again, found.responses()[1])
    torch.testing.assert_close(found.mean_out().flatten(), y.mean(0))
    same = collect_moments(original, ["3"], [x], reference=copy.deepcopy(original))["3"]
    torch.testing.assert_close(*same.responses(), rtol=0, atol=0)


def test_collect_takes_tuples_shared_layers_and_keywords() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.a(input=self.a(x) * scale)

    model = seeded(Twice())
    x = rand(3, 5, 4)
    found = collect_moments(model, ["a"], [(x, 2.0)], positions=9)["a"]
    assert found.count == 30
    y = found.samples()[1][0]
    first = model.a(x).detach()
    torch.testing.assert_close(y, torch.cat([first, model.a(first * 2).detach()]).reshape(-1, 4))
    single = collect_moments(nn.Sequential(seeded(nn.Conv2d(3, 2, 3))), ["0"], [rand(3, 6, 5)])
    assert single["0"].count == 10


def test_collect_without_patches_has_responses_only() -> None:
    found = collect_moments(net(), ["3"], [rand(2, 3, 10, 8)], patches=False)["3"]
    assert found.responses()[0].shape == (2, 20, 3)
    with pytest.raises(ValueError, match="expected updates with patches"):
        found.cov_in()


def labelled() -> Iterator[list[Tensor]]:
    yield [rand(2, 3, 10, 8), torch.zeros(2)]


def test_collect_names_what_it_cannot_do() -> None:
    model, x = net(), rand(2, 3, 10, 8)
    with pytest.raises(ValueError, match="expected positions an integer >= 1, got 0"):
        collect_moments(model, NAMES, [x], positions=0)
    with pytest.raises(ValueError, match="expected model with a module 'nine', got none"):
        collect_moments(model, ["nine"], [x])
    with pytest.raises(TypeError, match=r"nn.Conv2d or nn.Linear at '1' of model, got ReLU"):
        collect_moments(model, ["1"], [x])
    with pytest.raises(ValueError, match="expected reference with a module '7', got none"):
        collect_moments(model, ["7"], [x], reference=model[:5])
    other = copy.deepcopy(model)
    other[3] = nn.Conv2d(8, 6, 3)
    with pytest.raises(ValueError, match=r"a reference with a weight \(6, 4, 3, 2\) at '3', got"):
        collect_moments(model, ["3"], [x], reference=other)
    with pytest.raises(TypeError, match=r"batches of inputs, .*got list; leave labels out"):
        collect_moments(model, NAMES, labelled())  # type: ignore[arg-type]
    for call in (collect_moments, layer_inputs):
        what = NAMES if call is collect_moments else "3"
        with pytest.raises(ValueError, match="expected at least one batch, got none"):
            call(model, what, [])  # type: ignore[operator]
    idle = nn.Sequential(nn.Identity())
    idle[0].unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"expected layer '0.unused' to run, got no call"):
        collect_moments(idle, ["0.unused"], [x])
    with pytest.raises(ValueError, match=r"expected module '0.unused' to run, got no call"):
        layer_inputs(idle, "0.unused", [x])
    fewer = nn.Sequential(seeded(nn.Linear(3, 3)))
    again = nn.Sequential(fewer[0], fewer[0])
    for model_, reference in ((fewer, again), (again, fewer)):
        with pytest.raises(ValueError, match="as often in model and reference, got"):
            collect_moments(model_, ["0"], [rand(2, 3)], reference=reference)
        with pytest.raises(ValueError, match="as often in model and reference, got"):
            layer_inputs(model_, "0", [rand(2, 3)], reference=reference)


def test_layer_inputs_are_those_of_the_compressed_network() -> None:
    original, x = net(), rand(5, 3, 10, 8)
    now = copy.deepcopy(original)
    with torch.no_grad():
        now[0].weight[4:] = 0
    pairs = layer_inputs(now, "3", x.split(3), reference=original)
    assert [len(a) for a, _ in pairs] == [3, 2]
    for i, model in enumerate((now, original)):
        got = torch.cat([pair[i] for pair in pairs])
        torch.testing.assert_close(got, copy.deepcopy(model).eval()[:3](x).detach())
    # The in-place ReLU behind layer 3 does not reach into them.
    assert not torch.equal(pairs[0][0], pairs[0][1])
    alone = layer_inputs(now, "4", [x])
    assert torch.equal(alone[0][0], alone[0][1])
    assert float(alone[0][0].min()) < 0
