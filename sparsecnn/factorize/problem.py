"""A layer to factorize: its weight per conv group, its geometry, what is known of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from .moments import Moments

NOMINAL_HW = (56, 56)
"""Input size taken where none is given: borders count for little, strides as they should."""


class UnsupportedLayer(ValueError):
    """A layer that a method cannot factorize; says why."""


@dataclass(frozen=True)
class LayerProblem:
    """What a method gets.

    Attributes:
        weight: (G, T, S, kh, kw) float64 on the CPU, one entry per conv group: T = K/G filters of
            S = C/G channels. A linear layer is (1, O, I, 1, 1).
        bias: (G*T,) float64 or None.
        stride: vertical, horizontal.
        padding: vertical, horizontal; "same" stays so, "valid" is (0, 0).
        dilation: vertical, horizontal.
        padding_mode: as in `nn.Conv2d`.
        in_hw: size of the input map.
        batch: images at a time.
        linear: the layer is an `nn.Linear`.
        dtype: of the layer.
        device: of the layer.
        moments: calibration statistics, None without data.
        gradients: root mean squares of the loss' gradients, shape of `weight`; None without.
        seed: of everything random.
        name: of the layer, for messages.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"
    in_hw: tuple[int, int] = NOMINAL_HW
    batch: int = 1
    linear: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    moments: Moments | None = None
    gradients: Tensor | None = None
    seed: int = 0
    name: str = ""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        in_hw: tuple[int, int] | None = None,
        batch: int = 1,
        moments: Moments | None = None,
        gradients: Tensor | None = None,
        seed: int = 0,
        name: str = "",
    ) -> LayerProblem:
        """The problem of a convolution or linear layer; masks and parametrizations are baked in.

        Raises:
            UnsupportedLayer: any other module, a lazy one, or weights that are no floats.
            ValueError: weights that are not finite, gradients that do not fit or are negative or
                not finite, or an input smaller than the kernel.
        """
        what = f"factorize: {name or type(module).__name__}"
        kind = type(module)
        if parametrize.is_parametrized(module):
            kind = kind.__mro__[1]
        if kind not in (nn.Conv2d, nn.Linear):
            raise UnsupportedLayer(f"{what}: expected nn.Conv2d or nn.Linear, got {kind.__name__}")
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise UnsupportedLayer(f"{what}: expected floating-point weights, got {weight.dtype}")
        if not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise ValueError(f"{what}: expected finite weights, got {bad} that are NaN or infinite")
        full = weight.detach().to("cpu", torch.float64)
        if gradients is not None:
            gradients = _checked_gradients(gradients, weight, what)
        bias = None
        if isinstance(module.bias, Tensor):
            bias = module.bias.detach().to("cpu", torch.float64)
        if isinstance(module, nn.Linear):
            return cls(
                full[None, :, :, None, None], bias, in_hw=(1, 1), batch=batch, linear=True,
                dtype=weight.dtype, device=weight.device, moments=moments,
                gradients=None if gradients is None else gradients[None, :, :, None, None],
                seed=seed, name=name,
            )  # fmt: skip
        assert isinstance(module, nn.Conv2d)
        padding: tuple[int, int] | str = (0, 0)
        if not isinstance(module.padding, str):
            padding = (module.padding[0], module.padding[1])
        elif module.padding == "same":
            padding = "same"
        if gradients is not None:
            gradients = gradients.reshape(module.groups, -1, *full.shape[1:])
        problem = cls(
            full.reshape(module.groups, -1, *full.shape[1:]),
            bias,
            (module.stride[0], module.stride[1]),
            padding,
            (module.dilation[0], module.dilation[1]),
            module.padding_mode,
            in_hw or NOMINAL_HW,
            batch,
            dtype=weight.dtype,
            device=weight.device,
            moments=moments,
            gradients=gradients,
            seed=seed,
            name=name,
        )
        if min(problem.out_hw) < 1:
            raise ValueError(
                f"{what}: expected in_hw at least as large as the kernel, got {problem.in_hw}"
            )
        return problem

    @property
    def groups(self) -> int:
        """Conv groups G."""
        return self.weight.shape[0]

    @property
    def T(self) -> int:
        """Filters of one group."""
        return self.weight.shape[1]

    @property
    def S(self) -> int:
        """Input channels of one group."""
        return self.weight.shape[2]

    @property
    def kh(self) -> int:
        """Rows of the kernel."""
        return self.weight.shape[3]

    @property
    def kw(self) -> int:
        """Columns of the kernel."""
        return self.weight.shape[4]

    @property
    def out_hw(self) -> tuple[int, int]:
        """Size of the output map."""
        return self._out(0), self._out(1)

    def _out(self, axis: int) -> int:
        if self.padding == "same":
            return self.in_hw[axis]
        assert not isinstance(self.padding, str)
        reach = self.dilation[axis] * ((self.kh, self.kw)[axis] - 1)
        return (self.in_hw[axis] + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1

    @property
    def p_in(self) -> int:
        """Positions of the input map."""
        return self.in_hw[0] * self.in_hw[1]

    @property
    def p_v(self) -> int:
        """Positions after a stage along the columns of the map."""
        return self.out_hw[0] * self.in_hw[1]

    @property
    def p_out(self) -> int:
        """Positions of the output map."""
        return self.out_hw[0] * self.out_hw[1]

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the layer, for one image."""
        return self.weight.numel() * self.p_out

    @property
    def dense_params(self) -> int:
        """Weights of the layer, without the bias."""
        return self.weight.numel()

    @property
    def pads(self) -> tuple[bool, bool]:
        """Whether the layer pads, by axis."""
        if self.padding == "same":
            return self.kh > 1, self.kw > 1
        assert not isinstance(self.padding, str)
        return self.padding[0] > 0, self.padding[1] > 0

    def key(self) -> tuple[object, ...]:
        """Equal for layers of equal shape and geometry, whatever their weights."""
        return (
            tuple(self.weight.shape), self.bias is None, self.stride, self.padding, self.dilation,
            self.padding_mode, self.in_hw, self.batch, self.linear, self.dtype, self.device,
        )  # fmt: skip


def _checked_gradients(gradients: object, weight: Tensor, what: str) -> Tensor:
    if not isinstance(gradients, Tensor) or gradients.shape != weight.shape:
        got = tuple(gradients.shape) if isinstance(gradients, Tensor) else type(gradients).__name__
        raise ValueError(f"{what}: expected gradients {tuple(weight.shape)}, got {got}")
    found = gradients.detach().to("cpu", torch.float64)
    if not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ValueError(f"{what}: expected gradients finite and >= 0: root mean squares")
    return found


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| (Frobenius), 0 for two zeros."""
    gap = float(torch.linalg.vector_norm(found.double() - wanted.double()))
    size = float(torch.linalg.vector_norm(wanted.double()))
    return gap / size if size else (math.inf if gap else 0.0)
