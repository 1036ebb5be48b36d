"""A layout that changes inside the model: where it can, and that it is taken when it is faster."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsecnn import accelerate
from sparsecnn._accelerate.blocks import find_blocks
from sparsecnn._accelerate.layouts import find_cuts
from sparsecnn._accelerate.survey import find_sites, fold_sites, record_sites
from sparsecnn.nn.layout import input_layouts
from tests.accelerate.conftest import FakeTimer, assert_same_function, zero_weights
from tests.accelerate.test_blocks import Basic

X = (1, 3, 16, 16)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), Basic(), nn.Conv2d(8, 6, 1)
    ).eval()  # fmt: skip


def cuts_of(model: nn.Module) -> dict[str, int]:
    sites = find_sites(model, None)
    recording = record_sites(model, (torch.randn(X),), sites)
    fold_sites(sites, recording)
    blocks = find_blocks(model, sites, recording)
    return {c.name: len(c.after) for c in find_cuts(model, sites, recording, blocks)}


def test_cuts_are_where_everything_passes() -> None:
    # Not in front of the first layer, nor of the pooling: behind it, where the next layer is.
    assert cuts_of(net()) == {"3": 3, "4": 1}


def test_no_cut_where_a_second_value_crosses() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return torch.as_tensor(self.c(torch.cat([self.b(first), first])))

    class Returned(Skip):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            first = self.a(x)
            return self.c(self.b(first)), first

    # Converting the input of b would leave the other thing that is concatenated as it was.
    assert cuts_of(Skip().eval()) == {"c": 1}
    # What is returned may stay as it is, but not go through the conversion of something else.
    assert cuts_of(Returned().eval()) == {"b": 2}


def test_the_faster_mixture_is_taken(timer: Callable[..., FakeTimer]) -> None:
    mixed = "swapped channels_last, contiguous from 3"
    fake = timer(**{mixed: 1.0})
    model = zero_weights(net(), 0.8)
    fast = accelerate(model, torch.randn(X))
    assert fast.report.layout == "channels_last, contiguous from 3"
    assert input_layouts(fast) == {"": "channels_last", "3": "contiguous"}
    assert_same_function(model, fast, torch.randn(X))
    seen: list[tuple[int, ...]] = []
    fast[4].register_forward_pre_hook(lambda m, args: seen.append(args[0].stride()))
    fast(torch.randn(X))
    assert seen[0][-1] == 1
    assert any(mixed in names for names in fake.models())
    timer(**{mixed: 4.999})
    assert accelerate(model, torch.randn(X)).report.layout == "contiguous"


def test_dense_layers_behind_a_cut_have_its_layout(timer: Callable[..., FakeTimer]) -> None:
    timer(csr=9.0, fused=3.0, **{"fused channels_last, contiguous from 3": 1.0})
    model = net()
    fast = accelerate(model, torch.randn(X))
    assert fast.report.layout == "channels_last, contiguous from 3"
    assert fast[0].weight.stride()[1] == 1
    assert all(m.weight.is_contiguous() for m in fast[3].modules() if isinstance(m, nn.Conv2d))
    assert fast[4].weight.is_contiguous()
    assert model[0].weight.is_contiguous()
    assert_same_function(model, fast, torch.randn(X))
