"""What packed weights have in common: values, a dense shape, and int32 arrays that place them."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self


class PackedWeight:
    """Base of the formats; a subclass is a dataclass and adds its index arrays.

    Attributes:
        values: 1-d, stored weights.
        shape: ``(K, C/G, R, S)`` of the dense weight.
    """

    values: Tensor
    shape: tuple[int, int, int, int]

    @property
    def nnz(self) -> int:
        """Number of stored values, padding included."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Stored values over all entries; 0 for an empty weight."""
        k, c, r, s = self.shape
        return self.nnz / (k * c * r * s) if k * c * r * s else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [t for t in vars(self).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in arrays)

    def to_dense(self) -> Tensor:
        """The dense weight ``(K, C/G, R, S)``; differentiable with respect to ``values``."""
        raise NotImplementedError

    def validate(self) -> Self:
        """Check every invariant the kernels rely on; returns itself.

        Raises:
            ValueError: names the array that is corrupt and why.
        """
        raise NotImplementedError

    @classmethod
    def _check_dense(cls, weight: Tensor) -> None:
        """Refuse what cannot be packed: anything but a floating-point weight of 2 or 4 dims."""
        name = cls.__name__
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"{name}: expected weight a floating-point tensor, got {got}")
        if weight.dim() not in (2, 4):
            raise ValueError(
                f"{name}: expected weight of shape (K, C/G, R, S) or (O, I), "
                f"got {tuple(weight.shape)}"
            )
        if weight.numel() >= 2**31:
            raise ValueError(
                f"{name}: expected weight with fewer than 2^31 elements, got {weight.numel()}"
            )

    def _check_arrays(self, *indices: str) -> None:
        """Refuse a shape, index arrays or values of the wrong kind, whatever is in them."""
        name = type(self).__name__
        if len(self.shape) != 4 or any(not isinstance(n, int) or n < 0 for n in self.shape):
            raise ValueError(
                f"{name}: expected shape (K, C/G, R, S) of non-negative integers, got {self.shape}"
            )
        for index in indices:
            t = getattr(self, index)
            if t.dtype != torch.int32 or t.dim() != 1:
                raise ValueError(
                    f"{name}: expected {index} a 1-d int32 tensor, got {t.dim()}-d {t.dtype}"
                )
        if self.values.dim() != 1 or not self.values.is_floating_point():
            raise ValueError(
                f"{name}: expected values a 1-d floating-point tensor, "
                f"got {self.values.dim()}-d {self.values.dtype}"
            )
