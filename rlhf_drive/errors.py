"""The exceptions rlhf-drive raises.

Every error derives from :class:`RlhfDriveError` and from the standard exception it refines, so that both
``except RlhfDriveError`` and the idiomatic ``except ValueError`` work::

    RlhfDriveError
    ├── ConfigError (ValueError)          a recipe or an option is wrong
    ├── UnknownNameError (LookupError)    a registered name does not exist
    ├── DataError (ValueError)            scenes, candidates or shards are unusable
    ├── CheckpointError (ValueError)      a checkpoint cannot be used
    ├── PluginError (ImportError)         a user's function cannot be loaded
    ├── RewardError (RuntimeError)        too many rows could not be scored
    └── TrainingError (RuntimeError)      training cannot go on

A message says what is wrong, the value, where it stands, and what to do. All classes are picklable: they take one
string, so they cross process and Ray boundaries unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "PluginError",
    "RewardError",
    "RlhfDriveError",
    "TrainingError",
    "UnknownNameError",
    "did_you_mean",
]


class RlhfDriveError(Exception):
    """Root of all errors raised on purpose by this project."""


class ConfigError(RlhfDriveError, ValueError):
    """A recipe key, value or combination is wrong; raised before any work starts."""


class UnknownNameError(RlhfDriveError, LookupError):
    """A name is not in its registry."""


class DataError(RlhfDriveError, ValueError):
    """A scene, shard, candidate file or recording cannot be used."""


class CheckpointError(RlhfDriveError, ValueError):
    """A checkpoint is missing, truncated or does not fit."""


class PluginError(RlhfDriveError, ImportError):
    """A user's function or file cannot be loaded."""


class RewardError(RlhfDriveError, RuntimeError):
    """More rollouts than the recipe tolerates could not be scored."""


class TrainingError(RlhfDriveError, RuntimeError):
    """Training met a state it must not continue from, such as a non-finite loss."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Sentence that offers the closest of `known`, or lists them all.

    Args:
        name: What the user wrote.
        known: The names that exist.

    Returns:
        For example ``"Did you mean 'ego_progress'? Known: comfort, ego_progress."``.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) or '(none)'}."
