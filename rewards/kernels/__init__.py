"""Numba kernels of the scorer."""
