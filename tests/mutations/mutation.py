"""A wrong variant of one rule, and the test that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Edit", "Mutation", "broken"]


@dataclass(frozen=True)
class Edit:
    """One replacement of text that stands exactly once in its file."""

    file: str
    """Path from the repository's root."""
    old: str
    """The right code."""
    new: str
    """The wrong code."""


@dataclass(frozen=True)
class Mutation:
    """One rule broken."""

    rule: str
    """What the variant does wrong."""
    test: str
    """A test that fails for it, without recorded data: ``file::function`` below ``tests/rewards``."""
    edits: tuple[Edit, ...]
    """All are applied together."""


def broken(rule: str, test: str, file: str, *texts: str) -> Mutation:
    """A mutation of one file: `texts` are old, new, old, new, …"""
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Mutation(rule, test, tuple(Edit(file, old, new) for old, new in pairs))
