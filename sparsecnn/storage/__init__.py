"""Model files: safetensors with packed sparse weights and a structure manifest."""
