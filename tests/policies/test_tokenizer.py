"""The trajectory tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.policies import TrajectoryTokenizer
from rlhf_drive.policies.tokenizer import headings_from_positions

WAM = TrajectoryTokenizer("waypoints", -100.0, 100.0, 0.01)
FINE = TrajectoryTokenizer("displacements", -20.0, 20.0, 0.05)


def arc(speed: float, yaw_rate: float) -> np.ndarray:
    """``[1, 8, 3]`` a constant turn: the closed form of a circle."""
    t = 0.5 * np.arange(1, 9)
    heading = yaw_rate * t
    radius = speed / yaw_rate
    return np.stack([radius * np.sin(heading), radius * (1 - np.cos(heading)), heading], axis=-1)[None]


def test_wam_vocabulary_has_20001_numbers() -> None:
    assert WAM.vocab_size == 20_001
    assert WAM.values(np.array([0, 10_000, 20_000])).tolist() == pytest.approx([-100.0, 0.0, 100.0])


def test_waypoint_tokens_are_bin_numbers() -> None:
    poses = np.zeros((1, 8, 3))
    poses[0, :, 0] = 1.234
    poses[0, :, 1] = -0.5
    assert WAM.encode(poses)[0, :2].tolist() == [10_123, 9_950]


@pytest.mark.parametrize("tokenizer", [WAM, FINE])
def test_round_trip_of_a_turn_stays_within_half_a_bin(tokenizer: TrajectoryTokenizer) -> None:
    plan = arc(8.0, 0.3)
    back = tokenizer.decode(tokenizer.encode(plan))
    # Half a bin in each of two directions; errors do not add up along the path.
    assert np.hypot(*(back - plan)[0, :, :2].T).max() <= tokenizer.step * np.sqrt(0.5) + 1e-9
    assert np.abs(back - plan)[..., 2].max() < 0.03


def test_displacements_of_a_straight_line_are_equal_steps() -> None:
    poses = np.zeros((1, 8, 3))
    poses[0, :, 0] = 2.5 * np.arange(1, 9)
    assert FINE.values(FINE.encode(poses))[0].tolist() == pytest.approx([2.5, 0.0] * 8)


def test_standing_still_keeps_the_heading() -> None:
    poses = FINE.decode(FINE.quantise(np.zeros((1, 16))))
    assert np.abs(poses).max() == 0.0


def test_headings_of_a_parabola_are_its_tangents() -> None:
    # x = 4 t, y = t^2 (t in steps): tangent (4, 2 t); parabolas are fitted exactly.
    t = np.arange(1, 9, dtype=float)
    xy = np.stack([4 * t, t**2], axis=-1)[None]
    assert headings_from_positions(xy)[0] == pytest.approx(np.arctan2(2 * t, 4.0), abs=1e-12)


def test_reversing_does_not_turn_the_car_round() -> None:
    xy = np.zeros((1, 8, 2))
    xy[0, :, 0] = -np.arange(1, 9)
    assert np.abs(headings_from_positions(xy)).max() == 0.0


@pytest.mark.parametrize("tokenizer", [WAM, FINE])
def test_mirrored_tokens_decode_to_the_mirrored_plan(tokenizer: TrajectoryTokenizer) -> None:
    tokens = torch.from_numpy(tokenizer.encode(arc(6.0, -0.4)))
    plan, mirrored = tokenizer.decode(tokens.numpy()), tokenizer.decode(tokenizer.mirror(tokens).numpy())
    assert mirrored == pytest.approx(plan * np.array([1.0, -1.0, -1.0]), abs=1e-9)


def test_bad_ranges_and_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="whole number of steps"):
        TrajectoryTokenizer("waypoints", 0.0, 1.0, 0.3)
    with pytest.raises(DataError, match="mask was left"):
        FINE.decode(np.full((1, 16), FINE.vocab_size))
    with pytest.raises(DataError, match="finite"):
        FINE.encode(np.full((1, 8, 3), np.nan))
