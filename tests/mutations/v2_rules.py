"""Wrong variants of what NAVSIM v2.2 alone does."""

from __future__ import annotations

from mutation import Mutation, broken

__all__ = ["V2_RULES"]

COMFORT = "rewards/kernels/comfort_v2.py"
EPDMS = "rewards/epdms.py"
LANES = "rewards/kernels/lanes.py"
PREPARE = "rewards/prepare_epdms.py"
SCORE = "rewards/kernels/score.py"
AREA_RULES = "test_rules_areas.py::"
COMFORT_RULES = "test_rules_comfort.py::"
WHOLE = "test_rules_aggregation.py::"
SHIFT = "REAR_AXLE_TO_CENTER_M * (state[9] * state[9] + state[10])"
IN_CROSSING = "CENTER_IN_INTERSECTION:\n            continue"

ROAD_RULES = (
    broken(
        "TTC v2 evaluated to t=40",
        "test_rules_collisions.py::test_last_start_step_of_ttc",
        SCORE,
        "ttc_steps=32",
        "ttc_steps=41",
    ),
    broken(
        "DDC v2 counts intersections",
        "test_kernels_lanes.py::test_direction_in_intersections_counts_in_v1_only",
        SCORE,
        "direction_in_intersections=False",
        "direction_in_intersections=True",
    ),
    broken(
        "TLC ignores route filter",
        "test_kernels_collisions.py::test_red_lights_count_on_the_route_and_while_they_last",
        "rewards/prepare.py",
        "np.flatnonzero(reference.red_on_route)",
        "np.arange(len(reference.red_on_route))",
    ),
    broken(
        "LK resets in intersection",
        AREA_RULES + "test_lane_keeping_pauses_in_an_intersection",
        LANES,
        IN_CROSSING,
        IN_CROSSING.replace("continue", "away = 0\n            continue"),
    ),
    broken(
        "LK counts in intersection",
        AREA_RULES + "test_lane_keeping_pauses_in_an_intersection",
        LANES,
        IN_CROSSING,
        IN_CROSSING.replace("continue", "away += 1\n            continue"),
    ),
    broken(
        "LK threshold 21",
        AREA_RULES + "test_lane_keeping_is_about_the_box_centre",
        LANES,
        "_LANE_STEPS = 20",
        "_LANE_STEPS = 21",
    ),
    broken(
        "t=0 overlaps kept in v2",
        WHOLE + "test_who_touches_the_ego_at_t0_is_gone_for_the_whole_drive",
        PREPARE,
        "kept[a] = not boxes_touch(",
        "kept[a] = True or boxes_touch(",
    ),
    broken(
        "overlap looked for at the first sighting",
        WHOLE + "test_who_comes_later_to_where_the_ego_stood_is_not_gone",
        PREPARE,
        "np.flatnonzero(valid[:, 0])",
        "np.flatnonzero(valid.any(axis=1))",
    ),
    broken(
        "red lights not passed on",
        WHOLE + "test_what_the_human_fails_in_is_forgiven",
        EPDMS,
        "rules=V2_RULES, lights=prepared.lights",
        "rules=V2_RULES",
    ),
)

COMFORT_BROKEN = (
    broken(
        "comfort v2 physically correct shift",
        COMFORT_RULES + "test_the_centre_shift_adds_both_terms_along_x",
        COMFORT,
        SHIFT,
        "REAR_AXLE_TO_CENTER_M * -(state[9] * state[9])",
        "work[2, n] = state[6]",
        "work[2, n] = state[6] + REAR_AXLE_TO_CENTER_M * state[10]",
    ),
    broken(
        "comfort v2 without centre shift",
        COMFORT_RULES + "test_the_centre_shift_adds_both_terms_along_x",
        COMFORT,
        SHIFT,
        "0.0",
    ),
    broken(
        "total jerk with centre shift",
        COMFORT_RULES + "test_total_jerk_is_that_of_the_rear_axle",
        COMFORT,
        "work[3, n] = math.hypot(state[5], state[6])",
        "work[3, n] = math.hypot(work[1, n], state[6])",
    ),
    broken(
        "HC without history",
        COMFORT_RULES + "test_hc_of_a_scene_is_that_of_its_past_and_the_plan",
        EPDMS,
        "history_comfort(prepared.history,",
        "history_comfort(prepared.history[:0],",
    ),
    broken(
        "HC keeps the -0.1 s sample",
        COMFORT_RULES + "test_the_missing_sample_makes_a_steady_turn_look_faster",
        PREPARE,
        "_HISTORY_STEP_US, dtype=np.int64)[:-1]",
        "_HISTORY_STEP_US, dtype=np.int64)",
    ),
    broken(
        "HC always drops the -0.1 s sample",
        COMFORT_RULES + "test_a_log_a_few_microseconds_longer_has_the_sample_at_minus_0_1_s",
        PREPARE,
        "_HISTORY_STEP_US, dtype=np.int64)[:-1]",
        "_HISTORY_STEP_US, dtype=np.int64)[:14]",
    ),
    broken(
        "acceleration in windows of nine",
        COMFORT_RULES + "test_accelerations_are_smoothed_over_eight_samples",
        COMFORT,
        "_ACCELERATION = stencil(8, 2)",
        "_ACCELERATION = stencil(9, 2)",
    ),
    broken(
        "jerk in windows of eight",
        COMFORT_RULES + "test_jerk_is_the_slope_over_fifteen_samples",
        COMFORT,
        "_JERK = stencil(15, 2, 1)",
        "_JERK = stencil(8, 2, 1)",
    ),
    broken(
        "EC yaw-acc poly 3",
        COMFORT_RULES + "test_frame_yaw_acceleration_is_that_of_a_parabola",
        COMFORT,
        "_FRAME_YAW_ACCELERATION = stencil(5, 2, 2)",
        "_FRAME_YAW_ACCELERATION = stencil(5, 3, 2)",
    ),
    broken(
        "HC yaw-acc poly 2",
        COMFORT_RULES + "test_yaw_acceleration_of_the_past_and_plan_is_that_of_a_cubic",
        COMFORT,
        "\n_YAW_ACCELERATION = stencil(5, 3, 2)",
        "\n_YAW_ACCELERATION = stencil(5, 2, 2)",
    ),
    broken(
        "EC overlap 4",
        WHOLE + "test_frames_overlap_by_the_time_between_them",
        EPDMS,
        "    return offset\n",
        "    return offset - 1\n",
    ),
    broken(
        "EC overlap always 5",
        WHOLE + "test_frames_overlap_by_the_time_between_them",
        EPDMS,
        "    return offset\n",
        "    return 5\n",
    ),
    broken(
        "EC of the longitudinal acceleration alone",
        COMFORT_RULES + "test_frames_compare_the_size_of_unshifted_acceleration",
        COMFORT,
        "work[k] = math.hypot(states[k, 5], states[k, 6])",
        "work[k] = states[k, 5]",
    ),
    broken(
        "EC limits exclude their value",
        WHOLE + "test_each_difference_between_frames_has_its_limit",
        EPDMS,
        "(rms <= np.array(FRAME_LIMITS))",
        "(rms < np.array(FRAME_LIMITS))",
    ),
    broken(
        "previous plan simulated from the current ego",
        WHOLE + "test_the_previous_plan_starts_from_the_previous_ego",
        EPDMS,
        "_simulate(prepared.previous.ego_init,",
        "_simulate(prepared.ego_init,",
    ),
)

