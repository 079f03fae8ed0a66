"""Readers of other scene formats."""
