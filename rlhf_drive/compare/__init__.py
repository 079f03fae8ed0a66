"""Offline comparison of policies."""
