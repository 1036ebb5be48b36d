"""Numerical factorizations: float64 tensors in, float64 tensors out, no layers."""
