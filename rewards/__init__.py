"""Reward scoring in NumPy and Numba: NAVSIM kernels, PDMS, composition and the reward service."""
