"""Sampling groups of trajectories."""
