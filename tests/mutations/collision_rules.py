"""Wrong variants of NC and TTC in what both versions share."""

from __future__ import annotations

from mutation import Edit, Mutation, broken

__all__ = ["COLLISION_RULES"]

COLLISIONS = "rewards/kernels/collisions.py"
PREPARE = "rewards/prepare.py"
SCORE = "rewards/kernels/score.py"
FAULT = "test_kernels_collisions.py::"
FAULT_RULES = "test_rules_collisions.py::"
LATERAL = FAULT + "test_lateral_contact_is_at_fault_only_between_lanes_or_off_the_road"
LATERAL_CODE = "    return area & (MULTIPLE_LANES | NON_DRIVABLE) != 0"
EXPOSED_CODE = "areas[k] & (MULTIPLE_LANES | NON_DRIVABLE | REAR_AXLE_IN_INTERSECTION)"
STOPPED_EGO_CODE = "if math.hypot(states[k, 3], states[k, 4]) <= _STOPPED_MPS:"

COLLISION_RULES: tuple[Mutation, ...] = (
    broken("no lateral at-fault rule", LATERAL, COLLISIONS, LATERAL_CODE, "    return False"),
    broken("lateral always at fault", LATERAL, COLLISIONS, LATERAL_CODE, "    return True"),
    broken(
        "lateral at fault in intersections",
        FAULT_RULES + "test_an_intersection_does_not_make_a_lateral_collision_the_egos_fault",
        COLLISIONS,
        LATERAL_CODE,
        LATERAL_CODE.replace(")", " | REAR_AXLE_IN_INTERSECTION)"),
    ),
    broken(
        "no rear exclusion (NC)",
        FAULT + "test_being_hit_from_behind_is_not_at_fault",
        COLLISIONS,
        "pose[a, k, 0], pose[a, k, 1])[1]:",
        "pose[a, k, 0], pose[a, k, 1])[1] and False:",
    ),
    broken(
        "rear exclusion before stopped tracks",
        FAULT_RULES + "test_stopped_tracks_are_hit_at_fault_even_from_behind",
        COLLISIONS,
        "    if parked:\n",
        "    if parked and not _bearing(states, boxes, k, pose[a, k, 0], pose[a, k, 1])[1]:\n",
    ),
    broken(
        "static objects score 0 instead of .5",
        FAULT + "test_static_objects_cost_half_and_road_users_all",
        COLLISIONS,
        "0.0 if is_agent[a] else 0.5",
        "0.0 if is_agent[a] else 0.0",
    ),
    broken(
        "stopped-ego exclusion missing",
        FAULT + "test_a_standing_ego_is_never_at_fault",
        COLLISIONS,
        STOPPED_EGO_CODE,
        "if False:",
    ),
    Mutation(
        "track stopped from current velocity",
        FAULT + "test_speed_at_first_sighting_decides_what_is_stopped",
        (
            Edit(PREPARE, "stopped=speed <=", "stopped=np.hypot(velocity_AT2[..., 0], velocity_AT2[..., 1]) <="),
            Edit(COLLISIONS, "stopped[a] or", "stopped[a, k] or"),
        ),
    ),
    broken(
        "front contact by corners alone",
        FAULT_RULES + "test_the_whole_bumper_is_the_front",
        COLLISIONS,
        "    if _touches(pose, half_size, a, k, front_x, front_y, cos, sin, 0.0):",
        "    left = _touches(pose, half_size, a, k, front_x - 1.1 * sin, front_y + 1.1 * cos, sin, -cos, 1.148)\n"
        "    if left and not _touches(pose, half_size, a, k, front_x, front_y, sin, -cos, 0.0):",
    ),
    broken(
        "angle from box centre (NC)",
        FAULT + "test_behind_is_measured_from_the_rear_axle",
        COLLISIONS,
        "x - states[k, 0], y - states[k, 1]",
        "x - boxes[k, 0], y - boxes[k, 1]",
    ),
    broken(
        "angle from box centre (TTC)",
        FAULT_RULES + "test_ahead_in_ttc_is_measured_from_the_rear_axle",
        COLLISIONS,
        "x - states[k, 0], y - states[k, 1]",
        "x - boxes[k, 0], y - boxes[k, 1]",
    ),
    broken(
        "TTC: ahead-only",
        FAULT + "test_ttc_counts_agents_aside_only_where_the_ego_is_exposed",
        COLLISIONS,
        "if ahead or (exposed and not behind):",
        "if ahead:",
    ),
    broken(
        "TTC: no excuse for agents behind",
        FAULT + "test_ttc_excuses_agents_behind_even_in_an_intersection",
        COLLISIONS,
        "if ahead or (exposed and not behind):",
        "if ahead or exposed:",
    ),
    broken(
        "TTC: box centre in intersection instead of rear axle",
        FAULT_RULES + "test_ttc_exposure_in_an_intersection_is_that_of_the_rear_axle",
        COLLISIONS,
        EXPOSED_CODE,
        EXPOSED_CODE.replace("REAR_AXLE_IN_INTERSECTION", "8"),
    ),
    broken(
        "TTC continuous 10 sub-steps",
        FAULT + "test_ttc_samples_every_third_step_only",
        COLLISIONS,
        "_TTC_STEPS = (0, 3, 6, 9)",
        "_TTC_STEPS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)",
    ),
    broken(
        "TTC sub-steps 0 2 4 6 8 (spacing)",
        FAULT_RULES + "test_ttc_looks_at_0_3_6_and_9_tenths_and_nowhere_else",
        COLLISIONS,
        "_TTC_STEPS = (0, 3, 6, 9)",
        "_TTC_STEPS = (0, 2, 4, 6, 8)",
    ),
    broken(
        "TTC without the real overlap (0 s ahead)",
        FAULT_RULES + "test_ttc_looks_at_0_3_6_and_9_tenths_and_nowhere_else",
        COLLISIONS,
        "_TTC_STEPS = (0, 3, 6, 9)",
        "_TTC_STEPS = (3, 6, 9)",
    ),
    broken(
        "TTC agents const at t (not t+f)",
        FAULT + "test_ttc_meets_agents_where_they_are_later",
        COLLISIONS,
        "            t = k + ahead\n",
        "            t = k\n",
        "t = k + ahead_steps",
        "t = k",
    ),
    broken(
        "TTC bearing from the projected ego",
        FAULT_RULES + "test_ttc_steps_back_to_the_ego_of_the_start_step",
        COLLISIONS,
        "ahead, behind = _bearing(states, boxes, k, pose[a, t, 0], pose[a, t, 1])",
        "shift = ahead_steps * _STEP_S * speed[k]\n"
        "        ahead, behind = _bearing(\n"
        "            states, boxes, k, pose[a, t, 0] - shift * boxes[k, 2], pose[a, t, 1] - shift * boxes[k, 3]\n"
        "        )",
    ),
    broken(
        "TTC projects a reversing ego backwards",
        FAULT + "test_ttc_projects_a_reversing_ego_forwards",
        SCORE,
        "speed[k] = math.hypot(plan[k, 3], plan[k, 4])",
        "speed[k] = plan[k, 3]",
    ),
    broken(
        "TTC of a standing ego",
        FAULT + "test_ttc_ignores_a_standing_ego",
        COLLISIONS,
        "_TTC_MIN_MPS = 5e-3",
        "_TTC_MIN_MPS = -1.0",
    ),
)
