"""Files of models whose layers were merged: chains, residual blocks, a layout that changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsecnn import load, save
from sparsecnn.nn import (
    ChainConv2d,
    CSRConv2d,
    DepthwiseConv2d,
    FusedConv2d,
    PatternConv2d,
    PointwiseConv2d,
    ResidualBlock,
    apply_layout_,
)
from sparsecnn.nn.layout import convert_input_, input_layouts
from sparsecnn.nn.microbatch import microbatch_, microbatches
from tests.storage.test_hostile import forge


class Inverted(nn.Module):
    """The block of a user's architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(6, 12, 1)
        self.spatial = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.spatial(torch.relu(self.expand(x))))
        return torch.as_tensor(x + self.project(y))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), Inverted(), nn.Conv2d(6, 4, 1)).eval()


def fused(residual: bool = False) -> nn.Sequential:
    """What `accelerate` makes of `net`: the whole block, or the chain inside it."""
    model = net()
    block = model[1]
    convs = [block.expand, block.spatial, block.project]
    chain = ChainConv2d.from_convs(convs, ["relu", "relu", "none"])
    model[0] = CSRConv2d.from_dense(model[0], activation="relu")
    model[1] = ResidualBlock([chain])
    if residual:
        last = FusedConv2d.from_dense(block.project, activation="silu")
        first = FusedConv2d.from_dense(block.expand, activation="relu")
        model[1] = ResidualBlock([first, last], [nn.Conv2d(6, 6, 1)])
    return apply_layout_(model, "channels_last").eval()


def same(a: nn.Module, b: nn.Module) -> None:
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("into", [None, net], ids=["alone", "into"])
def test_blocks_come_back(residual: bool, into: object, tmp_path: Path) -> None:
    model = fused(residual)
    save(model, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors", None if into is None else net())
    assert isinstance(back[1], ResidualBlock)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    same(model, back)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
        # Weights of a chain keep their output channels innermost.
        assert tensor.stride() == back.state_dict()[name].stride(), name


def test_a_chain_inside_the_users_own_block(tmp_path: Path) -> None:
    model = net()
    block = model[1]
    block.expand = ChainConv2d.from_convs([block.expand, block.spatial], ["relu", "none"])
    block.spatial = nn.Identity()
    save(model, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors", net())
    assert type(back[1]) is Inverted
    assert isinstance(back[1].expand, ChainConv2d) and isinstance(back[1].spatial, nn.Identity)
    same(model, back)


def test_an_identity_takes_a_convolution_away_only_beside_a_chain(tmp_path: Path) -> None:
    model = net()
    model[2] = nn.Identity()
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="the file has Identity, the model Conv2d"):
        load(tmp_path / "m.safetensors", net())


@pytest.mark.parametrize("into", [None, net], ids=["alone", "into"])
def test_dense_kernels_with_their_activations(into: object, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1))
    path = tmp_path / "m.safetensors"
    fast = nn.Sequential(
        model[0],
        DepthwiseConv2d.from_dense(model[1], activation="relu6"),
        PointwiseConv2d.from_dense(model[2], activation="silu"),
    ).eval()
    save(fast, path)
    back = load(path, None if into is None else model)
    assert [type(m) for m in back] == [nn.Conv2d, DepthwiseConv2d, PointwiseConv2d]
    assert back[2].weight.stride() == fast[2].weight.stride()
    same(fast, back)


def test_tf32_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for allowed in (True, False):
        model = nn.Sequential(PointwiseConv2d(3, 4, 1, activation="relu", allow_tf32=allowed))
        save(model, path)
        into = nn.Sequential(nn.Conv2d(3, 4, 1))
        for back in (load(path), load(path, into)):
            assert type(back[0]) is PointwiseConv2d and back[0].allow_tf32 is allowed
        same(model, load(path))
        other = nn.Sequential(PointwiseConv2d(3, 4, 1, activation="relu", allow_tf32=not allowed))
        with pytest.raises(ValueError, match=f"the file has allow_tf32 {allowed}, the model"):
            load(path, other)


def test_a_file_without_tf32_loads(tmp_path: Path) -> None:
    model, path = nn.Sequential(PointwiseConv2d(3, 4, 1)), tmp_path / "m.safetensors"
    save(model, path)
    forge(path, lambda m, a: m["modules"][1]["args"].pop("allow_tf32"))
    assert load(path)[0].allow_tf32 is False
    same(model, load(path))


@pytest.mark.parametrize("value", [1, 0.0, "yes", None, [True]])
def test_another_tf32_is_refused(value: object, tmp_path: Path) -> None:
    model, path = nn.Sequential(PointwiseConv2d(3, 4, 1)), tmp_path / "m.safetensors"
    save(model, path)
    forge(path, lambda m, a: m["modules"][1]["args"].update(allow_tf32=value))
    with pytest.raises(ValueError, match=r"PointwiseConv2d accepts.*allow_tf32 a bool, got"):
        load(path)


def test_a_layer_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    # Loaded as the dense layer that it replaced it would lose its activation.
    class Mine(PatternConv2d):
        """A type that a file would have to construct."""

    model = nn.Sequential(Mine.from_dense(nn.Conv2d(3, 4, 3), activation="relu"))
    with pytest.raises(ValueError, match=r"save: expected .*got Mine at 0; sparsecnn.densify"):
        save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_layouts_of_modules_come_back(tmp_path: Path) -> None:
    model = apply_layout_(net(), "channels_last")
    convert_input_(model[2], "contiguous")
    save(model, tmp_path / "m.safetensors")
    target = convert_input_(net(), None)
    convert_input_(target[0], "contiguous")  # not in the file: goes
    back = load(tmp_path / "m.safetensors", target)
    assert input_layouts(back) == {"": "channels_last", "2": "contiguous"}
    same(model, back)
    x = torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        assert back[:2](x.contiguous(memory_format=torch.channels_last)).stride()[1] == 1


def test_batches_in_parts_come_back(tmp_path: Path) -> None:
    model = microbatch_(net(), 3)
    microbatch_(model[2], 2)
    path = tmp_path / "m.safetensors"
    save(model, path)
    target = net()
    microbatch_(target[0], 1)  # not in the file: goes
    back = load(path, target)
    assert microbatches(back) == {"": 3, "2": 2}
    same(model, back)
    alone = microbatch_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 2)
    save(alone, tmp_path / "alone.safetensors")
    assert microbatches(load(tmp_path / "alone.safetensors")) == {"": 2}
    own = net()
    own[2].forward = own[0].forward  # type: ignore[method-assign]
    before = {key: value.clone() for key, value in own.state_dict().items()}
    with pytest.raises(ValueError, match="without a forward of its own instance at '2'"):
        load(path, own)
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    assert microbatches(own) == {}


def test_a_new_conversion_replaces_the_old(tmp_path: Path) -> None:
    model = net()
    for layout in ("channels_last", "contiguous", None):
        convert_input_(model, layout)
        hooks = len(model._forward_pre_hooks)
        assert hooks == (layout is not None)
        assert input_layouts(model) == ({} if layout is None else {"": layout})
    with pytest.raises(ValueError, match=r"convert_input_: expected layout .*got 'nhwc'"):
        convert_input_(model, "nhwc")
