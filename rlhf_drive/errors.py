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
    ├── RolloutError (RuntimeError)       plans could not be sampled
    ├── StorageError (OSError)            a file of the run cannot be written
    ├── TrainingError (RuntimeError)      training cannot go on
    └── RunStoppedError (RuntimeError)    somebody asked the run to stop, and it did

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
    "RunStoppedError",
    "StorageError",
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


class StorageError(RlhfDriveError, OSError):
    """A checkpoint, a metrics file or a policy cannot be written: disk full, folder read-only or gone."""


class RolloutError(RlhfDriveError, RuntimeError):
    """Plans could not be sampled: workers were lost over them, or cannot be had."""


class TrainingError(RlhfDriveError, RuntimeError):
    """Training met a state it must not continue from, such as a non-finite loss."""


class RunStoppedError(RlhfDriveError, RuntimeError):
    """A signal asked the run to stop. It did so after a step, with a checkpoint; it is nobody's mistake."""

    def __init__(self, message: str, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """What the process should end with: 128 and the signal's number, as shells have it."""


def describe_error(error: BaseException) -> str:
    """Type and first line of the message, short enough to print by the row."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


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
