"""What is swapped and what is put back, with a timer that says what the test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn._accelerate import choice, kernels
from sparsecnn._accelerate.model import keep_good
from sparsecnn._accelerate.outputs import compare
from sparsecnn.accelerate import accelerate, accelerate_
from sparsecnn.measure import Report
from sparsecnn.nn import CSRConv2d, CSRLinear, FusedConv2d

from .conftest import FakeTimer, assert_same_function, liven_norms, stats, zero_weights

X = (1, 3, 12, 12)


def _net(sparsity: float = 0.8) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    return liven_norms(zero_weights(net, sparsity)).eval()  # type: ignore[return-value]


def _sparse(model: nn.Module) -> int:
    return sum(isinstance(m, (CSRConv2d, CSRLinear)) for m in model.modules())


def test_fast_kernel_is_taken_and_slow_one_is_not(timer: Callable[..., FakeTimer]) -> None:
    net, x = _net(), torch.randn(X)
    timer(csr=1.0)
    fast = accelerate(net, x)
    assert _sparse(fast) == 3
    assert [layer.kernel for layer in fast.report.layers] == ["csr"] * 3
    assert "csr 1 ms vs 2 ms dense contiguous" in fast.report.layers[0].reason
    assert fast.report.layers[0].dense_ms == 2.0 and fast.report.layers[0].chosen_ms == 1.0
    assert fast.report.speedup == pytest.approx(9.0 / 5.0)

    timer(csr=4.0)
    slow = accelerate(net, x)
    assert _sparse(slow) == 0 and isinstance(slow[0], FusedConv2d)
    assert [layer.kernel for layer in slow.report.layers[:2]] == ["dense contiguous"] * 2
    assert "csr 4 ms vs 2 ms dense contiguous" in slow.report.layers[0].reason
    assert_same_function(net, fast, torch.randn(X))
    assert_same_function(net, slow, torch.randn(X))


@pytest.mark.parametrize(("csr_ms", "swapped"), [(1.95, 0), (1.93, 3)])
def test_dense_wins_ties(csr_ms: float, swapped: int, timer: Callable[..., FakeTimer]) -> None:
    timer(csr=csr_ms)
    fast = accelerate(_net(), torch.randn(X), tie_margin=0.03)
    assert _sparse(fast) == swapped
    assert ("dense wins ties" in fast.report.layers[0].reason) == (swapped == 0)


def test_spread_makes_a_tie_and_more_runs_may_resolve_it(
    timer: Callable[..., FakeTimer],
) -> None:
    fake = timer(csr=1.5)
    fake.iqr_ms = 4.0
    assert _sparse(accelerate(_net(), torch.randn(X))) == 0
    fake = timer(csr=1.5)
    fake.iqr_ms, fake.iqr_shrinks = 4.0, True
    assert _sparse(accelerate(_net(), torch.randn(X))) == 3
    # The first layer was measured a second time and that was enough.
    assert fake.asked[0] == fake.asked[1]


def test_a_kernel_must_beat_the_dense_layer_in_the_layout_of_the_model(
    timer: Callable[..., FakeTimer],
) -> None:
    # Against the contiguous layer it wins, against the channels_last one it loses: whole models
    # tell which layout to take, and in channels_last the dense layers stay.
    times = {"dense channels_last": 1.0, "swapped contiguous": 5.0}
    timer(csr=1.5, **times)
    fast = accelerate(_net(), torch.randn(X))
    assert fast.report.layout == "contiguous"
    assert sum(isinstance(m, CSRConv2d) for m in fast.modules()) == 2
    assert "vs 2 ms dense contiguous" in fast.report.layers[0].reason
    timer(csr=1.5, **times, **{"folded channels_last": 1.0, "swapped channels_last": 1.0})
    fast = accelerate(_net(), torch.randn(X))
    assert fast.report.layout == "channels_last"
    assert not any(isinstance(m, CSRConv2d) for m in fast.modules())
    assert "vs 1 ms dense channels_last" in fast.report.layers[0].reason


def test_layout_of_the_fastest_model_is_taken(timer: Callable[..., FakeTimer]) -> None:
    timer(**{"swapped channels_last": 1.0, "csr contiguous": 9.0})
    net = _net()
    fast = accelerate(net, torch.randn(X))
    assert fast.report.layout == "channels_last"
    assert _sparse(fast) == 3
    timer(**{"swapped channels_last": 1.0, "csr channels_last": 9.0})
    mixed = accelerate(net, torch.randn(X))
    # In channels_last only the linear layer won; the model is timed with that.
    assert mixed.report.layout == "channels_last" and _sparse(mixed) == 1
    assert mixed[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_function(net, mixed, torch.randn(X))
    assert net[0].weight.is_contiguous()


@pytest.mark.parametrize("noisy, layout", [(0, "channels_last"), (2, "channels_last"), (9, None)])
def test_noise_costs_the_better_layout_only_if_it_stays(
    noisy: int, layout: str | None, timer: Callable[..., FakeTimer]
) -> None:
    originals = {"original contiguous": 9.0, "original channels_last": 5.0}
    fake = timer(folded=20.0, swapped=20.0, **originals)
    fake.noisy_model_rounds = noisy
    fast = accelerate(_net(), torch.randn(X))
    assert _sparse(fast) == 0
    assert fast.report.layout == (layout or "contiguous")  # the user's own wins a tie


def test_everything_is_put_back_when_the_whole_model_is_not_faster(
    timer: Callable[..., FakeTimer],
) -> None:
    timer(swapped=8.95, folded=8.99)
    net = _net()
    fast = accelerate(net, torch.randn(X))
    assert _sparse(fast) == 0
    assert type(fast[1]) is nn.BatchNorm2d and type(fast[0]) is nn.Conv2d
    assert any("put back" in note for note in fast.report.notes)
    assert all("put back" in layer.reason for layer in fast.report.layers)
    assert fast.report.speedup == 1.0
    with torch.no_grad():
        x = torch.randn(X)
        assert torch.equal(fast(x), net(x))


def test_slower_sparse_model_gives_way_to_the_folded_one(
    timer: Callable[..., FakeTimer],
) -> None:
    timer(swapped=7.0, folded=7.0, **{"folded contiguous": 7.01})
    fast = accelerate(_net(), torch.randn(X))
    assert _sparse(fast) == 0 and isinstance(fast[0], FusedConv2d)
    assert any("3 layers that won alone were put back" in note for note in fast.report.notes)
    assert "put back" in fast.report.layers[0].reason


def test_half_of_the_layers_may_stay(
    timer: Callable[..., FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = timer(swapped=7.99, folded=8.0)
    calls: list[int] = []

    def shifting(fns: Any, **options: Any) -> Any:
        if any(name.startswith("swapped") for name in fns):
            calls.append(len(fns))
            if len(calls) == 2:  # the comparison with half of the layers put back
                fake.times_ms["swapped"] = 6.0
        return fake(fns, **options)

    monkeypatch.setattr("sparsecnn._accelerate.model.time_interleaved", shifting)
    fast = accelerate(_net(), torch.randn(X))
    assert _sparse(fast) == 1
    assert sum("put back" in layer.reason for layer in fast.report.layers) == 2


def test_density_above_the_limit_is_not_timed(timer: Callable[..., FakeTimer]) -> None:
    fake = timer()
    fast = accelerate(_net(sparsity=0.1), torch.randn(X))
    assert _sparse(fast) == 0
    assert all("above 0.7" in layer.reason for layer in fast.report.layers)
    assert not any(name.startswith("csr") for names in fake.asked for name in names)


def test_equal_layers_are_timed_once(timer: Callable[..., FakeTimer]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)])
    zero_weights(net, 0.8)
    for conv in net[1:]:
        conv.weight.data = net[0].weight.data[torch.randperm(8)]
    fake = timer()
    accelerate(net.eval(), torch.randn(1, 8, 9, 9), candidates=["csr"])
    layer_rounds = [names for names in fake.asked if names[0].startswith("dense")]
    assert layer_rounds == [
        ["dense contiguous", "csr contiguous", "dense channels_last", "csr channels_last"]
    ]


def test_filter_fn_and_candidates(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net, x = _net(), torch.randn(X)
    fast = accelerate(net, x, filter_fn=lambda module, name: name == "3")
    assert [layer.kernel for layer in fast.report.layers] == ["dense", "csr", "dense"]
    assert fast.report.layers[0].reason == "excluded by filter_fn"
    assert type(fast[1]) is nn.BatchNorm2d
    none = accelerate(net, x, candidates=())
    assert _sparse(none) == 0 and isinstance(none[0], FusedConv2d)
    assert "no candidate asked for" in none.report.layers[0].reason


class Wrong(nn.Module):
    """A kernel with a bug."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * 1.01


