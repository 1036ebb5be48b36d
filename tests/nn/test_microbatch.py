"""A batch in parts: the same results, whatever goes in and comes out."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecnn.nn import microbatch_
from sparsecnn.nn.microbatch import microbatches


class Net(nn.Module):
    """Counts its parts; wants a second tensor and gives nested outputs if asked to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.sizes: list[int] = []

    def forward(
        self, x: Tensor, scale: Tensor | None = None, *, nested: bool = False
    ) -> Any:
        if not torch.compiler.is_compiling():
            self.sizes.append(len(x))
        y = self.norm(self.conv(x))
        if scale is not None:
            y = y * scale.view(-1, 1, 1, 1)
        return {"all": y, "means": [y.mean((2, 3)), (y.amax((1, 2, 3)),)]} if nested else y


def net(images: int | None) -> Net:
    model = Net().eval()
    assert microbatch_(model, images) is model
    return model


X = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "images, sizes", [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (6, [6, 1]), (7, [7])]
)
def test_parts_and_their_order(images: int, sizes: list[int]) -> None:
    model = net(images)
    torch.testing.assert_close(model(X), net(None)(X))
    assert model.sizes == sizes
    last = model.to(memory_format=torch.channels_last)(X.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_every_tensor_is_cut_and_joined() -> None:
    model, plain = net(2), net(None)
    scale = torch.arange(7.0)
    torch.testing.assert_close(model(X, scale=scale, nested=True), plain(X, scale, nested=True))
    assert model.sizes == [2, 2, 2, 1]


def test_the_whole_batch_where_it_cannot_be_cut() -> None:
    model = net(2)
    model(X, scale=torch.ones(1))  # one scale for all images: no batch axis
    model(X, scale=torch.tensor(2.0))
    assert model.sizes == [7, 7]
    model.train()
    model(X)
    assert model.sizes[2:] == [7]
    torch.testing.assert_close(model.norm.running_mean, trained_mean())


def trained_mean() -> Tensor:
    plain = net(None).train()
    plain(X)
    assert plain.norm.running_mean is not None
    return plain.norm.running_mean


def test_copies_and_pickles_run_their_own_module() -> None:
    model = net(2)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        model.conv.weight.zero_()
    for other in copies:
        torch.testing.assert_close(other(X), net(None)(X))
        assert other.sizes == [2, 2, 2, 1]
        assert microbatches(other) == {"": 2}
    assert model.sizes == []


def test_gradients() -> None:
    model, plain = net(3), net(None)
    for module in (model, plain):
        module(X).square().sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, plain.conv.weight.grad)


def test_hooks_of_the_module_run_once() -> None:
    model = net(2)
    outer: list[int] = []
    inner: list[int] = []
    model.register_forward_hook(lambda m, args, y: outer.append(len(y)))
    model.conv.register_forward_hook(lambda m, args, y: inner.append(len(y)))
    model(X)
    assert (outer, inner) == ([7], [2, 2, 2, 1])


def test_set_again_and_undone() -> None:
    root = nn.Sequential(net(4), nn.ReLU())
    assert microbatches(root) == {"0": 4}
    microbatch_(root[0], 5)
    assert microbatches(root) == {"0": 5}
    microbatch_(root[0], None)
    assert microbatches(root) == {}
    root(X)
    assert root[0].sizes == [7]
    assert microbatch_(root[0], None) is root[0]


def test_traced_whole() -> None:
    model = net(2)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes={"x": {0: batch}})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X[:5]), net(None)(X[:5]))


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"expected module to be an nn\.Module, got str"):
        microbatch_("net", 1)  # type: ignore[arg-type]
    for wrong in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="expected images to be an int or None"):
            microbatch_(Net(), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected images >= 1, got 0"):
        microbatch_(Net(), 0)
    own = Net()
    own.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="without a forward of its own instance, got Net"):
        microbatch_(own, 2)
    assert own(X) is X
    assert microbatch_(own, None)(X) is X


@pytest.mark.parametrize("bad", [lambda y: y.mean(), lambda y: (y, 3), lambda y: y.mean(0)])
def test_outputs_without_a_batch_axis(bad: Any) -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return bad(x)

    with pytest.raises(ValueError, match="expected outputs whose first axis is the batch"):
        microbatch_(Bad().eval(), 2)(X)
