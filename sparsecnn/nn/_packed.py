"""What layers with a packed weight share: properties, the way back, the state dict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsecnn.formats._packed import PackedWeight


class PackedLayer(nn.Module):
    """A layer that keeps its weight in arrays: ``values``, which train, and buffers of indices.

    A subclass names the arrays and says how to pack and how to read them.
    """

    is_sparsecnn_layer: ClassVar[bool] = True
    _arrays: ClassVar[tuple[str, ...]]  # values come first; indices may be None
    weight_shape: tuple[int, int, int, int]
    values: nn.Parameter

    @property
    def weight(self) -> PackedWeight:
        """The packed weight, sharing the layer's tensors."""
        raise NotImplementedError

    def _pack_dense(self, dense: Tensor) -> PackedWeight:
        """Pack a dense weight of the layer's shape."""
        raise NotImplementedError

    def _weight_of(self, arrays: dict[str, Any]) -> PackedWeight:
        """The layer's weight with arrays of a state dict, not yet validated."""
        return replace(self.weight, **arrays)  # type: ignore[type-var]

    def _loading(self, packed: PackedWeight) -> None:
        """Called with a valid weight before its arrays replace the layer's."""

    def _hold(self, packed: PackedWeight, requires_grad: bool) -> None:
        self.weight_shape = packed.shape
        self.values = nn.Parameter(packed.values, requires_grad=requires_grad)
        for name in self._arrays[1:]:
            self.register_buffer(name, getattr(packed, name))

    def _stored_arrays(self) -> list[str]:
        """Names of the arrays that are there, and so in the state dict."""
        return [name for name in self._arrays if getattr(self, name) is not None]

    @property
    def nnz(self) -> int:
        """Stored values, padding included."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Stored values over all entries of the dense weight."""
        return self.weight.density

    def _dense_shape(self) -> tuple[int, ...]:
        return self.weight_shape

    def _dense_weight(self) -> Tensor:
        return self.weight.to_dense().detach().reshape(self._dense_shape())

    def _weight_requires_grad(self) -> bool:
        return self.values.requires_grad

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
        strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Also accepts a dense ``weight``, and packed arrays of other sizes."""
        name = type(self).__name__
        state = dict(state_dict)
        dense = state.pop(prefix + "weight", None)
        if dense is not None:
            if tuple(dense.shape) != self._dense_shape():
                error_msgs.append(
                    f"{name}: expected {prefix}weight of shape {self._dense_shape()}, "
                    f"got {tuple(dense.shape)}"
                )
                return
            packed = self._pack_dense(dense)
            state |= {prefix + key: getattr(packed, key) for key in self._stored_arrays()}
        arrays = {key: state.get(prefix + key) for key in self._stored_arrays()}
        if all(isinstance(array, Tensor) for array in arrays.values()):
            try:
                loaded = self._weight_of(arrays).validate()
            except ValueError as error:
                error_msgs.append(f"{name}: {prefix.rstrip('.')}: {error}")
                return
            self._loading(loaded)
            for key in arrays:
                own, shape = getattr(self, key), getattr(loaded, key).shape
                if own.shape != shape:
                    empty = own.new_empty(shape)
                    if key == "values":
                        empty = nn.Parameter(empty, requires_grad=own.requires_grad)
                    setattr(self, key, empty)
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
