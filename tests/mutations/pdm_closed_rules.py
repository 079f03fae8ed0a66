"""Wrong variants of how PDM-Closed looks ahead: paths, forecast, leaders, driver model."""

from __future__ import annotations

from mutation import Mutation, broken

__all__ = ["PDM_CLOSED_RULES"]

FORECAST = "rewards/pdm_forecast.py"
LEADERS = "rewards/pdm_leaders.py"
PATHS = "rewards/pdm_paths.py"
PROPOSALS = "rewards/pdm_proposals.py"
UNROLLING = "test_pdm_proposals.py::"
SEEN = "test_pdm_forecast.py::"
FOLLOWED = "test_pdm_leaders.py::"
LINES = "test_pdm_paths.py::"
STEP = "            position, speed = idm[b, t - 1]"

DRIVER_RULES = (
    broken(
        "lead zero at step 1 -> computed",
        UNROLLING + "test_every_proposal_brakes_at_the_first_step",
        PROPOSALS,
        "if t % 2 == 1:",
        "if t % 2 == 1 and t > 1:",
    ),
    broken(
        "lead every step",
        UNROLLING + "test_who_is_passed_between_two_steps_leads_for_one_more",
        PROPOSALS,
        "if t % 2 == 1:",
        "if t == 1:",
    ),
    broken(
        "no carry leak",
        UNROLLING + "test_speed_of_a_slower_proposal_leaks_into_a_faster_one",
        PROPOSALS,
        STEP,
        "            shared[:] = 0.0\n" + STEP,
    ),
    broken(
        "carry leak from step to step",
        UNROLLING + "test_speed_of_a_slower_proposal_leaks_into_a_faster_one",
        PROPOSALS,
        "        shared[:] = 0.0\n",
        "",
    ),
    broken(
        "exponent 4",
        UNROLLING + "test_acceleration_has_exponent_ten",
        PROPOSALS,
        "_EXPONENT = 10.0",
        "_EXPONENT = 4.0",
    ),
    broken(
        "semi-implicit x",
        UNROLLING + "test_position_moves_with_the_old_speed",
        PROPOSALS,
        "return position + _DT_S * speed,",
        "return position + _DT_S * (speed + _DT_S * acceleration),",
    ),
    broken(
        "gap without a least value",
        UNROLLING + "test_gap_counts_from_the_rear_length_and_never_falls_below_one_metre",
        PROPOSALS,
        "gap = max(leader[0] - position - leader[2], _MIN_GAP_M)",
        "gap = leader[0] - position - leader[2]",
    ),
    broken(
        "gap without the rear length",
        UNROLLING + "test_gap_counts_from_the_rear_length_and_never_falls_below_one_metre",
        PROPOSALS,
        "leader[0] - position - leader[2]",
        "leader[0] - position",
    ),
    broken(
        "wanted gap clamped at 0",
        UNROLLING + "test_a_leader_that_draws_away_fast_still_brakes",
        PROPOSALS,
        "wanted = _MIN_GAP_M + _HEADWAY_S * speed + closing",
        "wanted = max(_MIN_GAP_M + _HEADWAY_S * speed + closing, 0.0)",
    ),
    broken(
        "speed clamped at 0",
        UNROLLING + "test_braking_is_clipped_and_speed_may_turn_negative",
        PROPOSALS,
        "speed + _DT_S * acceleration\n",
        "max(speed + _DT_S * acceleration, 0.0)\n",
    ),
    broken(
        "same target speed for all",
        UNROLLING + "test_target_speeds_are_fractions_of_the_limit",
        PROPOSALS,
        "targets = speed_limit * np.array(SPEED_FRACTIONS)",
        "targets = speed_limit * np.ones(len(SPEED_FRACTIONS))",
    ),
)

FORECAST_RULES = (
    broken(
        "forecast along velocity",
        SEEN + "test_the_whole_speed_goes_along_the_box",
        FORECAST,
        "travelled * np.cos(pose[:, None, 2])",
        "np.abs(travelled) * np.cos(course - reference.ego_init[2])[:, None]",
        "travelled * np.sin(pose[:, None, 2])",
        "np.abs(travelled) * np.sin(course - reference.ego_init[2])[:, None]",
    ),
    broken(
        "forecast always forwards",
        SEEN + "test_the_whole_speed_goes_along_the_box",
        FORECAST,
        "np.where(forwards, speed, -speed)",
        "np.where(forwards, speed, speed)",
    ),
    broken(
        "static objects move",
        SEEN + "test_static_objects_do_not_move_even_with_a_velocity",
        FORECAST,
        "np.where(static, 0.0, np.hypot(",
        "np.where(static & False, 0.0, np.hypot(",
    ),
    broken(
        "red ignored if touching",
        SEEN + "test_a_red_connector_is_ignored_only_around_the_whole_ego",
        FORECAST,
        "if red[n] and overlaps[n]:",
        "if False:",
    ),
    broken(
        "red later than t=0 counts",
        SEEN + "test_red_lights_count_on_the_route_and_at_t0_alone",
        FORECAST,
        "reference.red_active[:, 0]",
        "reference.red_active.any(axis=1)",
    ),
    broken(
        "red off the route counts",
        SEEN + "test_red_lights_count_on_the_route_and_at_t0_alone",
        FORECAST,
        "reference.red_on_route & ",
        "",
    ),
    broken(
        "no 100 m radius",
        SEEN + "test_objects_beyond_100_m_of_the_ego_centre_are_unseen",
        FORECAST,
        "_RADIUS_M = 100.0",
        "_RADIUS_M = 1e9",
    ),
    broken(
        "100 m from the rear axle",
        SEEN + "test_objects_beyond_100_m_of_the_ego_centre_are_unseen",
        FORECAST,
        "pose[:, 0] - REAR_AXLE_TO_CENTER_M, pose[:, 1]",
        "pose[:, 0], pose[:, 1]",
    ),
    broken(
        "no caps on the number of objects",
        SEEN + "test_only_the_nearest_of_each_type_are_kept",
        FORECAST,
        "[:count]]))",
        "]))",
    ),
    broken(
        "log replay instead of constant velocity",
        "test_pdm_closed.py::test_the_recorded_future_is_not_read",
        FORECAST,
        "    red_row, polygons =",
        "    pose = to_ego_frame(reference.agent_pose[agent][:, ::2], reference.ego_init[:3])\n    red_row, polygons =",
    ),
)

