"""Benchmarks: real layers and models against the framework, see run.py."""
