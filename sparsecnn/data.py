"""Real images that need no download, and the networks that the demo and the tests train on them.

The images are the 1797 scanned digits of scikit-learn (Alpaydin & Kaynak, UCI Optical Recognition
of Handwritten Digits, 1998), 8x8 pixels with values 0 to 16. scikit-learn is an optional
dependency, imported inside `digits`.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

TEST_SHARE = 0.25
VALIDATION_SHARE = 0.2  # of what the test set left

__all__ = ["Digits", "DigitsNet", "ResDigitsNet", "ResNet20", "digits"]


class Digits(NamedTuple):
    """The digits in three parts, each with images (N, 1, H, W) float32 and labels (N,) int64."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


def digits(size: int = 32, seed: int = 0) -> Digits:
    """Load the digits, split by class, resized and scaled to mean 0 and deviation 1.

    1077 images for training, 270 for validation and 450 for the test. Mean and deviation are those
    of the training images.

    Args:
        size: height and width; 8 leaves the images as they are, others are interpolated bilinearly.
        seed: of the split.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message says how to install it.
        TypeError: `size` is not an int.
        ValueError: `size` is less than 1.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"digits: expected size to be an int, got {size!r}")
    if size < 1:
        raise ValueError(f"digits: expected size >= 1, got {size}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ModuleNotFoundError(
            "digits: expected scikit-learn to be installed, got none; pip install 'sparsecnn[demo]'"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze_(1)
    labels = torch.from_numpy(bunch.target).long()
    if size != images.shape[-1]:
        images = functional.interpolate(
            images, size=(size, size), mode="bilinear", align_corners=False
        )
    order = torch.arange(len(labels)).numpy()
    rest, test = train_test_split(
        order, test_size=TEST_SHARE, random_state=seed, stratify=labels.numpy()
    )
    train, val = train_test_split(
        rest, test_size=VALIDATION_SHARE, random_state=seed, stratify=labels[rest].numpy()
    )
    images = (images - images[train].mean()) / images[train].std()
    parts = [
        TensorDataset(images[part].contiguous(), labels[part])
        for part in (torch.from_numpy(index) for index in (train, val, test))
    ]
    return Digits(*parts)


class DigitsNet(nn.Module):
    """Three convolutions and two linear layers for 8x8 images: 23 034 parameters, 460 416 MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv_bn(1, 16, 3, 1), nn.ReLU(),
            *_conv_bn(16, 32, 3, 1), nn.ReLU(), nn.MaxPool2d(2),
            *_conv_bn(32, 32, 3, 1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> logits (N, 10)."""
        return cast(Tensor, self.classifier(self.features(x)))


class _Block(nn.Module):
    """Basic residual block: two 3x3 convolutions, identity or 1x1 shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(c_in, c_out, 3, stride)
        # One ReLU object per place: a shared one could not be folded into one of its convolutions.
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _conv_bn(c_out, c_out, 3, 1)
        self.relu2 = nn.ReLU()
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return cast(Tensor, self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x)))


class ResDigitsNet(nn.Module):
    """Two residual blocks for 8x8 images, one with an identity, one with a projection.

    Args:
        width: channels of the stem and the first block; the second has twice as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ResDigitsNet: expected width >= 1, got {width}")
        self.stem = nn.Sequential(*_conv_bn(1, width, 3, 1), nn.ReLU())
        self.blocks = nn.Sequential(_Block(width, width, 1), _Block(width, 2 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> logits (N, 10)."""
        return cast(Tensor, self.fc(self.flatten(self.pool(self.blocks(self.stem(x))))))


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images (He et al., "Deep Residual Learning", 2016, section 4.2).

    Differences: images of one channel by default, and 1x1 convolutions (option B) instead of
    padding where a stage changes size.

    Args:
        width: channels of the first stage, 16 in the paper; the later ones have two and four
            times as many.
        classes: number of logits.
        channels: of the images.
    """

    def __init__(self, width: int = 16, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ResNet20: expected width >= 1, got {width}")
        self.stem = nn.Sequential(*_conv_bn(channels, width, 3, 1), nn.ReLU())
        blocks: list[_Block] = []
        c_in = width
        for stage in range(3):
            for index in range(3):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(c_in, width << stage, stride))
                c_in = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(c_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        return cast(Tensor, self.fc(self.flatten(self.pool(self.blocks(self.stem(x))))))


def _conv_bn(c_in: int, c_out: int, size: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(c_out)
