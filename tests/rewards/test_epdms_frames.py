"""The logged past and the plan of the previous frame in EPDMS: which samples count, and what they are compared to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles.tiny_epdms import PLAN, prepared, reference
from oracles.tiny_scene import WORLD, straight_plan

from rewards.epdms import score_epdms
from rewards.kernels.comfort_v2 import frame_differences
from rewards.prepare_epdms import prepare_epdms, prepare_history
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import SceneReference, to_world_frame


def past(ax: tuple[float, float, float, float], stamps: tuple[int, int, int, int]) -> SceneReference:
    made = reference()
    states = made.past_states.copy()
    states[:, 5] = ax
    ego = made.ego_init.copy()
    ego[5] = ax[-1]
    return replace(made, ego_init=ego, past_states=states, past_times_us=made.t0_us + np.array(stamps))


EVEN = (-1_500_000, -1_000_000, -500_000, 0)
ODD = (-1_500_049, -999_988, -500_021, 0)


def test_history_leaves_out_the_sample_before_the_first_state() -> None:
    """ax rises by 1 in each half second: at -1.5 + 0.1 k it is 0.2 k. The last of the 14 is 2.6, at -0.2 s."""
    history = prepare_history(past((0.0, 1.0, 2.0, 3.0), EVEN))
    np.testing.assert_allclose(history[:, 1], 0.2 * np.arange(14), atol=1e-12)
    np.testing.assert_array_equal(history[:, [0, 2]], 0.0)


def test_a_few_microseconds_more_bring_the_missing_sample_back() -> None:
    history = prepare_history(past((0.0, 1.0, 2.0, 3.0), ODD))
    assert len(history) == 15
    at = -1.500049 + 0.1 * np.arange(15)
    expected = np.interp(at, np.array(ODD) * 1e-6, [0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(history[:, 1], expected, atol=1e-9)
    assert history[-1, 1] == pytest.approx(2.8, abs=1e-3)


def test_the_missing_sample_can_decide_history_comfort() -> None:
    """The log brakes from 0 to -5.3 m/s^2 in the last half second, and the plan lets go at once. With the sample at
    -0.1 s that lasts a step longer: smoothed, it breaks two bounds. Which it is depends on 49 microseconds."""
    even, odd = (
        score_epdms(prepare_epdms(past((0.0, 0.0, 0.0, -5.3), stamps)), PLAN).history_comfort[0].tolist()
        for stamps in (EVEN, ODD)
    )
    assert even == [True] * 6
    assert odd == [False, True, True, False, True, True]


def test_history_headings_are_relative_and_continuous() -> None:
    """A past heading of 3.1 and -3.1 rad in the world is a left turn of 0.083 rad."""
    made = reference()
    states, ego = made.past_states.copy(), made.ego_init.copy()
    states[:, 2], ego[2] = [3.0, 3.1, -3.1, -3.0], -3.0
    heading = prepare_history(replace(made, past_states=states, ego_init=ego))[:, 0]
    turn = np.diff(heading)
    assert turn[0] == pytest.approx(0.02, abs=1e-12)
    assert turn[5] == pytest.approx((2 * np.pi - 6.2) / 5.0, abs=1e-12)
    end = heading[-1] + 2.0 * turn[-1]
    assert end % (2.0 * np.pi) == pytest.approx(0.0, abs=1e-9) or end % (2.0 * np.pi) == pytest.approx(2 * np.pi)


def test_history_comfort_needs_the_past_and_the_world_may_be_turned() -> None:
    """The ego's heading in the world is 0.7 rad: a past that is left in the world frame would jump by that."""
    assert WORLD[2] == 0.7
    assert score_epdms(prepared(), PLAN).history_comfort.all()


@pytest.mark.parametrize(("gap_us", "steps"), [(500_021, 5), (449_000, 4), (549_999, 5), (60_000, 1)])
def test_offset_of_the_frames_follows_their_times(gap_us: int, steps: int) -> None:
    """Two plans that speed up: the differences are those at the offset, which one step more or less would change."""
    made = reference()
    faster = straight_plan(10.0)[None]
    faster[0, 3:, 0] += np.arange(5) ** 2
    result = score_epdms(prepare_epdms(replace(made, prev_t0_us=made.t0_us - gap_us)), PLAN, faster)
    at = {}
    for offset in (steps, steps + 1):
        at[offset] = np.empty((1, 4))
        frame_differences(result.states, result.previous_states, offset, at[offset])
    np.testing.assert_array_equal(result.ec_rms, at[steps])
    assert np.abs(at[steps] - at[steps + 1]).max() > 1e-3


def test_the_previous_plan_starts_from_the_previous_state() -> None:
    """2 m/s slower half a second ago, both plans hold their own speed: no acceleration differs."""
    made = reference()
    before = made.prev_ego_init.copy()
    before[:3] = to_world_frame(np.array([-4.5, 0.3, 0.2]), made.ego_init)
    before[3] = 8.0
    scene = prepare_epdms(replace(made, prev_ego_init=before))
    result = score_epdms(scene, PLAN, straight_plan(8.0)[None])
    assert result.ec[0] == 1.0
    assert result.ec_rms[0].max() < 0.01
    assert result.previous_states[0, 0, :4].tolist() == [0.0, 0.0, 0.0, 8.0]
    assert score_epdms(scene, PLAN, PLAN).ec[0] == 0.0


def test_past_times_must_rise() -> None:
    with pytest.raises(DataError, match=r"past_times_us must rise; got \[9000000"):
        prepare_history(past((0.0,) * 4, (-1_000_000, -1_500_000, -500_000, 0)))