def _raise(layer: kernels.Layer) -> nn.Module:
    raise NotImplementedError("no kernel for this stride")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda layer: Wrong(kernels.build_dense(layer, "contiguous")), "differs by"),
        (_raise, "no kernel for this stride"),
    ],
    ids=["wrong", "raises"],
)
def test_candidate_that_fails_is_out_with_the_reason(
    build: Callable[[kernels.Layer], nn.Module],
    reason: str,
    timer: Callable[..., FakeTimer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer(broken=0.1)
    broken = kernels.Candidate("broken", lambda layer: None, build)
    monkeypatch.setitem(kernels.CANDIDATES, "broken", broken)
    net = _net()
    fast = accelerate(net, torch.randn(X), candidates=["broken"])
    assert all(reason in layer.reason for layer in fast.report.layers)
    assert_same_function(net, fast, torch.randn(X))


def test_swap_that_breaks_the_model_is_undone_alone(timer: Callable[..., FakeTimer]) -> None:
    """A forward that uses the layer's weight as a tensor runs with the dense layer only."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3)
            self.b = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert self.b.weight.dtype is torch.float32
            return self.b(self.a(x))

    timer()
    net = zero_weights(Picky(), 0.8).eval()
    fast = accelerate(net, torch.randn(X))
    assert isinstance(fast.a, CSRConv2d) and type(fast.b) is nn.Conv2d
    assert "dtype" in fast.report.layers[1].reason
    assert_same_function(net, fast, torch.randn(X))


class Same(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Marked(nn.Conv2d):
    """A convolution that only adds a method."""

    def hello(self) -> str:
        return "hello"


def test_layers_that_must_stay_say_why(timer: Callable[..., FakeTimer]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = Same(3, 4, 3)
            self.marked = Marked(4, 4, 3)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
            self.by_hand = nn.Conv2d(4, 4, 1)
            self.unused = nn.Conv2d(4, 4, 1)
            self.nan = nn.Conv2d(4, 1, 1)
            self.one_d = nn.Conv1d(4, 4, 1)
            self.tied = nn.Linear(4, 4)
            self.tied_too = nn.Linear(4, 4)
            self.tied_too.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.reflect(self.up(self.marked(self.same(x))))
            y = nn.functional.conv2d(y, self.by_hand.weight, self.by_hand.bias)
            y = self.tied_too(self.tied(self.one_d(y.flatten(2)).transpose(1, 2)))
            return y + self.nan(x[:, :1].expand(-1, 4, -1, -1)).isnan().sum()

    timer()
    net = zero_weights(Odd(), 0.6).eval()
    with torch.no_grad():
        net.nan.weight[0, 0] = torch.nan
    fast = accelerate(net, torch.randn(X))
    reasons = {layer.name: layer.reason for layer in fast.report.layers}
    assert "forward of its own" in reasons["same"]
    assert isinstance(fast.marked, CSRConv2d)
    assert "ConvTranspose2d" in reasons["up"] and "Conv1d" in reasons["one_d"]
    assert "padding_mode 'reflect'" in reasons["reflect"]
    assert "outside of its own forward" in reasons["by_hand"]
    assert "not called" in reasons["unused"]
    assert "not finite" in reasons["nan"]
    assert "outside" in reasons["tied"] and "outside" in reasons["tied_too"]
    assert len(reasons) == 10
    assert fast.tied.weight is fast.tied_too.weight
    assert_same_function(net, fast, torch.randn(X))


def test_shared_layer_is_replaced_under_every_name(timer: Callable[..., FakeTimer]) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.ReLU(), conv)
    timer()
    fast = accelerate(zero_weights(net, 0.8).eval(), torch.randn(X))
    assert isinstance(fast[1], CSRConv2d) and fast[1] is fast[3]
    assert len(fast.report.layers) == 2
    macs = fast.report.layers[1].macs
    assert macs == 2 * 8 * 8 * 9 * 12 * 12
    assert_same_function(net, fast, torch.randn(X))


def test_report_counts(timer: Callable[..., FakeTimer]) -> None:
    timer()
    net = _net()
    fast = accelerate(net, torch.randn(2, 3, 12, 12))
    report: Report = fast.report
    first, second, last = report.layers
    assert first.input_shape == (2, 3, 12, 12) and first.output_shape == (2, 8, 10, 10)
    assert second.weight_shape == (16, 8, 3, 3) and last.weight_shape == (5, 64)
    assert first.macs == 2 * 10 * 10 * 8 * 27 and last.macs == 2 * 5 * 64
    nnz = int(net[3].weight.count_nonzero())
    assert second.effective_macs == 2 * 8 * 8 * nnz
    assert second.density == pytest.approx(nnz / net[3].weight.numel())
    assert first.folded == ("1", "2") and second.folded == ("4",) and last.folded == ()
    assert report.macs == first.macs + second.macs + last.macs
    assert report.bytes_after == sum(
        t.numel() * t.element_size() for t in (*fast.parameters(), *fast.buffers())
    )
    assert report.before.p50_ms == pytest.approx(9.0)
    assert report.after.p50_ms == pytest.approx(5.0)
    assert report.after.images_per_s == pytest.approx(400.0)
    assert Report.from_json(report.to_json()).layers[1].kernel == "csr"
    assert set(first.candidates_ms) == {
        f"{k} {layout}" for k in ("dense", "csr") for layout in ("contiguous", "channels_last")
    }


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsecnn._accelerate.model.time_interleaved", broken)
    net = _net().train()
    kinds, strides = [type(m) for m in net.modules()], net[0].weight.stride()
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning):
        accelerate_(net, torch.randn(X), runs=1, warmup=0)
    assert [type(m) for m in net.modules()] == kinds and net.training
    assert net[0].weight.stride() == strides and not hasattr(net, "report")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_bare_layers(timer: Callable[..., FakeTimer]) -> None:
    timer()
    conv = zero_weights(nn.Conv2d(3, 8, 3), 0.8)
    fast = accelerate(conv.eval(), torch.randn(X))
    assert isinstance(fast, CSRConv2d) and fast.report.layers[0].kernel == "csr"
    linear = zero_weights(nn.Linear(16, 8), 0.8)
    fast = accelerate(linear.eval(), torch.randn(4, 16))
    assert isinstance(fast, CSRLinear)
    assert_same_function(linear, fast, torch.randn(4, 16))


def test_noise_in_the_model_is_noted(timer: Callable[..., FakeTimer]) -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(1)

    timer()
    fast = accelerate(Noisy(*_net()).eval(), torch.randn(X))
    assert _sparse(fast) == 3
    assert any("something else on every call" in note for note in fast.report.notes)


def test_real_timer_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    net, x = _net(0.9), torch.randn(X)
    fast = accelerate(net, x, warmup=1, runs=3, progress=True)
    assert fast.report.before.p50_ms > 0 and fast.report.after.p50_ms > 0
    assert all(layer.candidates_ms for layer in fast.report.layers)
    assert capsys.readouterr().out == ""
    assert_same_function(net, fast, torch.randn(X))


def test_faster_needs_margin_and_spread() -> None:
    assert choice.faster(stats(0.9), stats(1.0), 0.03)
    assert not choice.faster(stats(0.98), stats(1.0), 0.03)
    assert not choice.faster(stats(0.9, iqr_ms=1.0, runs=20), stats(1.0), 0.03)
    assert choice.faster(stats(0.9, iqr_ms=1.0, runs=2000), stats(1.0), 0.03)
    assert choice.spread(stats(1.0, iqr_ms=2.0, runs=4)) == pytest.approx(1.57e-3)


def test_fastest_runs_decide_where_only_the_spread_is_in_the_way() -> None:
    old = stats(1.0, iqr_ms=9.0, runs=80, min_ms=0.5)
    busy = stats(0.7, iqr_ms=9.0, runs=80, min_ms=0.3)
    assert choice.unclear(busy, old, 0.03) and choice.surely_faster(busy, old, 0.03)
    same_floor = stats(0.7, iqr_ms=9.0, runs=80, min_ms=0.49)
    assert not choice.surely_faster(same_floor, old, 0.03)
    few = stats(0.7, iqr_ms=9.0, runs=20, min_ms=0.3)
    assert not choice.surely_faster(few, old, 0.03)
    slower_median = stats(0.99, iqr_ms=9.0, runs=80, min_ms=0.3)
    assert not choice.surely_faster(slower_median, old, 0.03)


def test_keep_good_finds_the_bad_ones() -> None:
    tries: list[list[int]] = []

    def good(items: list[int]) -> bool:
        tries.append(items)
        return not {3, 11} & set(items)

    assert keep_good(list(range(16)), good) == [i for i in range(16) if i not in (3, 11)]
    assert len(tries) < 24
    assert keep_good([1], lambda items: False) == []
    # Each half alone is fine, both together are not.
    assert keep_good([1, 2, 3], lambda items: len(items) < 2) == [1]


@pytest.mark.parametrize(
    ("new", "wrong"),
    [
        (torch.tensor([1.0, 2.0005]), ""),
        (torch.tensor([1.0, 2.01]), "differ by 0.01"),
        (torch.tensor([1.0, torch.nan]), "differ"),
        (torch.tensor([1.0]), "output (1,)"),
        (torch.tensor([1.0, 2.0]).double(), "output"),
    ],
)
def test_compare(new: Tensor, wrong: str) -> None:
    got = compare([torch.tensor([1.0, 2.0])], [new])[1]
    assert wrong in got and bool(wrong) == bool(got)


def test_compare_keeps_what_was_not_finite() -> None:
    odd = torch.tensor([1.0, torch.inf, torch.nan])
    assert compare([odd], [odd.clone()]) == (0.0, "")
    assert compare([odd], [torch.tensor([1.0, 5.0, torch.nan])])[1]
    assert compare([odd], [])[1] == "0 outputs instead of 1"
    assert compare([torch.tensor([3])], [torch.tensor([4])]) == (0.0, "")
