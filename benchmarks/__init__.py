"""Measurements; from the repository's root, ``python -m benchmarks.kernels.cpu --help``."""
