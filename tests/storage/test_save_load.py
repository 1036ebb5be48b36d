"""Round trips without an architecture, file sizes and what a file holds."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparsecnn.nn import CSRConv2d, CSRLinear, FusedConv2d, apply_layout_
from sparsecnn.storage import load, save
from sparsecnn.storage._layers import ALLOWED
from tests.storage.models import Block, Net, sparse_stack, thinned


def as_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same structure, flags and tensors: bits, dtypes, strides."""
    one, two = dict(a.named_modules()), dict(b.named_modules())
    assert list(one) == list(two)
    for name in one:
        assert type(one[name]) is type(two[name]), name
        assert one[name].training == two[name].training, name
        assert one[name].extra_repr() == two[name].extra_repr(), name
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for key, t in states[0].items():
        u = states[1][key]
        assert (t.dtype, t.shape) == (u.dtype, u.shape), key
        if t.numel() > 1:  # strides of fewer elements mean nothing
            assert t.stride() == u.stride(), key
        assert torch.equal(as_bytes(t), as_bytes(u)), key
    needs = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (a, b)]
    assert needs[0] == needs[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def manifest(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["sparsecnn"]
    return json.loads(text.split(" ", 2)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_round_trip(path: Path, dtype: torch.dtype) -> None:
    model = sparse_stack().to(dtype)
    save(model, path)
    assert_same(load(path), model)


def test_fresh_process_gives_bitwise_equal_outputs(path: Path, tmp_path: Path) -> None:
    model = sparse_stack()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    save(model, path)
    out = tmp_path / "y.pt"
    code = (
        "import sys, torch; from sparsecnn.storage import load\n"
        # Dense layers sum in an order that depends on the threads.
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad(): torch.save(load(sys.argv[1])(x), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, path, out], check=True, timeout=120)
    with torch.no_grad():
        assert torch.equal(torch.load(out), model(x))


def test_conv_stack_at_90_percent_takes_15_percent(path: Path) -> None:
    """Real file sizes, header included; CSR and dense storage, both kinds of zero."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(a, b, 3, bias=False) for a, b in [(64, 64), (64, 128), (128, 128)]]
    dense_bytes = sum(c.weight.numel() * 4 for c in convs)
    for conv in convs:
        thinned(conv, 0.1)
    masked = copy.deepcopy(convs)
    for conv in masked:
        with torch.no_grad():
            conv.weight.sub_(1e-9 * (conv.weight == 0)).mul_(conv.weight.abs() > 1e-8)
    assert int(torch.signbit(masked[0].weight[masked[0].weight == 0]).sum()) > 30000
    sizes = {}
    for name, layers in (
        ("csr", [CSRConv2d.from_dense(c) for c in convs]),
        ("dense", convs),
        ("dense, -0.0", masked),
    ):
        model = nn.Sequential(*layers)
        save(model, path)
        assert_same(load(path), model)
        sizes[name] = os.path.getsize(path) / dense_bytes
    assert sizes["csr"] <= 0.125 and sizes["dense"] <= 0.125, sizes
    assert sizes["dense, -0.0"] <= 0.15, sizes


def test_dense_models_cost_no_more_than_their_tensors(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    save(model, path)
    tensors = sum(p.numel() * 4 for p in model.parameters())
    assert tensors < path.stat().st_size < tensors + 2048


def test_flags_memory_formats_and_frozen(path: Path) -> None:
    model = sparse_stack().to(memory_format=torch.channels_last)
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[5].values.requires_grad_(False)
    save(model, path)
    back = load(path)
    assert_same(back, model)
    # A 1x1 weight is contiguous in both formats; only its strides tell which one it runs in.
    assert back[4][0].weight.stride() == (24, 1, 24, 24)
    save(sparse_stack(), path)
    assert load(path)[4][0].weight.stride() == (24, 1, 1, 1)
    assert back[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_layout_of_the_root(path: Path) -> None:
    model = apply_layout_(sparse_stack(), "channels_last")
    save(model, path)
    back = load(path)
    assert_same(back, model)
    assert back._sparsecnn_layout == "channels_last"
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    seen = []
    back[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].stride()))
    back(x)
    assert seen == [x.to(memory_format=torch.channels_last).stride()]


def test_special_values_and_buffers(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 64, 5), nn.BatchNorm2d(64))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0, 0] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, -1e-45])
    model[1].num_batches_tracked += 7
    save(model, path)
    assert manifest(path)["packed"].keys() == {"0.weight"}
    assert_same(load(path), model)


def test_explicit_zeros_of_a_trained_sparse_layer(path: Path) -> None:
    model = sparse_stack()
    with torch.no_grad():
        model[5].values[::2] = 0.0
    save(model, path)
    assert_same(load(path), model)


def test_shared_modules_and_tied_tensors(path: Path) -> None:
    shared = CSRConv2d.from_dense(thinned(nn.Conv2d(8, 8, 3, padding=1), 0.1))
    act = nn.ReLU()
    a, b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    b.weight = a.weight
    model = nn.Sequential(shared, act, shared, act, a, b, nn.Sequential(a, act))
    save(model, path)
    back = load(path)
    assert_same(back, model)
    assert back[0] is back[2] and back[1] is back[3] is back[6][1] and back[4] is back[6][0]
    assert back[4].weight is back[5].weight and back[4].bias is not back[5].bias


def test_non_persistent_buffers_are_left_out(path: Path) -> None:
    net = Net()
    save(net, path)
    with safe_open(path, framework="pt") as file:
        assert not any("scratch" in key for key in file.keys())


@pytest.mark.parametrize("root", [nn.ModuleList, nn.ModuleDict])
def test_containers(path: Path, root: type[nn.Module]) -> None:
    layers = [
        nn.Conv2d(3, 4, 1),
        nn.Sequential(),
        nn.Hardtanh(-2.0, 3.0),
        nn.Upsample(scale_factor=2),
    ]
    if root is nn.ModuleDict:
        model: nn.Module = nn.ModuleDict({f"k{i}": m for i, m in enumerate(layers)})
    else:
        model = nn.ModuleList(layers)
    save(model, path)
    assert_same(load(path), model)


def test_a_single_layer(path: Path) -> None:
    for layer in (nn.Linear(4, 3), CSRLinear(4, 3, bias=False), FusedConv2d(3, 4, 3)):
        save(layer, path)
        assert_same(load(path), layer)


SAMPLES: dict[str, tuple[object, ...]] = {
    **{f"AdaptiveAvgPool{d}d": ((3,) * d,) for d in (1, 2, 3)},
    **{f"AdaptiveMaxPool{d}d": ((3,) * d,) for d in (1, 2, 3)},
    **{f"AvgPool{d}d": (2, 1, 1, True) for d in (1, 2, 3)},
    **{f"MaxPool{d}d": (3, 2, 1) for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": (6, 1e-3, 0.2, d != 2, d != 3) for d in (1, 2, 3)},
    **{f"InstanceNorm{d}d": (6, 1e-3, 0.2, True, d == 2) for d in (1, 2, 3)},
    **{f"Conv{d}d": (4, 6, 3, 2, 1, 2, 2) for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": (4, 6, 3, 2, 1, 1, 2) for d in (1, 2, 3)},
    **{f"ConstantPad{d}d": ((1,) * 2 * d, 2.5) for d in (1, 2, 3)},
    **{f"ReflectionPad{d}d": (2,) for d in (1, 2)},
    **{f"ReplicationPad{d}d": (2,) for d in (1, 2)},
    **{f"ZeroPad{d}d": (2,) for d in (1, 2)},
    "ChainStageWeights": (nn.Conv2d(4, 6, 3, (2, 1), 1, groups=2), "relu"),
    "ResidualBlock": ([nn.Conv2d(4, 4, 1), FusedConv2d(4, 4, 1)], [nn.Conv2d(4, 4, 1)]),
    "DepthwiseConv2d": (4, 8, (3, 5), 2, 1, 1, 4),
    "PointwiseConv2d": (4, 6, 1, 2),
    "CSRConv2d": (4, 6, 3, (2, 1), "valid", 1, 2),
    "CSRLinear": (5, 6),
    "PatternConv2d": (4, 6, 3, (2, 1), "valid", 1, 2),
    "WinogradConv2d": (4, 6, 3, 1, "same", 1, 2),
    "ChannelShuffle": (2,),
    "FusedConv2d": (4, 6, 3),
    "GroupNorm": (2, 6),
    "LayerNorm": ((6, 5),),
    "Linear": (5, 6, False),
    "LocalResponseNorm": (3, 1e-3),
    "PReLU": (6, 0.1),
    "PixelShuffle": (2,),
    "PixelUnshuffle": (2,),
    "Softmax": (1,),
    "LogSoftmax": (1,),
    "CirculantLinear": (5,),
    "CirculantPointwise": (6, False),
    "PermuteChannels": (4,),
    "Unflatten": (1, (2, 3)),
    "Upsample": (None, 2.0, "bilinear", False),
}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_every_allowed_type(path: Path, name: str) -> None:
    layer = ALLOWED[name](*SAMPLES.get(name, ()))
    save(layer, path)
    record = manifest(path)["modules"][0]
    assert record["type"] == name  # and not "custom"
    assert_same(load(path), layer)


def test_modified_layers_are_not_taken_for_plain_ones(path: Path) -> None:
    def build() -> list[nn.Module]:
        pruned = nn.Conv2d(3, 4, 3)
        prune.l1_unstructured(pruned, "weight", 0.5)
        parametrized = nn.Linear(3, 4)
        parametrize.register_parametrization(parametrized, "weight", nn.Identity())
        patched = nn.ReLU()
        patched.forward = lambda x: x + 1  # type: ignore[method-assign, assignment]
        extended = nn.Conv2d(3, 4, 3)
        extended.extra = nn.ReLU()
        return [pruned, parametrized, patched, extended, Block(4)]

    for layer, other in zip(build(), build(), strict=True):
        model, twin = nn.Sequential(layer), nn.Sequential(other)
        save(model, path)
        with pytest.raises(ValueError, match=r"your own.*pass model="):
            load(path)
        assert load(path, twin) is twin  # the same architecture takes it
        for key, t in model.state_dict().items():
            assert torch.equal(twin.state_dict()[key], t)


def test_save_refuses_by_name(path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    sub = nn.Sequential(nn.Linear(2, 2))
    sub[0].weight = nn.Parameter(torch.randn(2, 2).to_sparse())
    patched = CSRConv2d(3, 4, 3)
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment]
    corrupt = CSRConv2d(3, 4, 3)
    corrupt.col_idx.fill_(99)
    cases: list[tuple[nn.Module, str]] = [
        (nn.Sequential(Extra()), "extra state of Extra at 0"),
        (nn.Linear(2, 2, dtype=torch.complex64), "weight.*complex64"),
        (nn.LazyLinear(3), "without a shape"),
        (sub, "0.weight.*sparse"),
        (nn.Linear(2, 2, device="meta"), "weight.*meta"),
        (nn.Sequential(patched), "CSRConv2d at 0"),
        (corrupt, "col_idx"),
    ]
    for model, text in cases:
        with pytest.raises(ValueError, match=text):
            save(model, path)
        assert not list(path.parent.iterdir())
    with pytest.raises(TypeError, match=r"model an nn\.Module, got dict"):
        save({}, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model an nn\.Module or None, got dict"):
        load(path, {})  # type: ignore[arg-type]


def test_a_view_of_a_flat_buffer_can_be_saved(path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    flat = torch.randn(128)
    model[0].weight.data, model[1].weight.data = flat[:64].view(8, 8), flat[64:].view(8, 8)
    save(model, path)
    assert_same(load(path), model)


def test_single_elements_of_any_stride(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.PReLU(), CSRLinear(1, 1, bias=False))
    model[1].weight.data = torch.randn(()).expand(1)
    model[2].values.data = torch.randn(3)[::2][:1]
    model[0].weight.data = torch.randn(1, 4)[:, ::3][:, 1:].reshape(1, 1, 1, 1)
    assert model[1].weight.stride() == (0,) and model[2].values.stride() == (2,)
    save(model, path)
    back = load(path)
    for key, t in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], t)


def test_loaded_tensors_do_not_hang_on_the_file(path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    save(model, path)
    back = load(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(back, model)
