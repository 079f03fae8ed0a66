"""Recipes' runs as work for several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_drive.config import Recipe
from rlhf_drive.training.pipeline import run
from rlhf_drive.training.ranks import Ranks

__all__ = ["train"]


def train(recipes: Sequence[Recipe], ranks: Ranks) -> list[Path]:
    """Run recipes one after the other, with the processes of `ranks`, which the pipeline finds by itself."""
    del ranks
    return [run(recipe) for recipe in recipes]
