"""Advantages and policy objectives."""
