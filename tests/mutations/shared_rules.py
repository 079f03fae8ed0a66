"""Wrong variants of what both versions of the scorer share: simulation, areas, progress."""

from __future__ import annotations

from mutation import Mutation, broken

__all__ = ["SHARED_RULES"]

LANES = "rewards/kernels/lanes.py"
POLYGONS = "rewards/kernels/polygons.py"
PREPARE = "rewards/prepare.py"
SCORE = "rewards/kernels/score.py"
SIMULATE = "rewards/kernels/simulate.py"
AREAS = "test_kernels_lanes.py::"
AREA_RULES = "test_rules_areas.py::"
DRIVING = "test_kernels_simulate.py::"
DRIVING_RULES = "test_rules_simulation.py::"
WHOLE_DRIVE = DRIVING_RULES + "test_states_equal_those_of_the_plain_simulation"
NEW_SPEED = """def _new_speed(state, wanted):
    return state[3] + STEP_S * (state[5] + _ACCELERATION_BLEND * (wanted - state[5]))


"""

AREA_RULES_BROKEN = (
    broken(
        "DAC uses lanes too",
        AREAS + "test_lanes_alone_are_not_drivable",
        PREPARE,
        "_DRIVABLE_LAYERS = (",
        "_DRIVABLE_LAYERS = (MapLayer.LANE, MapLayer.LANE_CONNECTOR, ",
    ),
    broken(
        "points on a boundary are inside",
        AREA_RULES + "test_a_corner_on_a_shared_edge_is_off_the_road",
        POLYGONS,
        "by):\n            return False",
        "by):\n            return True",
    ),
    broken(
        "multiple lanes although one lane holds all corners",
        AREAS + "test_multiple_lanes_needs_two_lanes_and_none_that_holds_all_corners",
        LANES,
        "if lanes > 1 and not within_one:",
        "if lanes > 1:",
    ),
    broken(
        "oncoming asks for any lane",
        AREA_RULES + "test_oncoming_means_off_the_route_not_off_every_lane",
        LANES,
        "if not centre & _ROUTE_LANE:",
        "if not centre & _LANE:",
    ),
    broken(
        "oncoming asks for the rear axle",
        AREA_RULES + "test_the_route_is_asked_for_the_box_centre",
        LANES,
        "if not centre & _ROUTE_LANE:",
        "if not rear & _ROUTE_LANE:",
    ),
    broken(
        "DDC window 10 instead of 11",
        AREAS + "test_direction_sums_eleven_steps",
        LANES,
        "_DIRECTION_WINDOW = 11",
        "_DIRECTION_WINDOW = 10",
    ),
    broken(
        "DDC of the rear axle",
        AREA_RULES + "test_direction_measures_the_way_of_the_box_centre",
        SCORE,
        "direction_score(boxes,",
        "direction_score(plan,",
    ),
    broken(
        "DDC asks where a step begins",
        AREA_RULES + "test_direction_asks_where_a_step_ends",
        LANES,
        "if areas[k] & ONCOMING and",
        "if areas[k - 1] & ONCOMING and",
    ),
    broken(
        "progress of the rear axle",
        AREA_RULES + "test_progress_is_that_of_the_box_centre",
        SCORE,
        "boxes[0, 0], boxes[0, 1]",
        "plan[0, 0], plan[0, 1]",
        "boxes[-1, 0], boxes[-1, 1]",
        "plan[-1, 0], plan[-1, 1]",
    ),
)

SIMULATION_RULES = (
    broken(
        "textbook jerk regulariser",
        DRIVING + "test_speed_profile_is_the_stated_regularised_fit",
        SIMULATE,
        "rows + 1] = -1.0",
        "rows + 1] = -1.0\n    penalty[rows, rows + 2] = 1.0",
    ),
    broken(
        "semi-implicit bicycle (new v)",
        DRIVING + "test_first_step_by_hand",
        SIMULATE,
        "after[0] = state[0] + speed",
        "after[0] = state[0] + _new_speed(state, acceleration)",
        "after[1] = state[1] + speed",
        "after[1] = state[1] + _new_speed(state, acceleration)",
        "@njit(cache=True, nogil=True)\ndef _advance",
        NEW_SPEED + "@njit(cache=True, nogil=True)\ndef _advance",
    ),
    broken(
        "no stop controller",
        DRIVING + "test_stopping_uses_half_gain_and_no_steering",
        SIMULATE,
        "if target <= _STOP_MPS and out[i, 3] <= _STOP_MPS:",
        "if False:",
    ),
    broken(
        "stop mode when either is slow",
        DRIVING_RULES + "test_stop_mode_needs_both_to_be_slow",
        SIMULATE,
        "target <= _STOP_MPS and out[i, 3] <= _STOP_MPS",
        "target <= _STOP_MPS or out[i, 3] <= _STOP_MPS",
    ),
    broken(
        "no LQR (plan followed exactly)",
        WHOLE_DRIVE,
        SIMULATE,
        "    return states\n",
        "    states[:, :, :3] = refs\n    return states\n",
    ),
    broken(
        "errors against the next reference pose",
        WHOLE_DRIVE,
        SIMULATE,
        "_steering_rate(out[i], ref[i],",
        "_steering_rate(out[i], ref[i + 1],",
    ),
    broken(
        "lateral acceleration of the log persists",
        DRIVING_RULES + "test_lateral_motion_of_the_log_ends_after_the_first_state",
        SIMULATE,
        "after[6] = 0.0",
        "after[6] = state[6]",
    ),
    broken(
        "times not truncated",
        DRIVING_RULES + "test_times_are_truncated_to_microseconds_in_knots_and_queries",
        SIMULATE,
        "    return np.asarray((STEP_S * np.arange(NUM_STATES) + t0_us * 1e-6) * 1e6, dtype=np.int64)",
        "    return t0_us + 100_000 * np.arange(NUM_STATES)",
    ),
)

SHARED_RULES: tuple[Mutation, ...] = AREA_RULES_BROKEN + SIMULATION_RULES
