"""Watches a run's monitors and says when a policy seems to game its reward.

Each monitor is followed in two windows: its first `window` values (the start) and its latest. Rules compare means over
these windows (medians for ratios), so that one odd batch raises no alert and no run is judged before both are full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rewards.builtin import AGGREGATES
from rewards.monitors import SCORER_COLUMNS
from rewards.plan_motion import MOTION
from rlhf_drive.errors import CheckpointError

__all__ = ["ALERTS_FILE", "Alert", "HackDetector", "MonitorLimits", "slope_over_error"]


ALERTS_FILE = "alerts.jsonl"
"""Where a run folder keeps its alerts: lines with `phase`, `step`, `name` and `message`."""


@dataclass(frozen=True)
class MonitorLimits:
    """Thresholds of the rules. Shares in 0..1."""

    window: int = 10
    """Values of a monitor in the start window and in the latest window."""
    reversal_share: float = 0.05
    """Share of plans whose last step reverses that is tolerated."""
    reversal_rise: float = 0.05
    """Its rise since the start that is tolerated; an alert needs both exceeded."""
    standstill_share: float = 0.10
    """Share of plans that stand still while the reference moves that is tolerated."""
    standstill_rise: float = 0.05
    """Its rise since the start that is tolerated; an alert needs both exceeded."""
    motion_factor: float = 2.0
    """A ratio to the human's motion may grow to this times the larger of 1 and the start's ratio, and shrink to the
    smaller of the two divided by this."""
    ceiling_share: float = 0.995
    """A component that is at its ceiling in this share of plans teaches nothing."""
    ceiling_rise: float = 0.02
    """A component of the scorer counts as saturated only if the share rose by this since the start: traffic lights in
    scenes without any are no news. A term of the user's counts from the start."""
    variance_share: float = 0.95
    """Share of the total's variation within groups above which one component alone decides it."""
    heldout_window: int = 5
    """Evaluations on held-out scenes, the latest ones, whose trend is looked at."""
    heldout_fall: float = 0.01
    """Fall of the held-out score over that window, along its fitted line, that is tolerated (0..1)."""
    training_rise: float = 0.01
    """Rise of the training reward over that window from which on a falling held-out score is suspicious (0..1)."""
    trend_t: float = 3.0
    """A slope counts from this many standard errors on. Over five evaluations noise has a slope as steep in one
    direction with probability 0.029, so both slopes together with 0.0008."""


@dataclass(frozen=True)
class Alert:
    """Something that looks like reward hacking."""

    name: str
    """Rule, with the component or quantity that it is about: `reversal`, `standstill`, `motion/curvature`,
    `saturated/dac`, `dominant/ep`, `heldout`."""
    message: str
    """What was seen, against what limit, and what to look at."""
    step: int
    """Training step at which it was noticed."""


@dataclass(frozen=True)
class _Windows:
    """Start and latest value of a monitor."""

    start: float
    now: float