AGGREGATION_RULES = (
    broken(
        "EP low-progress branch 5 m missing (v2)",
        WHOLE + "test_progress_counts_from_5_m_on",
        EPDMS,
        "far = most > _LOW_PROGRESS_M",
        "far = most > 0.0",
    ),
    broken(
        "EP v2 masked like v1",
        WHOLE + "test_progress_of_the_plan_itself_is_not_masked",
        EPDMS,
        "np.clip(metrics.progress_m / ",
        "np.clip(metrics.progress_m * metrics.nc * metrics.dac / ",
        "most = np.maximum(own, reference_m)",
        "most = np.maximum(metrics.progress_m, reference_m)",
    ),
    broken(
        "EP v2 not clipped",
        WHOLE + "test_a_reference_that_fails_is_no_bar",
        EPDMS,
        "np.where(far, np.clip(metrics.progress_m / np.where(far, most, 1.0), 0.0, 1.0), 1.0)",
        "np.where(far, metrics.progress_m / np.where(far, reference_m, 1.0), 1.0)",
    ),
    *(
        broken(
            f"reference not masked by {name}",
            WHOLE + "test_a_reference_that_fails_is_no_bar",
            PREPARE,
            "metrics.nc * metrics.dac * metrics.ddc * metrics.tlc",
            "metrics.nc * metrics.dac * metrics.ddc * metrics.tlc".replace(f"metrics.{name}", "1.0"),
        )
        for name in ("nc", "dac", "ddc", "tlc")
    ),
    broken(
        "EP renormalised after the human filter (by the 40 m of the forgiven reference)",
        WHOLE + "test_progress_is_not_normalised_anew_after_forgiving",
        EPDMS,
        'if human_filter == "on":\n',
        'if human_filter == "on":\n        columns["ep"] = np.clip(metrics.progress_m / 40.0, 0.0, 1.0)\n',
    ),
    broken(
        "human filter missing",
        WHOLE + "test_what_the_human_fails_in_is_forgiven",
        EPDMS,
        "if getattr(human, name) == 0.0}",
        "if False}",
    ),
    broken(
        "human filter also on 0.5",
        WHOLE + "test_half_a_collision_of_the_human_forgives_nothing",
        EPDMS,
        "getattr(human, name) == 0.0}",
        "getattr(human, name) < 1.0}",
    ),
    *(
        broken(
            f"human filter not on {name}",
            WHOLE + "test_what_the_human_fails_in_is_forgiven",
            EPDMS,
            "_FILTERED if getattr(human, name) == 0.0}",
            f'_FILTERED if getattr(human, name) == 0.0 and name != "{name}"}}',
        )
        for name in ("nc", "dac", "ddc", "tlc", "ttc", "lk")
    ),
    broken(
        "aggregate not recomputed after the human filter",
        WHOLE + "test_what_the_human_fails_in_is_forgiven",
        EPDMS,
        'if human_filter == "on":',
        "if False:",
    ),
    broken(
        "weight 14 kept with EC",
        WHOLE + "test_weights_with_and_without_the_previous_frame",
        EPDMS,
        "/ 16.0",
        "/ 14.0",
    ),
    broken(
        "weight 16 kept without EC",
        WHOLE + "test_weights_with_and_without_the_previous_frame",
        EPDMS,
        "return product * weighted / 14.0",
        "return product * weighted / 16.0",
    ),
)

V2_RULES: tuple[Mutation, ...] = ROAD_RULES + COMFORT_BROKEN + AGGREGATION_RULES
