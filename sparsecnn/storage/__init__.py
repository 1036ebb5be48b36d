"""Model files: safetensors with packed sparse weights and a structure manifest."""

from __future__ import annotations

from sparsecnn.storage.save_load import load, save

__all__ = ["load", "save"]
