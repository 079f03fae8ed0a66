"""Guards of the policy update: limits on how far one batch may move the policy, and what happens beyond them.

The limits are early stopping of PPO (1707.06347, as its public implementations do it): before each further update on
a batch, the distance of the live policy from the one that sampled is measured; beyond the limit the batch has given
what it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from rlhf_drive.errors import ConfigError, TrainingError, did_you_mean
from rlhf_drive.training.snapshot import Snapshot

__all__ = ["ON_LIMIT", "LimitGuard", "Limits", "OnLimit", "breached"]

OnLimit = Literal["stop", "rollback", "next_batch"]
ON_LIMIT: tuple[str, ...] = get_args(OnLimit)

MAX_ROLLBACKS = 3
"""Steps in a row that may be undone before the run stops: it would learn nothing more."""


@dataclass(frozen=True)
class Limits:
    """How far one batch of rollouts may move the policy. ``Limits(0.05, 2.0, "next_batch")``."""

    kl_limit: float
    """Largest ``kl/old_approx`` (nats a token, k3 of the sampling policy to the live one); 0 is off."""
    ratio_limit: float
    """r > 1: importance ratios must lie in [1/r, r]; 0 is off."""
    on_limit: OnLimit
    """`stop` ends the run, `rollback` undoes the step's updates, `next_batch` keeps them and skips the batch's rest."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.kl_limit < float("inf"):
            problems.append(f"rl.kl_limit = {self.kl_limit} must be 0 (off) or a positive number of nats a token.")
        if self.ratio_limit != 0 and not 1 < self.ratio_limit < float("inf"):
            problems.append(f"rl.ratio_limit = {self.ratio_limit} must be 0 (off) or above 1; ratios start at 1.")
        if self.on_limit not in ON_LIMIT:
            problems.append(f"rl.on_limit = {self.on_limit!r} does not exist. {did_you_mean(self.on_limit, ON_LIMIT)}")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def active(self) -> bool:
        """Whether any limit is set."""
        return self.kl_limit > 0 or self.ratio_limit > 0


def breached(metrics: Mapping[str, float], limits: Limits) -> str | None:
    """Which limit the metrics of one pass over the batch exceed, as a clause for messages; None if none.

    NaN exceeds every limit. A value equal to the limit does not.

    Args:
        metrics: ``kl/old_approx`` and ``ratio/min``, ``ratio/max`` of the whole batch, before the update they announce.
        limits: What is allowed.

    Raises:
        ConfigError: A limit is set on something that the objective does not report.

    Example:
        >>> breached({"kl/old_approx": 0.2}, Limits(0.1, 0.0, "stop"))
        'kl/old_approx is 0.2, above rl.kl_limit = 0.1'
    """
    found = []
    if limits.kl_limit > 0:
        kl = _measured(metrics, "kl/old_approx", "kl_limit")
        if not kl <= limits.kl_limit:
            found.append(f"kl/old_approx is {kl:.4g}, above rl.kl_limit = {limits.kl_limit:g}")
    if limits.ratio_limit > 0:
        low, high = (_measured(metrics, name, "ratio_limit") for name in ("ratio/min", "ratio/max"))
        if not (low >= 1.0 / limits.ratio_limit and high <= limits.ratio_limit):
            allowed = f"[1/{limits.ratio_limit:g}, {limits.ratio_limit:g}] (rl.ratio_limit)"
            found.append(f"importance ratios reach from {low:.4g} to {high:.4g}, outside {allowed}")
    return " and ".join(found) or None


def _measured(metrics: Mapping[str, float], name: str, key: str) -> float:
    if name not in metrics:
        raise ConfigError(
            f"rl.{key} limits {name}, but this likelihood and objective report none; set rl.{key} to 0, or choose a "
            "likelihood with a ratio."
        )
    return metrics[name]


class LimitGuard:
    """Acts on the limits during a run and counts what it did.

    Example::

        guard.begin()
        for iteration in range(num_iterations):
            metrics = accumulate_gradients()
            if guard.check(metrics, step):
                break
            update()

    Args:
        limits: What an update may do.
        policy: The policy that is trained.
        optimizer: Its optimizer.
    """

    def __init__(self, limits: Limits, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.limits, self.policy, self.optimizer = limits, policy, optimizer
        self.rollbacks = 0
        self.early_stops = 0
        self._in_a_row = 0
        self._undone = False
        self._snapshot: Snapshot | None = None

    def begin(self) -> None:
        """A step starts, with the weights that its batch was sampled with."""
        self._in_a_row = self._in_a_row if self._undone else 0
        self._undone = False
        if self.limits.active and self.limits.on_limit == "rollback":
            self._snapshot = None  # not two at a time
            self._snapshot = Snapshot(self.policy, self.optimizer)

    def check(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether a limit is exceeded, so that the rest of the batch is skipped. Gradients are then dropped, and after
        a rollback weights and optimizer are those of the step's start.

        Args:
            metrics: See :func:`breached`.
            step: 0-based, for the message.

        Raises:
            TrainingError: A limit is exceeded and `on_limit` is `stop`, or this is the third rollback in a row.
            ConfigError: See :func:`breached`.
        """
        reason = breached(metrics, self.limits)
        if reason is None:
            return False
        advice = "Lower rl.learning_rate or rl.num_iterations, or raise the limit."
        if self.limits.on_limit == "stop":
            raise TrainingError(f"Step {step + 1}: {reason}, and rl.on_limit is stop. {advice}")
        self.optimizer.zero_grad(set_to_none=True)
        if self.limits.on_limit == "next_batch":
            self.early_stops += 1
            return True
        assert self._snapshot is not None, "begin() starts each step"
        self._snapshot.restore()
        self._undone = True
        self.rollbacks += 1
        self._in_a_row += 1
        if self._in_a_row >= MAX_ROLLBACKS:
            raise TrainingError(
                f"Step {step + 1}: {reason}; the updates of {self._in_a_row} steps in a row had to be undone, so "
                f"nothing is learned any more. {advice}"
            )
        return True

    @property
    def undone(self) -> bool:
        """Whether the updates since :meth:`begin` were undone."""
        return self._undone

    def metrics(self) -> dict[str, float]:
        """Counts since the run began."""
        return {"guard/rollbacks": float(self.rollbacks), "guard/early_stops": float(self.early_stops)}

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps between two steps, as plain JSON data."""
        in_a_row = self._in_a_row if self._undone else 0
        return {"rollbacks": self.rollbacks, "early_stops": self.early_stops, "in_a_row": in_a_row}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from what :meth:`state` gave; an empty mapping is a fresh start."""
        self.rollbacks, self.early_stops = state.get("rollbacks", 0), state.get("early_stops", 0)
        self._in_a_row = state.get("in_a_row", 0)
        self._undone = self._in_a_row > 0
