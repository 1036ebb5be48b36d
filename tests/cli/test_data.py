"""The digits and the networks for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sparsecnn.data import DigitsNet, ResNet20, digits
from sparsecnn.measure import count_macs

pytest.importorskip("sklearn")


def test_digits_are_split_by_class_without_overlap() -> None:
    data = digits(8)
    assert [len(part) for part in data] == [1077, 270, 450]
    images = [part.tensors[0].flatten(1) for part in data]
    for part in data:
        x, labels = part.tensors
        assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert labels.dtype == torch.int64 and 0.09 < share.min() and share.max() < 0.11
    # Nearly all of the scans are unique; a split that leaked would repeat hundreds.
    rows = torch.cat(images)
    assert len(torch.unique(rows, dim=0)) > 1780
    assert images[0].mean().abs() < 1e-5 and (images[0].std() - 1).abs() < 1e-5


def test_the_seed_decides_the_split() -> None:
    first, again, other = digits(8, 0), digits(8, 0), digits(8, 1)
    assert torch.equal(first.test.tensors[0], again.test.tensors[0])
    assert not torch.equal(first.test.tensors[1], other.test.tensors[1])


def test_digits_are_resized() -> None:
    small, large = digits(8).test, digits(32).test
    assert large.tensors[0].shape == (450, 1, 32, 32)
    assert torch.equal(small.tensors[1], large.tensors[1])
    pooled = nn.functional.avg_pool2d(large.tensors[0], 4)
    # Interpolation blurs but keeps the picture.
    pairs = torch.stack([pooled.flatten(), small.tensors[0].flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.95


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (8.0, TypeError), (True, TypeError)])
def test_bad_sizes_are_refused(size: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"digits: expected size .* got"):
        digits(size)


def test_missing_scikit_learn_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sparsecnn\[demo\]'"):
        digits()


def test_digits_net_has_the_counted_size() -> None:
    net = DigitsNet()
    cost = count_macs(net, torch.zeros(1, 1, 8, 8))
    assert (cost.params, cost.dense_macs) == (23_034, 460_416)


@pytest.mark.parametrize("width", [16, 1])
def test_resnet20_is_the_published_network(width: int) -> None:
    net = ResNet20(width).eval()
    x = torch.zeros(2, 1, 32, 32)
    assert net(x).shape == (2, 10)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 19 + 2  # 19 of the paper, two 1x1 shortcuts
    # By hand: the stem, then three stages, each layer at its own resolution.
    w = width
    stages = 6 * 9 * w * w * 32**2
    for channels, side in ((2 * w, 16), (4 * w, 8)):
        stages += side**2 * (9 * channels // 2 * channels + 5 * 9 * channels**2)
        stages += side**2 * (channels // 2 * channels)
    by_hand = 9 * w * 32**2 + stages + 10 * 4 * w
    assert count_macs(net, x[:1]).dense_macs == by_hand
    with pytest.raises(ValueError, match="expected width >= 1, got 0"):
        ResNet20(0)


def test_importing_the_command_line_loads_no_optional_library() -> None:
    code = (
        "import sys, sparsecnn.cli; "
        "print([m for m in ('rich', 'sklearn', 'timm', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # rich is a dependency of the report; it may be loaded, the optional ones may not.
    assert not {"sklearn", "timm", "torchvision"} & set(done.stdout.split("'"))
