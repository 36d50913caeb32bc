"""Benchmarks: run them from the repository's root, such as ``python -m benchmarks.step``."""