LEADER_RULES = (
    broken(
        "lead speed not projected",
        FOLLOWED + "test_the_leaders_speed_is_projected_on_the_path",
        LEADERS,
        " * np.cos(shapes.heading[nearest] - pose[2])",
        "",
    ),
    broken(
        "no ignore of t0 overlap",
        FOLLOWED + "test_who_overlaps_at_t0_leads_nobody",
        LEADERS,
        "if shapes.ignored[n]:",
        "if False:",
    ),
    broken(
        "red light not obstacle",
        UNROLLING + "test_a_red_light_stops_every_proposal_a_metre_before_it",
        LEADERS,
        "if shapes.ignored[n]:",
        "if shapes.ignored[n] or shapes.red[n]:",
    ),
    broken(
        "red light sets the leader's speed to 0",
        FOLLOWED + "test_a_red_light_leads_and_leaves_the_speed_alone",
        LEADERS,
        "if not shapes.red[nearest]:",
        "if True:",
    ),
    broken(
        "no path-end obstacle",
        FOLLOWED + "test_the_end_of_the_path_is_an_obstacle_that_leaves_the_speed_alone",
        LEADERS,
        "leader[0], leader[2] = path_length,",
        "leader[0], leader[2] = path_length + 1e6,",
    ),
    broken(
        "path end sets the leader's speed to 0",
        FOLLOWED + "test_the_end_of_the_path_is_an_obstacle_that_leaves_the_speed_alone",
        LEADERS,
        "leader[0], leader[2] = path_length, EGO_HALF_LENGTH_M",
        "leader[0], leader[1], leader[2] = path_length, 0.0, EGO_HALF_LENGTH_M",
    ),
    broken(
        "nearest by progress",
        FOLLOWED + "test_the_nearest_outline_leads_not_the_nearest_centroid",
        LEADERS,
        "tied = tied or apart[n] == distance\n            if apart[n] < distance:",
        "tied = False\n            if nearest < 0 or progress[n] < progress[nearest]:",
    ),
    broken(
        "ties in the order of the scene",
        FOLLOWED + "test_of_two_overlaps_the_first_in_the_index_leads",
        LEADERS,
        "    if tied:\n",
        "    if False:\n",
    ),
    broken(
        "corridor of four seconds",
        FOLLOWED + "test_the_corridor_ends_after_five_seconds_plus_a_square_cap",
        LEADERS,
        "CORRIDOR_S = 5.0",
        "CORRIDOR_S = 4.0",
    ),
)

PATH_RULES = (
    broken("round cap", LINES + "test_caps_are_square", PATHS, 'cap_style="square"', 'cap_style="round"'),
    broken("flat cap", LINES + "test_caps_are_square", PATHS, 'cap_style="square"', 'cap_style="flat"'),
    broken(
        "mitred joins",
        LINES + "test_joins_are_round_with_16_segments_a_quarter",
        PATHS,
        'join_style="round"',
        'join_style="mitre"',
    ),
    broken(
        "corridor exact substring",
        LINES + "test_corridor_runs_from_vertex_to_vertex",
        PATHS,
        "if inside.sum() >= 2:",
        "if False:",
    ),
    broken(
        "offsets +1 first",
        LINES + "test_positive_offset_is_left_and_comes_last",
        PATHS,
        "PATH_OFFSETS_M = (0.0, -1.0, 1.0)",
        "PATH_OFFSETS_M = (0.0, 1.0, -1.0)",
    ),
    broken(
        "headings not unwrapped",
        LINES + "test_pose_is_linear_between_vertices_and_turns_the_short_way",
        PATHS,
        "heading = np.unwrap(centerline[:, 2])",
        "heading = centerline[:, 2].copy()",
    ),
    broken(
        "path starts at 0",
        LINES + "test_pose_is_clipped_to_the_path",
        PATHS,
        "_SHORTEST_M = 1e-5",
        "_SHORTEST_M = 0.0",
    ),
)

PDM_CLOSED_RULES: tuple[Mutation, ...] = DRIVER_RULES + FORECAST_RULES + LEADER_RULES + PATH_RULES
