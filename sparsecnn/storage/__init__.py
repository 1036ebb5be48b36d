"""Model files: safetensors with packed sparse weights and a structure manifest."""

from __future__ import annotations

from sparsecnn.storage.codebook import Codebook, bake_weights_, share_weights_
from sparsecnn.storage.compressed import load_compressed, save_compressed
from sparsecnn.storage.save_load import load, save

__all__ = [
    "Codebook",
    "bake_weights_",
    "load",
    "load_compressed",
    "save",
    "save_compressed",
    "share_weights_",
]
