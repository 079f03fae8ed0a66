"""Recipes shipped with the project, as package data."""