class HackDetector:
    """Alerts from monitors; plain state that a checkpoint can carry.

    An alert is given once, and again only if its condition has gone in between and `window` steps have passed.

    Example:
        >>> detector = HackDetector(MonitorLimits(window=1))
        >>> detector.update(1, {"monitor/final_reversal": 0.01})
        []
        >>> [alert.name for alert in detector.update(2, {"monitor/final_reversal": 0.4})]
        ['reversal']
    """

    def __init__(self, limits: MonitorLimits | None = None) -> None:
        self.limits = limits or MonitorLimits()
        """Thresholds."""
        self._series: dict[str, list[list[float]]] = {}
        self._given: dict[str, int] = {}
        self._active: set[str] = set()
        self._rewards: list[float] = []  # sum and count since the last evaluation
        self._evaluations: list[list[float]] = []

    def update(self, step: int, monitors: Mapping[str, float], *, reward: float = math.nan) -> list[Alert]:
        """Take the monitors of one training step.

        Args:
            step: Of training.
            monitors: What :func:`rewards.monitors.batch_monitors` returns; values that are not finite are left out.
            reward: Mean total of the step's valid rows, kept for the next held-out evaluation.

        Returns:
            New alerts.
        """
        window = self.limits.window
        for name, value in monitors.items():
            if math.isfinite(value):
                start, latest = self._series.setdefault(name, [[], []])
                (start if len(start) < window else latest).append(float(value))
                del latest[:-window]
        if math.isfinite(reward):
            total, count = self._rewards or (0.0, 0.0)
            self._rewards = [total + float(reward), count + 1.0]
        found = {**self._shares(), **self._motion(), **self._components()}
        return self._new(step, found, lambda name: name != "heldout")

    def update_heldout(self, step: int, score: float) -> list[Alert]:
        """Take the mean score (EPDMS, 0..1) of the policy on a fixed set of held-out scenes.

        It is paired with the mean training reward since the evaluation before; without one it is left out.

        Returns:
            New alerts.
        """
        if self._rewards and math.isfinite(score):
            total, count = self._rewards
            self._evaluations.append([float(step), total / count, float(score)])
            del self._evaluations[: -self.limits.heldout_window]
            self._rewards = []
        return self._new(step, self._heldout(), lambda name: name == "heldout")

    def state(self) -> dict[str, Any]:
        """Everything that it remembers, as JSON."""
        return {
            "series": {name: [list(part) for part in parts] for name, parts in self._series.items()},
            "given": dict(self._given),
            "active": sorted(self._active),
            "rewards": list(self._rewards),
            "evaluations": [list(row) for row in self._evaluations],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned.

        Raises:
            CheckpointError: It is not such a state.
        """
        try:
            self._series = {
                str(name): [list(map(float, part)) for part in parts] for name, parts in state["series"].items()
            }
            self._given = {str(name): int(step) for name, step in state["given"].items()}
            self._active = set(state["active"])
            self._rewards = [float(value) for value in state["rewards"]]
            self._evaluations = [[float(value) for value in row] for row in state["evaluations"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"The checkpoint's monitor state cannot be read: {error!r}. Start anew.") from error

    def _windows(self, name: str, average: Callable[[Sequence[float]], Any] = np.mean) -> _Windows | None:
        """Both windows of a monitor; None until they are full."""
        start, latest = self._series.get(name, [[], []])
        if len(latest) < self.limits.window:
            return None
        return _Windows(float(average(start)), float(average(latest)))

    def _shares(self) -> dict[str, str]:
        """Reversal and standstill."""
        limits, found = self.limits, {}
        rules = (
            ("reversal", "monitor/final_reversal", limits.reversal_share, limits.reversal_rise,
             "of plans end with a step backwards", "The progress or comfort terms may be gamed; look at plans."),
            ("standstill", "monitor/standstill", limits.standstill_share, limits.standstill_rise,
             "of plans stand still where the reference moves", "Safety may be worth more than progress to the reward."),
        )  # fmt: skip
        for name, monitor, most, rise, words, advice in rules:
            seen = self._windows(monitor)
            if seen and seen.now > most and seen.now > seen.start + rise:
                found[name] = (
                    f"{seen.now:.1%} {words} ({seen.start:.1%} at the start; limits: {most:.0%} and a rise by "
                    f"{rise:.0%}). {advice}"
                )
        return found

    def _motion(self) -> dict[str, str]:
        """Drift of the motion statistics."""
        found, factor = {}, self.limits.motion_factor
        for name in MOTION:
            seen = self._windows(f"monitor/{name}_ratio", np.median)
            if seen is None:
                continue
            low, high = min(1.0, seen.start) / factor, factor * max(1.0, seen.start)
            if not low <= seen.now <= high:
                found[f"motion/{name}"] = (
                    f"Plans have {seen.now:.2f} times the human's {name.replace('_', ' ')} ({seen.start:.2f} times at "
                    f"the start; limits: {low:.2f} to {high:.2f}). They no longer drive like a human."
                )
        return found

    def _components(self) -> dict[str, str]:
        """Saturated and dominant components."""
        found, limits = {}, self.limits
        for monitor in self._series:
            kind, _, name = monitor.removeprefix("monitor/").partition("/")
            seen = self._windows(monitor)
            if seen is None or name in AGGREGATES:
                continue
            risen = name not in SCORER_COLUMNS or seen.now >= seen.start + limits.ceiling_rise
            if kind == "ceiling" and seen.now >= limits.ceiling_share and risen:
                found[f"saturated/{name}"] = (
                    f"{name} is at its ceiling in {seen.now:.1%} of plans ({seen.start:.1%} at the start; limit: "
                    f"{limits.ceiling_share:.1%}): it teaches nothing more, and only the other terms shape the policy."
                )
            if kind == "variance_share" and seen.now >= limits.variance_share:
                found[f"dominant/{name}"] = (
                    f"{name} alone explains {seen.now:.1%} of the reward's variation within groups ({seen.start:.1%} "
                    f"at the start; limit: {limits.variance_share:.0%}): the policy is taught little else."
                )
        return found

    def _heldout(self) -> dict[str, str]:
        """Held-out score falls while the training reward rises."""
        limits, rows = self.limits, np.array(self._evaluations)
        if len(rows) < limits.heldout_window:
            return {}
        rise, rise_t = slope_over_error(rows[:, 0], rows[:, 1])
        fall, fall_t = slope_over_error(rows[:, 0], -rows[:, 2])
        clear = min(rise_t, fall_t) >= limits.trend_t
        if not (clear and rise >= limits.training_rise and fall >= limits.heldout_fall):
            return {}
        return {
            "heldout": f"The score on held-out scenes fell by {100 * fall:.1f} points over the last {len(rows)} looks "
            f"(steps {rows[0, 0]:.0f} to {rows[-1, 0]:.0f}) while the training reward rose by {100 * rise:.1f}: "
            "the policy learns what the reward overlooks. Stop earlier, or reward what is lost."
        }

    def _new(self, step: int, found: Mapping[str, str], mine: Callable[[str], bool]) -> list[Alert]:
        """Alerts of what is found now and was not before."""
        fresh = [
            name
            for name in found
            if name not in self._active and step - self._given.get(name, -(10**9)) >= self.limits.window
        ]
        # What came back too soon to be said again is not active yet: it is said once the time has passed.
        self._active = {name for name in self._active if not mine(name) or name in found} | set(fresh)
        self._given |= dict.fromkeys(fresh, step)
        return [Alert(name, found[name], step) for name in fresh]


def slope_over_error(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Least-squares line through points: its rise over the range of x, and its slope in standard errors.

    ``t = b / sqrt(sum(residual²) / (n - 2) / sum((x - mean)²))``; infinite where the points lie on a rising line.
    Needs three points with different x; fewer give (0, 0).
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    dx, dy = across - across.mean(), up - up.mean()
    spread = float(dx @ dx)
    if len(across) < 3 or spread == 0.0:
        return 0.0, 0.0
    slope = float(dx @ dy) / spread
    error = math.sqrt(float(((dy - slope * dx) ** 2).sum()) / (len(across) - 2) / spread)
    rise = slope * float(np.ptp(across))
    if error <= 1e-12 * abs(slope):
        return rise, math.copysign(math.inf, slope) if slope else 0.0
    return rise, slope / error
