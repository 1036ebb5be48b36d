"""A large batch in parts: when it is tried, which layers run then, and that it must win."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsecnn import accelerate, accelerate_, densify
from sparsecnn.nn import CSRConv2d, microbatch_
from sparsecnn.nn.microbatch import microbatches
from tests.accelerate.conftest import FakeTimer, assert_same_function, zero_weights

X = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten())
    return zero_weights(model.eval(), 0.8)


def test_the_fastest_part_is_taken(timer: Callable[..., FakeTimer]) -> None:
    fake = timer(whole=5.0, **{"image 2": 3.0, "batch 4": 4.0, "before": 9.0})
    model = net()
    fast = accelerate(model, X)
    trials = [names for names in fake.asked if names[0] == "whole"]
    kinds = [f"{kind} {images}" for kind in ("batch", "image") for images in (1, 2, 4)]
    assert trials == [["whole", *kinds], ["whole", "image 2", "before"]]
    assert microbatches(fast) == {"": 2}
    assert_same_function(model, fast, X)
    report = fast.report
    assert report.notes[-1] == (
        "takes 2 images at a time: 3 ms, 5 ms for the best whole batch; its layers were measured "
        "on one image"
    )
    # The layers of the search on one image, the totals of the whole example.
    assert [layer.input_shape[0] for layer in report.layers] == [1, 1]
    assert report.macs == 6 * sum(layer.macs for layer in report.layers)
    assert report.after.p50_ms == pytest.approx(3.0)
    assert report.after.images_per_s == pytest.approx(2000)
    assert report.before.p50_ms == pytest.approx(9.0)


def test_the_layers_of_the_whole_batch_in_parts(timer: Callable[..., FakeTimer]) -> None:
    timer(whole=5.0, **{"batch 1": 2.0, "before": 9.0})
    fast = accelerate(net(), X)
    assert microbatches(fast) == {"": 1}
    assert [layer.input_shape[0] for layer in fast.report.layers] == [6, 6]
    assert "one image" not in fast.report.notes[-1]


def test_a_dense_model_may_run_in_parts(timer: Callable[..., FakeTimer]) -> None:
    timer(csr=9.0, original=5.0, folded=9.0, whole=5.0, **{"batch 2": 2.0, "before": 5.0})
    fast = accelerate(net(), X, candidates=["csr"])
    assert microbatches(fast) == {"": 2}
    assert not any(isinstance(m, CSRConv2d) for m in fast.modules())
    assert fast.report.speedup == pytest.approx(2.5)


def test_the_whole_batch_wins_ties(timer: Callable[..., FakeTimer]) -> None:
    timer(whole=5.0, **{"image 2": 4.97, "before": 9.0})
    fast = accelerate(net(), X)
    assert microbatches(fast) == {}
    assert not any("at a time" in note for note in fast.report.notes)


def test_not_tried_where_it_cannot_be(timer: Callable[..., FakeTimer]) -> None:
    class Mixing(nn.Module):
        """Takes every image's distance to the mean of the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return torch.as_tensor(y - y.mean(0))

    class Viewing(Mixing):
        """Has the batch size in it."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.net(x).view(6, -1))

    class Scaled(Mixing):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return torch.as_tensor(self.net(x) * scale)

    fake = timer(whole=5.0, **{"image 2": 1.0})
    for model, inputs in (
        (Mixing(), (X,)),
        (Viewing(), (X,)),
        (Scaled(), (X, torch.ones(1))),
        (net(), (X[:3],)),
    ):
        fast = accelerate(model.eval(), inputs)
        assert microbatches(fast) == {}
        assert_same_function(model, fast, *inputs)
    assert not any(names[0] == "whole" for names in fake.asked)


class Doubled:
    """A forward that somebody put on an object."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * torch.as_tensor(type(self.module).forward(self.module, x))


def test_an_own_forward_stays(timer: Callable[..., FakeTimer]) -> None:
    fake = timer(whole=5.0, **{"image 2": 1.0})
    model = net()
    model.forward = Doubled(model)  # type: ignore[method-assign, assignment]
    fast = accelerate(model, X)
    assert type(fast.forward) is Doubled
    assert_same_function(model, fast, X)
    assert not any(names[0] == "whole" for names in fake.asked)


def test_parts_of_before_are_undone(timer: Callable[..., FakeTimer]) -> None:
    timer(whole=1.0)
    model = microbatch_(net(), 2)
    accelerate_(model, X)
    assert microbatches(model) == {}
    timer(whole=5.0, **{"image 4": 1.0, "before": 9.0})
    again = accelerate(densify(model), X)
    assert microbatches(again) == {"": 4}
    assert microbatches(densify(again)) == {"": 4}
