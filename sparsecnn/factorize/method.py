"""What a factorization method is: the shapes of its chain and the numbers in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .problem import LayerProblem, UnsupportedLayer


@dataclass(frozen=True)
class Stage:
    """One convolution of a chain, for one conv group of the layer.

    Attributes:
        c_in: input channels.
        c_out: output channels.
        kernel: rows, columns.
        groups: of this stage within the conv group.
        axes: "h", "w", "hw" or "": whose stride, padding and dilation of the layer it carries.
        fixed: a basis that is not trained.
    """

    c_in: int
    c_out: int
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1
    axes: str = ""
    fixed: bool = False

    @property
    def params(self) -> int:
        """Weights."""
        return self.c_out * (self.c_in // self.groups) * self.kernel[0] * self.kernel[1]


@dataclass
class Factors:
    """The numbers of one conv group.

    Attributes:
        weights: per stage (c_out, c_in/groups, kh, kw) float64.
        permutations: i -> index: channels are reordered to ``x[:, index]`` in front of stage i, or
            behind the last one for i = number of stages.
        bias: (T,) in place of the layer's, for methods that change it.
        note: what the user should know of this solution; goes into the report.
    """

    weights: list[Tensor]
    permutations: dict[int, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    note: str = ""


class Method(ABC):
    """A way to write a kernel as a chain of smaller ones; its options are its fields.

    Attributes:
        name: under which it is registered.
    """

    name: ClassVar[str]

    def __str__(self) -> str:
        """For reports."""
        return self.name

    @property
    def linear(self) -> bool:
        """Whether it is made for linear layers."""
        return False

    @property
    def permuted(self) -> tuple[int, ...]:
        """Places at which its chains may reorder channels, see `Factors`."""
        return ()

    @property
    def needs_data(self) -> bool:
        """Whether it works on responses: calibration data must be given."""
        return False

    @property
    def needs_patches(self) -> bool:
        """Whether, of the data, it also needs the layer's inputs: (S kh kw)^2 numbers a group."""
        return self.needs_data

    @property
    def needs_gradients(self) -> bool:
        """Whether it works on gradients of the loss: see `collect_gradients`."""
        return False

    @abstractmethod
    def full_ranks(self, p: LayerProblem) -> tuple[int, ...]:
        """Ranks at which the chain equals the layer."""

    @abstractmethod
    def stages(self, p: LayerProblem, ranks: tuple[int, ...]) -> list[Stage]:
        """Shapes of the chain; solves nothing."""

    @abstractmethod
    def solve(self, p: LayerProblem, ranks: tuple[int, ...], group: int) -> Factors:
        """Factors of ``p.weight[group]``."""

    def unfoldings(self, p: LayerProblem, group: int) -> list[Tensor]:
        """Per rank, the matrix whose rank it bounds.

        Raises:
            UnsupportedLayer: the method has none.
        """
        raise UnsupportedLayer(
            f"factorize: {p.name}: method {self.name!r} has no matrix whose singular values say a "
            "rank; use Fixed, Ratio, TargetSpeedup, ParamRatio or Latency"
        )

    def spectra(self, p: LayerProblem) -> list[Tensor]:
        """Per rank, energies in descending order: squared singular values, summed over groups."""
        sums: list[Tensor] = []
        for group in range(p.groups):
            energies = [
                torch.linalg.svdvals(matrix).square() for matrix in self.unfoldings(p, group)
            ]
            sums = [a + b for a, b in zip(sums, energies, strict=True)] if sums else energies
        return sums

    def check(self, p: LayerProblem) -> None:
        """Raise `UnsupportedLayer` for a layer that the method cannot take."""
        return

    def clamp(self, p: LayerProblem, ranks: Sequence[int]) -> tuple[int, ...]:
        """Ranks between 1 and full."""
        pairs = zip(ranks, self.full_ranks(p), strict=True)
        return tuple(max(1, min(rank, full)) for rank, full in pairs)


def separable_stages(p: LayerProblem, count: int, *, fixed: bool = False) -> list[Stage]:
    """`count` separable filters on every channel, then 1x1: kh x 1, 1 x kw, S count -> T.

    Args:
        p: the layer.
        count: filters per channel.
        fixed: the filters are a basis that is not trained.
    """
    wide = p.S * count
    return [
        Stage(p.S, wide, (p.kh, 1), p.S, "h", fixed),
        Stage(wide, wide, (1, p.kw), wide, "w", fixed),
        Stage(wide, p.T),
    ]


METHODS: dict[str, Callable[[], Method]] = {}


def register_method(name: str, make: Callable[[], Method]) -> None:
    """Make a method known by name.

    Args:
        name: for `factorize` and files.
        make: gives the method with its default options.

    Raises:
        ValueError: the name is taken by another one.
    """
    if name in METHODS and METHODS[name] is not make:
        raise ValueError(f"register_method: expected a new name, got {name!r}")
    METHODS[name] = make


def method_of(method: str | Method) -> Method:
    """The method itself, or the registered one.

    Raises:
        TypeError: neither a name nor a method.
        ValueError: an unknown name; lists the known ones.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"factorize: expected method a name or a Method, got {type(method).__name__}"
        )
    if method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ValueError(f"factorize: expected method one of {known}, got {method!r}")
    return METHODS[method]()


def carried_axes(p: LayerProblem, stages: Sequence[Stage]) -> list[str]:
    """Whose stride, padding and dilation each stage carries.

    Along an axis on which the kernel has one tap and nothing is padded, the stride commutes with
    every stage: the first one takes it, and the others work on the smaller map.
    """
    axes = [set(stage.axes) for stage in stages]
    for name, taps, padded in zip("hw", (p.kh, p.kw), p.pads, strict=True):
        if taps == 1 and not padded:
            for carried in axes:
                carried.discard(name)
            axes[0].add(name)
    return ["".join(sorted(carried)) for carried in axes]


def chain_macs(p: LayerProblem, stages: Sequence[Stage]) -> int:
    """Multiply-accumulates of a chain for one image, each stage at its own resolution."""
    h, w = p.in_hw
    total = 0
    for stage, axes in zip(stages, carried_axes(p, stages), strict=True):
        h = p.out_hw[0] if "h" in axes else h
        w = p.out_hw[1] if "w" in axes else w
        total += p.groups * stage.params * h * w
    return total


def chain_params(p: LayerProblem, stages: Sequence[Stage]) -> int:
    """Weights of a chain, without the bias."""
    return p.groups * sum(stage.params for stage in stages)
