"""Numeric trajectory tokenizer: poses to numbers on a uniform grid, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.scenes import NUM_POSES, wrap_angle

__all__ = ["ENCODINGS", "TrajectoryTokenizer", "headings_from_positions"]

ENCODINGS = ("waypoints", "displacements")
"""`waypoints`: x, y of each pose in the ego frame (WAM-Diff, WAM-Flow). `displacements`: each step forward and left in
the frame of the direction of travel so far, which keeps numbers small and plans smooth."""

MIN_STEP_M = 0.3
"""Shorter displacements do not define a direction of travel: the previous one is kept."""


def headings_from_positions(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Headings of a path that starts at the origin with heading 0: the derivative of parabolas through three positions.

    Args:
        xy: ``[N, T, 2]`` metres, equally spaced in time.

    Returns:
        ``[N, T]`` radians. Where the path hardly moves, or reverses, the vehicle keeps facing as before.
    """
    n, t, _ = xy.shape
    path = np.concatenate([np.zeros((n, 1, 2)), xy], axis=1)
    tangent = np.empty((n, t, 2))
    tangent[:, :-1] = path[:, 2:] - path[:, :-2]
    tangent[:, -1] = 3.0 * path[:, -1] - 4.0 * path[:, -2] + path[:, -3]
    heading = np.zeros((n, t))
    previous = np.zeros(n)
    for k in range(t):
        angle = np.arctan2(tangent[:, k, 1], tangent[:, k, 0])
        turn = wrap_angle(angle - previous)
        turn = np.where(np.abs(turn) > np.pi / 2, wrap_angle(turn + np.pi), turn)
        moves = np.hypot(tangent[:, k, 0], tangent[:, k, 1]) >= MIN_STEP_M
        previous = np.where(moves, previous + turn, previous)
        heading[:, k] = previous
    return wrap_angle(heading)


@dataclass(frozen=True)
class TrajectoryTokenizer:
    """Poses ``[N, T, 3]`` <-> tokens ``[N, L]``, ``L = 2 T``, interleaved x, y. Heading is derived, not encoded.

    WAM's tokenizer is ``TrajectoryTokenizer("waypoints", -100.0, 100.0, 0.01)`` with 20,001 tokens.
    """

    encoding: str
    """One of `ENCODINGS`."""
    low: float
    """Value of token 0 (m)."""
    high: float
    """Value of the last token (m)."""
    step: float
    """Metres between tokens."""
    num_poses: int = NUM_POSES
    """T."""

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ConfigError(f"Unknown tokenizer encoding {self.encoding!r}; use one of {', '.join(ENCODINGS)}.")
        bins = (self.high - self.low) / self.step if self.step > 0 else 0.0
        if bins < 1 or abs(bins - round(bins)) > 1e-6:
            raise ConfigError(
                f"Tokenizer range [{self.low}, {self.high}] must hold a whole number of steps of {self.step} m; "
                f"got {bins}."
            )

    @property
    def vocab_size(self) -> int:
        """V: numeric tokens (the mask token V comes on top)."""
        return round((self.high - self.low) / self.step) + 1

    @property
    def length(self) -> int:
        """L: tokens of a plan."""
        return 2 * self.num_poses

    def values(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Bin centres of tokens, metres."""
        return self.low + self.step * np.asarray(tokens, dtype=np.float64)

    def quantise(self, values: NDArray[np.floating]) -> NDArray[np.int64]:
        """Nearest token of each value; values outside the range take the nearest end."""
        token = np.rint((np.asarray(values, dtype=np.float64) - self.low) / self.step)
        return np.clip(token, 0, self.vocab_size - 1).astype(np.int64)

    def encode(self, poses: NDArray[np.floating]) -> NDArray[np.int64]:
        """Tokens of plans; each displacement is taken from the decoded path so far, so errors do not add up.

        Args:
            poses: ``[N, T, 3]`` in the t=0 ego frame; headings are ignored.

        Raises:
            DataError: Wrong shape or a pose that is not finite.
        """
        plans = np.asarray(poses, dtype=np.float64)
        if plans.ndim != 3 or plans.shape[1:] != (self.num_poses, 3) or not np.isfinite(plans).all():
            raise DataError(f"Plans to encode must be finite [N, {self.num_poses}, 3]; got shape {plans.shape}.")
        if self.encoding == "waypoints":
            return self.quantise(plans[:, :, :2].reshape(len(plans), -1))
        return self.quantise(self._walk(plans[:, :, :2], None)[0])

    def decode(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Plans ``[N, T, 3]`` (m, rad) of tokens ``[N, L]``; DataError if a token lies outside ``0 … V-1``."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise DataError(f"Tokens to decode must be [N, {self.length}]; got shape {tokens.shape}.")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise DataError(
                f"Token {int(tokens.min())} … {int(tokens.max())} outside 0 … {self.vocab_size - 1}; a mask was left."
            )
        values = self.values(tokens).reshape(len(tokens), self.num_poses, 2)
        xy = values if self.encoding == "waypoints" else self._walk(None, values)[1]
        return np.concatenate([xy, headings_from_positions(xy)[..., None]], axis=-1)

    def mirror(self, tokens: Tensor) -> Tensor:
        """Tokens ``[N, L]`` of the plans mirrored left to right; out-of-range numbers take the end."""
        value = -(tokens[:, 1::2] * self.step + self.low)
        mirrored = tokens.clone()
        mirrored[:, 1::2] = ((value - self.low) / self.step).round().long().clamp(0, self.vocab_size - 1)
        return mirrored

    def path_values(self, xy: NDArray[np.floating]) -> NDArray[np.float64]:
        """``[N, L]`` the exact numbers (m), not rounded to tokens, that encode paths ``[N, T, 2]``."""
        path = np.asarray(xy, dtype=np.float64)
        if self.encoding == "waypoints":
            return path.reshape(len(path), -1)
        return self._walk(path, None, rounded=False)[0]

    def _walk(
        self, target: NDArray[np.float64] | None, given: NDArray[np.float64] | None, *, rounded: bool = True
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Step along the path in the travel frame, towards `target` or by `given` numbers; (numbers, positions)."""
        n = len(target if given is None else given)  # type: ignore[arg-type]
        position, heading = np.zeros((n, 2)), np.zeros(n)
        numbers = np.zeros((n, self.num_poses, 2))
        path = np.zeros((n, self.num_poses, 2))
        for k in range(self.num_poses):
            cos, sin = np.cos(heading), np.sin(heading)
            if target is not None:
                delta = target[:, k] - position
                local = np.stack(
                    [cos * delta[:, 0] + sin * delta[:, 1], cos * delta[:, 1] - sin * delta[:, 0]], axis=-1
                )
                numbers[:, k] = self.values(self.quantise(local)) if rounded else local
            elif given is not None:
                numbers[:, k] = given[:, k]
            dx, dy = numbers[:, k, 0], numbers[:, k, 1]
            position = position + np.stack([cos * dx - sin * dy, sin * dx + cos * dy], axis=-1)
            path[:, k] = position
            moves = (np.hypot(dx, dy) >= MIN_STEP_M) & (dx > 0)
            heading = np.where(moves, heading + np.arctan2(dy, dx), heading)
        return numbers.reshape(n, -1), path
